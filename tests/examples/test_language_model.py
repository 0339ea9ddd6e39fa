"""The language model: PyTorch's example's corpus, layout and training step, the rate's rule, unigrams, resuming."""
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import moduli_kernels as mk

pytest.importorskip("safetensors")

from examples import language_model  # noqa: E402
from examples.data import datasets  # noqa: E402
from examples.training.config import Config  # noqa: E402
from examples.training.trainer import Run  # noqa: E402
from tests.support.example_runs import assert_same_nets  # noqa: E402

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_wikitext = pytest.mark.skipif(not (SHARED / "wikitext-2").exists(), reason="needs shared/data/wikitext-2")
OPTIONS = {"hidden": 10, "embedding": 8, "layers": 2, "batch": 4, "bptt": 7}
CONFIG = Config(
    task="language_model", net="torus", seed=0, options=OPTIONS, batches=20, lr=2.0, strength=0.1, clip=0.25,
    schedule=mk.linear_schedule(0.5, 4, variant="language_model"),
)


def sentences(count, seed):
    """Lines in which each word is usually followed by the next one of the alphabet."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        place, words = draw.randrange(12), []
        for _ in range(draw.randrange(3, 12)):
            words.append("abcdefghijkl"[place])
            place = (place + 1) % 12 if draw.random() < 0.9 else draw.randrange(12)
        lines.append(f" {' '.join(words)} \n")
    return "".join(lines)


pytestmark = pytest.mark.usefixtures("restored")


@pytest.fixture
def small(monkeypatch):
    """A generated corpus in WikiText-2's place."""
    texts = {"train": sentences(90, 1), "valid": sentences(30, 2), "test": sentences(35, 3)}
    monkeypatch.setattr(language_model.datasets, "wikitext2", lambda data: texts)
    return texts


# -- corpus and layout --


def test_words_are_numbered_in_order_of_appearance_and_lines_are_closed():
    texts = {"train": " \n b a b \n", "valid": "a c\n", "test": "d b\u2028e\n"}
    made = language_model.corpus(texts)
    assert made.train.tolist() == [0, 1, 2, 1, 0] and made.valid.tolist() == [2, 3, 0]
    assert made.test.tolist() == [4, 1, 5, 0] and made.words == 6


def test_a_share_keeps_the_first_tokens_of_each_text_and_their_words():
    texts = {"train": "a b c d e f g", "valid": "h i j", "test": "k a l"}
    made = language_model.corpus(texts, 0.5)
    assert made.train.tolist() == [0, 1, 2, 3] and made.valid.tolist() == [4, 5] and made.test.tolist() == [6, 0]
    assert made.words == 7
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        language_model.corpus(texts, 0)


def test_columns_are_batchify_of_pytorchs_example():
    # The alphabet in 4 columns, as that example draws it: a b c d e f | g h ... with y and z left out.
    laid = language_model.columns(torch.arange(26), 4)
    assert laid.shape == (6, 4) and laid.is_contiguous()
    assert laid[0].tolist() == [0, 6, 12, 18] and laid[:, 1].tolist() == [6, 7, 8, 9, 10, 11]
    with pytest.raises(ValueError, match="batch must leave at least 2 tokens to each column, got 14 for 26"):
        language_model.columns(torch.arange(26), 14)


def test_windows_are_get_batch_of_pytorchs_example():
    laid = language_model.columns(torch.arange(26), 4)
    first, second, third = language_model.windows(laid, 2)
    assert torch.equal(first.inputs, laid[:2]) and torch.equal(first.targets, laid[1:3])
    assert torch.equal(second.inputs, laid[2:4]) and torch.equal(second.targets, laid[3:5])
    assert torch.equal(third.inputs, laid[4:5]) and torch.equal(third.targets, laid[5:])


@needs_wikitext
def test_wikitext2_has_the_published_sizes_and_its_unigram_loss():
    texts = datasets.wikitext2(SHARED)
    corpus = language_model.corpus(texts)
    assert [len(tokens) for tokens in corpus[:3]] == [2_088_628, 217_646, 245_569]
    assert corpus.words == 33_278 == len(corpus.train.unique())  # so no word of the test text is unseen
    # Where the paper's collapsed nets are, 113 to 121, if its perplexity is 2^loss.
    assert language_model.unigram_loss(corpus) == pytest.approx(6.818, abs=1e-3)
    assert 2 ** language_model.unigram_loss(corpus) == pytest.approx(112.8, abs=0.1)
    # The presets' epochs are the whole of their texts.
    quick = language_model.PRESETS["quick"]
    reduced = language_model.corpus(texts, quick.options["share"])
    assert reduced.words == 10_495
    for preset, tokens in ((language_model.PRESETS["full"], corpus.train), (quick, reduced.train)):
        assert preset.batches == math.ceil((len(language_model.columns(tokens, 20)) - 1) / 35)


def test_unigram_loss_by_hand():
    corpus = language_model.corpus({"train": "a a b", "valid": "", "test": "a c"})  # words: a b <eos> c
    counts = {"a": 3, "b": 2, "<eos>": 2, "c": 1}
    expected = -sum(math.log(counts[word] / 8) for word in ("a", "c", "<eos>")) / 3
    assert language_model.unigram_loss(corpus) == pytest.approx(expected, rel=1e-12)


# -- the net and its training --


def test_training_is_that_of_pytorchs_example(small):
    """The example's loop, with nn.RNN, repackaged hidden state and its update written out."""
    task = language_model.LanguageModelTask(**OPTIONS, rest=False)
    ours, words = task.model, task.corpus.words
    embedding, rnn, decoder = nn.Embedding(words, 8), nn.RNN(8, 10, 2), nn.Linear(10, words)
    theirs = nn.ModuleDict({"embedding": embedding, "rnn": rnn, "decoder": decoder})
    theirs.load_state_dict(ours.state_dict())
    optimizer = task.optimizer([{"params": list(ours.parameters())}], 2.0)
    text, hidden, total = task.train, torch.zeros(2, 4, 10), 0.0
    for count, batch in enumerate(task.batches(task.windows_per_epoch)):
        loss = task.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(ours.parameters(), 0.25)
        optimizer.step()

        steps = min(7, len(text) - 1 - 7 * count)
        source = text[7 * count:7 * count + steps]
        target = text[7 * count + 1:7 * count + 1 + steps].reshape(-1)
        theirs.zero_grad()
        output, hidden = rnn(embedding(source), hidden.detach())
        expected = nn.functional.nll_loss(torch.log_softmax(decoder(output).view(-1, words), dim=1), target)
        expected.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.25)
        for parameter in theirs.parameters():
            parameter.data.add_(parameter.grad, alpha=-2.0)
        torch.testing.assert_close(loss, expected)
        total += 1
    assert total == task.windows_per_epoch == math.ceil((len(text) - 1) / 7) > 20
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_state_is_carried_without_its_gradient_and_starts_afresh(small):
    task = language_model.LanguageModelTask(**OPTIONS)
    first, second = task.batches(2)
    task.loss(first)
    carried = task.state.clone()
    logits, last = task.model(first.inputs, torch.zeros(2, 4, 10))
    assert torch.equal(carried, last) and not task.state.requires_grad and carried.any()
    after = task.loss(second)
    task.state.zero_()
    alone = task.loss(second)
    assert after.item() != alone.item()
    # Only the words of the second window are in its gradient, of the embedding, whose rows are the words'.
    task.state.copy_(carried)
    inputs = torch.zeros_like(second.inputs)
    task.loss(language_model.Window(inputs, second.targets)).backward()
    assert task.model.embedding.weight.grad[0].any() and not task.model.embedding.weight.grad[1:].any()
    for _ in task.batches(1):
        assert not task.state.any()


def test_the_start_is_that_of_pytorchs_example_also_in_a_lottery(small):
    task = language_model.LanguageModelTask(**{**OPTIONS, "hidden": 40, "embedding": 40})
    model = task.model
    pruner = mk.MagnitudePruner(task.pruned())
    for sparsity in (0.0, 0.5):
        if sparsity:
            pruner.step_to(sparsity)
            before = model.embedding.weight.clone()
            mk.reinitialize_(model, pruner, generator=torch.Generator().manual_seed(5))
            assert not torch.equal(model.embedding.weight, before)
        for weight in (model.embedding.weight, model.decoder.weight):
            assert 0.09 < weight.abs().max() <= 0.1 and weight.min() < -0.09 and abs(weight.mean()) < 0.02
        assert not model.decoder.bias.any()
        for name, parameter in model.rnn.named_parameters():
            assert (0.15 if "weight" in name else 0) < parameter.abs().max() <= 40**-0.5
        weights = torch.cat([getattr(module, name).flatten() for module, name in task.pruned()])
        assert (weights == 0).sum() == round(sparsity * len(weights))


def test_what_is_pruned_and_what_is_recurrent(small):
    task = language_model.LanguageModelTask(**OPTIONS)
    mk.MagnitudePruner(task.pruned())
    named = {id(parameter): name for name, parameter in task.model.named_parameters()}
    pruned = [named[id(getattr(module, name))] for module, name in task.pruned()]
    assert sorted(pruned) == sorted(name for name in named.values() if "bias" not in name)
    assert [weight.shape for weight, mask in task.recurrent()] == [(10, 10)] * 2
    assert all(mask.dtype == torch.bool and mask.all() for _, mask in task.recurrent())


def test_the_penalty_is_on_each_layers_recurrent_weight_and_the_rest_by_mean(small):
    task = language_model.LanguageModelTask(**OPTIONS)
    made = mk.regularize(task.model, task.targets(), manifold="torus", strength=1.0)
    made().backward()
    penalized = [name for name, parameter in task.model.named_parameters() if parameter.grad is not None]
    assert penalized == ["rnn.weight_hh_l0", "rnn.weight_hh_l1"]
    model = task.model
    rest = (model.rnn.weight_ih_l0, model.rnn.weight_ih_l1, model.decoder.weight, model.embedding.weight)
    expected = sum(weight.abs().double().mean().item() for weight in rest)
    assert task.extra_penalty().item() == pytest.approx(expected, rel=1e-6)
    assert language_model.LanguageModelTask(**OPTIONS, rest=False).extra_penalty() is None


def test_the_rate_is_divided_by_four_when_the_validation_loss_is_not_the_best(small):
    task = language_model.LanguageModelTask(**OPTIONS)
    losses = [7.0, 6.5, 6.6, 6.5, 6.4, 6.45]
    rates = [task.learning_rate(20.0, 0.0, [{"valid_loss": loss} for loss in losses[:n]]) for n in range(7)]
    assert rates == [20, 20, 20, 5, 1.25, 1.25, 0.3125]


def test_perplexities_by_hand(small):
    task = language_model.LanguageModelTask(**OPTIONS)
    measured = task.measures()
    with torch.no_grad():  # the whole text at once
        for name, text in zip(("valid_loss", "loss_test"), task.held_out, strict=True):
            assert text.shape[1] == 10
            logits, _ = task.model(text[:-1], torch.zeros(2, 10, 10))
            whole = nn.functional.cross_entropy(logits.double().flatten(0, 1), text[1:].flatten()).item()
            assert measured[name] == pytest.approx(whole, rel=1e-5)
    assert measured["error"] == task.error() == pytest.approx(math.exp(measured["loss_test"]))
    assert measured["paper_perplexity"] == pytest.approx(2 ** measured["loss_test"])
    assert language_model.perplexity(2000.0) == math.inf
    references = task.references()
    assert references["all words alike"] == 13 > references["unigram model"] > 11


def test_more_batches_than_the_text_has_are_refused(small):
    task = language_model.LanguageModelTask(**OPTIONS)
    most = task.windows_per_epoch
    assert len(list(task.batches(most))) == most
    with pytest.raises(ValueError, match=f"batches must be at most {most}, .* got {most + 1}"):
        next(task.batches(most + 1))


def test_every_argument_has_a_text_and_presets_name_arguments():
    arguments = set(language_model.LanguageModelTask.__init__.__kwdefaults__) - {"seed", "device"}
    assert set(language_model.OPTIONS) == arguments
    assert all(set(preset.options) <= arguments for preset in language_model.PRESETS.values())


# -- with the trainer --


def train(config, folder):
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(config, folder)
    run.train()
    return run


def test_it_learns(small, tmp_path):
    run = train(replace(CONFIG, schedule=[0.0] * 8, batches=25, net="none"), tmp_path)
    history = run.result.history
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[-1]["error"] < 0.7 * run.result.references["unigram model"]


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, net="torus_trained", lottery=True)],
                         ids=["pruned", "lottery"])
@pytest.mark.parametrize("where", ["in an epoch", "before saving"])
def test_interrupted_and_resumed_it_ends_bitwise_where_an_unbroken_run_ends(small, tmp_path, config, where):
    for folder in ("broken", "unbroken"):
        if config.lottery:
            train(config.antecedent(), config.antecedent().folder(tmp_path / folder))
    whole = train(config, config.folder(tmp_path / "unbroken"))

    class Interrupted(Exception):
        pass

    def stop(epoch):
        if epoch == 3:
            raise Interrupted

    folder = config.folder(tmp_path / "broken")
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(config, folder)
    if where == "in an epoch":
        loss, calls = run.task.loss, []

        def broken(batch):
            calls.append(batch)
            if len(calls) == 50:
                raise Interrupted
            return loss(batch)

        run.task.loss = broken
        with pytest.raises(Interrupted):
            run.train()
    else:
        with pytest.raises(Interrupted):
            run.train(after_epoch=stop)
    again = Run(config, folder)
    assert len(again.result.history) == 2
    again.train()
    assert_same_nets(again, whole)
    assert len(whole.result.history) == 4


def test_a_lottery_run_has_the_antecedents_final_masks_and_starts_at_the_first_rate(small, tmp_path):
    config = replace(CONFIG, lottery=True)
    first = train(CONFIG, CONFIG.folder(tmp_path))
    run = train(config, config.folder(tmp_path))
    masks = {key: mask for key, mask in first.task.model.state_dict().items() if key.endswith("_mask")}
    assert len(masks) == 6
    assert all(torch.equal(run.task.model.state_dict()[key], mask) for key, mask in masks.items())
    assert run.result.history[0]["lr"] == CONFIG.lr and run.result.history[0]["sparsity"] == 0.5
    assert not (run.task.model.decoder.weight[~run.task.model.decoder.weight_mask]).any()


def test_bfloat16_trains_with_its_loss_in_float32(small, tmp_path):
    exact = train(replace(CONFIG, net="none"), tmp_path / "float32").result.history
    run = train(replace(CONFIG, net="none", precision="bfloat16"), tmp_path / "bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        (batch,) = run.task.batches(1)
        loss = run.task.loss(batch)
        logits, _ = run.task.model(batch.inputs, run.task.state)
    assert loss.dtype == torch.float32 and logits.dtype == torch.bfloat16
    assert run.task.state.dtype == torch.float32
    for a, b in zip(run.result.history, exact, strict=True):
        assert a["loss"] != b["loss"] and a["loss"] == pytest.approx(b["loss"], rel=0.02)
