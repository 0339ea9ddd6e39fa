"""The examples' speech recognition: features, cache, decoding, net, measures, protocol, and going on after a break."""
import dataclasses
import inspect
import io
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import moduli_kernels as mk

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("jiwer")
pytest.importorskip("safetensors")

from examples import speech
from examples.data import speech_features
from examples.data.datasets import Clip
from examples.data.download import DataError
from examples.training import checkpoint, command_line
from examples.training.config import Config
from examples.training.trainer import Run
from tests.support.example_runs import assert_same_nets

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data" / "mini_librispeech" / "dev-clean-2.tar"
COUNT = 12
TINY = {"n_mels": 20, "stride": 4, "channels": 2, "hidden": 16, "batch": 3}


def shared_clips(folder: Path) -> list[Clip]:
    """The shortest of Mini LibriSpeech's, 1.5 to 2 s each."""
    with tarfile.open(SHARED) as archive:
        members = sorted((m for m in archive if m.name.endswith(".opus")), key=lambda m: m.size)[:COUNT]
        lines = archive.extractfile("dev-clean-2/transcripts.txt").read().decode().splitlines()
        words = dict(line.split(" ", 1) for line in lines if line)
        clips = []
        for member in members:
            path = folder / Path(member.name).name
            path.write_bytes(archive.extractfile(member).read())
            clips.append(Clip(path.stem, path, words[path.stem]))
    return clips


def made_clips(folder: Path) -> list[Clip]:
    """Where the shared data are absent: a tone for each letter, 0.15 s long."""
    clips, rng = [], np.random.default_rng(0)
    for i in range(COUNT):
        letters = rng.integers(26, size=6 + i % 3)
        tones = [np.sin(2 * np.pi * (200 + 100 * k) * np.arange(2400) / 16000) for k in letters]
        path = folder / f"1-{i}-0000.flac"
        soundfile.write(path, np.concatenate(tones) / 2 + 0.01 * rng.normal(size=2400 * len(letters)), 16000)
        clips.append(Clip(path.stem, path, "".join(chr(65 + k) for k in letters)))
    return clips


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return sorted(shared_clips(folder) if SHARED.exists() else made_clips(folder))


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def world(clips, cache_folder, monkeypatch, restored):
    """Tasks get the few clips: 8 of the training part, 4 of the test part."""
    parts = {"train-clean-5": clips[:8], "dev-clean-2": clips[8:], "train-clean-100": clips[:10]}
    monkeypatch.setattr(speech, "librispeech", lambda part, data: parts[part])
    monkeypatch.setattr(speech_features, "cache", lambda: cache_folder)
    torch.set_num_threads(1)


def tiny(**options) -> speech.SpeechTask:
    return speech.SpeechTask(**{**TINY, **options})


# -- features --


def slow_log_mel(samples: np.ndarray, n_mels: int) -> np.ndarray:
    """The same from the definitions, in float64: discrete Fourier transform by its matrix, a loop over bands."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frequencies = np.arange(513) * 16000 / 1024
    fourier = np.exp(-2j * np.pi * np.outer(np.arange(513), np.arange(400)) / 1024)
    mel = lambda f: 2595 * np.log10(1 + f / 700)
    inverse = lambda m: 700 * (10 ** (m / 2595) - 1)
    rows = []
    for start in range(0, len(samples) - 399, 160):
        power = np.abs(fourier @ (window * samples[start : start + 400])) ** 2
        row = []
        for band in range(n_mels):
            low, middle, high = (inverse(mel(8000) * (band + k) / (n_mels + 1)) for k in range(3))
            weight = np.interp(frequencies, [low, middle, high], [0, 1, 0], left=0, right=0)
            row.append(math.log(max(1e-8, weight @ power)))
        rows.append(row)
    rows = np.array(rows)
    return (rows - rows.mean(axis=0)) / rows.std(axis=0)


@pytest.mark.parametrize("n_mels", [20, 128])
@pytest.mark.parametrize("length", [1200, 1199, 400 + 159 + 160])
def test_features_are_the_definitions(n_mels, length):
    samples = np.random.default_rng(length).normal(size=length) * 0.1
    found = speech_features.log_mel(torch.tensor(samples, dtype=torch.float32), speech_features.mel_filters(n_mels))
    expected = slow_log_mel(samples, n_mels)
    assert found.shape == expected.shape == ((length - 400) // 160 + 1, n_mels)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, atol=2e-3)


def test_a_silent_clip_has_finite_features():
    found = speech_features.log_mel(torch.zeros(4000), speech_features.mel_filters(40))
    assert torch.equal(found, torch.zeros(23, 40))


def test_more_bands_than_frequencies_are_refused():
    with pytest.raises(ValueError, match="n_mels must be small enough .* got 900"):
        speech_features.mel_filters(900)


def test_formats_give_the_same_features(clips, tmp_path):
    samples, rate = soundfile.read(clips[0].audio, dtype="int16")
    for kind in ("flac", "wav"):
        soundfile.write(tmp_path / f"a.{kind}", samples, rate, subtype="PCM_16")
    found = [speech_features.load([Clip("a", tmp_path / f"a.{kind}", "A")], 20)[0] for kind in ("flac", "wav")]
    assert torch.equal(*found)
    original = speech_features.load(clips[:1], 20)[0]
    # 16-bit samples and, for Opus, the decoder's float ones: they differ by at most a step of 2^-15.
    assert (found[0] - original).abs().mean() < 0.05


def test_the_corpus_holds_each_clips_features_and_words(clips):
    corpus, filters = speech_features.load(clips, 20), speech_features.mel_filters(20)
    assert len(corpus) == COUNT and corpus.words == [clip.words.lower() for clip in clips]
    for i, clip in enumerate(clips):
        samples, _ = soundfile.read(clip.audio, dtype="float32")
        expected = speech_features.log_mel(torch.from_numpy(samples), filters)
        assert corpus.frames(i) == len(expected)
        torch.testing.assert_close(corpus[i], expected, rtol=1e-3, atol=1e-3)  # float16


def test_features_are_computed_once(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(speech_features, "cache", lambda: tmp_path)
    first, (path,) = speech_features.load(clips, 20), tmp_path.rglob(checkpoint.NAME)
    monkeypatch.setattr(speech_features, "_fill", lambda *_: pytest.fail("computed again"))
    again = speech_features.load(clips, 20)
    assert torch.equal(first.features, again.features)
    assert (first.starts, first.words) == (again.starts, again.words)
    monkeypatch.undo()
    monkeypatch.setattr(speech_features, "cache", lambda: tmp_path)
    speech_features.load(clips[:3], 20), speech_features.load(clips, 40)
    assert len(list(tmp_path.rglob(checkpoint.NAME))) == 3  # other clips, other settings: other files
    assert path.exists()


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: b"", lambda data: data[:-1000] + bytes([data[-1000] ^ 1]) + data[-999:],
    lambda data: data.replace(b'"starts', b'"stirts'),
], ids=["cut short", "empty", "one bit", "header"])
def test_a_damaged_cache_is_told_and_made_again(clips, tmp_path, monkeypatch, capsys, damage):
    monkeypatch.setattr(speech_features, "cache", lambda: tmp_path)
    whole = speech_features.load(clips, 20).features.clone()
    (path,) = tmp_path.rglob(checkpoint.NAME)
    changed = damage(path.read_bytes())
    path.unlink()  # the file is mapped to memory: write another, do not change it under the reader
    path.write_bytes(changed)
    path.with_name(f"{checkpoint.NAME}x.partial").write_bytes(b"of a killed process")
    assert torch.equal(speech_features.load(clips, 20).features, whole)
    assert f"{path} is damaged: its features are computed again" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.partial"))
    speech_features.load(clips, 20)
    assert capsys.readouterr().err == ""


def wav(samples, rate):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return file.getvalue()


@pytest.mark.parametrize("content, words, message", [
    (b"no sound", "A", r"x\.wav must be a sound file .*; fetch the data again"),
    (wav(np.zeros(8000), 8000), "A", r"x\.wav must be 16000 Hz mono .*, got 8000 Hz, 1 channel"),
    (wav(np.zeros((8000, 2)), 16000), "A", "got 16000 Hz, 2 channel"),
    (wav(np.zeros(399), 16000), "A", "at least 400 samples, got .* 399 samples"),
    (wav(np.zeros(4000), 16000), "A 1", "transcript of x must be letters, .*, got 'A 1'"),
    (wav(np.zeros(4000), 16000), " ", "transcript of x must be letters"),
])
def test_data_that_are_none_are_named(tmp_path, content, words, message):
    path = tmp_path / "x.wav"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        speech_features.load([Clip("x", path, words)], 20)


# -- characters --


def test_there_are_28_characters_and_a_blank():
    assert speech_features.CLASSES == 29 and len(set(speech_features.CHARACTERS)) == 28
    assert speech_features.encode("A Z'") == [3, 1, 28, 2]


@pytest.mark.parametrize("best, text", [
    ("", ""), ("__", ""), ("a", "a"), ("aa", "a"), ("a_a", "aa"), ("_a__b_", "ab"), ("aab bb", "ab b"),
    ("__l_ll'", "ll'"),
])
def test_greedy_decoding(best, text):
    labels = [0 if character == "_" else speech_features.encode(character)[0] for character in best]
    assert speech_features.decode(labels) == text


def test_error_rates_by_hand(monkeypatch):
    task = tiny()
    said = ["the cat", "a dog"]
    task.corpus, task.test = dataclasses.replace(task.corpus, words=said), [0, 1]
    # 12 characters: one other, five missing; 4 words: one other, two missing.
    for written, cer, wer in ((["the cut", ""], 50, 75), (said, 0, 0), (["", ""], 100, 100)):
        monkeypatch.setattr(task, "transcribe", lambda written=written: (written, 1.5))
        assert task.measures() == {"error": pytest.approx(cer), "wer": pytest.approx(wer), "ctc_loss": 1.5}
        assert task.error() == pytest.approx(cer)


def test_references_do_not_listen():
    task = tiny(split="official")
    nothing, constant = task.references().values()
    assert nothing == 100 and 50 < constant < 100


def test_transcribing_is_decoding_the_best_class_of_each_step():
    task = tiny()
    written, loss = task.transcribe()
    task.model.eval()
    losses = []
    for i, text in zip(task.test, written, strict=True):
        batch = task._collate([i])
        scores, steps = task.model(batch.features, batch.frames)
        assert scores.shape[0] == steps.item() == (task.corpus.frames(i) - 1) // 4 + 1
        assert text == speech_features.decode(scores[:, 0].argmax(-1).tolist())
        losses.append(task._ctc(scores, steps, batch).item())
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


# -- net --


@pytest.mark.parametrize("recurrent", ["one", "three"])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_a_clips_output_does_not_depend_on_the_clips_beside_it(recurrent, stride):
    torch.manual_seed(0)
    net = speech.Recognizer(20, 16, 3, stride, recurrent, 0.1).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(-0.5, 0.5)  # biases and norms that are not at their start
    frames = torch.tensor([37, 90, 64])
    clips = [torch.randn(n, 20) for n in frames.tolist()]
    together, steps = net(torch.nn.utils.rnn.pad_sequence(clips, batch_first=True), frames)
    assert steps.tolist() == [(n - 1) // stride + 1 for n in frames.tolist()]
    for i, clip in enumerate(clips):
        alone, _ = net(clip[None], frames[i : i + 1])
        torch.testing.assert_close(together[: steps[i], i], alone[:, 0], rtol=1e-4, atol=1e-4)


def test_each_frame_reaches_the_output():
    torch.manual_seed(0)
    net = speech.Recognizer(20, 16, 3, 4, "one", 0.0)
    features = torch.randn(1, 41, 20, requires_grad=True)
    net(features, torch.tensor([41]))[0].square().sum().backward()
    assert (features.grad[0].abs().sum(-1) > 0).all()


def test_both_readings_of_the_recurrent_part():
    one, three = (tiny(recurrent=name).model.rnn for name in ("one", "three"))
    assert isinstance(one, mk.SparseRNN) and isinstance(three, mk.SparseRNN)
    assert (one.num_layers, one.bidirectional, one.nonlinearity) == (1, False, "tanh")
    assert (three.num_layers, three.bidirectional, three.nonlinearity, three.dropout) == (3, True, "tanh", 0.1)


@pytest.mark.parametrize("recurrent, layers", [("one", 1), ("three", 6)])
def test_penalty_and_pruning_are_on_the_weights_they_are_said_to_be_on(recurrent, layers):
    task = tiny(recurrent=recurrent)
    mk.regularize(task.model, task.targets(), manifold="torus", strength=1.0)().backward()
    penalized = {name for name, p in task.model.named_parameters() if p.grad is not None}
    assert penalized == {name for name, _ in task.model.named_parameters() if "weight_hh" in name}
    pruner = mk.MagnitudePruner(task.pruned())
    pruner.step_to(0.5)
    names = sorted(name for _, name in task.pruned())
    assert len(names) == 2 * layers + 3 and sum("hh" in name for name in names) == layers
    recurrent_weights = task.recurrent()
    assert len(recurrent_weights) == layers
    assert all(weight.shape == mask.shape == (16, 16) for weight, mask in recurrent_weights)


# -- protocol --


def test_the_papers_split_is_80_to_20_and_the_same_for_all_seeds():
    tasks = [tiny(seed=seed) for seed in range(2)]
    for task in tasks:
        assert len(task.train) == 10 and len(task.test) == 2
        assert sorted(task.train + task.test) == list(range(COUNT))
    assert tasks[0].train == tasks[1].train
    assert not torch.equal(tasks[0].model.projection.weight, tasks[1].model.projection.weight)


def test_the_official_split_is_by_parts_and_another_corpus_has_its_own():
    task = tiny(split="official")
    assert sorted(task.train) == list(range(8)) and sorted(task.test) == list(range(8, COUNT))
    assert len(tiny(corpus="train-clean-100").corpus) == 10  # the paper's split is of the training part alone


def test_fewer_and_shorter_clips():
    whole, few = tiny(), tiny(clips=3, tests=1)
    assert few.train == whole.train[:3] and few.test[0] in whole.test
    longest = max(whole.corpus.frames(i) for i in range(COUNT))
    short = tiny(max_seconds=(longest - 0.5) / 100)
    kept = {i for i in range(COUNT) if whole.corpus.frames(i) < longest}
    assert set(short.train + short.test) == kept and len(kept) < COUNT


@pytest.mark.parametrize("options, message", [
    ({"clips": 11}, "clips must be 0 .* to 10, .*, got 11"), ({"tests": -1}, "tests must be 0 .* to 2, .*, got -1"),
    ({"max_seconds": 0.1}, "clips must be 0 .* to 0, .* at most 0.1 s"),
    ({"recurrent": "two"}, "recurrent must be one of one, three, got 'two'"),
    ({"split": "even"}, "split must be one of paper, official, got 'even'"),
    ({"corpus": "maxi"}, "corpus must be one of mini, .*, got 'maxi'"),
    ({"annealing": "cosine"}, "annealing must be one of linear, one_cycle, got 'cosine'"),
])
def test_options_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def texts(task, batch):
    ends = batch.lengths.cumsum(0).tolist()
    labels = batch.labels.tolist()
    return ["".join(speech_features.CHARACTERS[k - 1] for k in labels[a:b]) for a, b in zip([0, *ends], ends)]


def test_a_pass_has_every_clip_once_and_epochs_differ():
    task, again = tiny(), tiny()
    said = sorted(task.corpus.words[i] for i in task.train)
    epochs = [[texts(task, batch) for batch in task.batches(4)] for _ in range(3)]
    assert all(sorted(text for batch in epoch for text in batch) == said for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    companies = {frozenset(map(frozenset, epoch)) for epoch in epochs}
    assert len(companies) > 1  # not only their order
    assert [[texts(again, batch) for batch in again.batches(4)] for _ in range(3)] == epochs
    assert [len(list(task.batches(count))) for count in (1, 4, 9)] == [1, 4, 9]


def test_a_batch_is_padded_with_zeros():
    task = tiny()
    batch = next(task.batches(1))
    for row, n, text in zip(batch.features, batch.frames.tolist(), texts(task, batch), strict=True):
        index = task.corpus.words.index(text)
        assert torch.equal(row[:n], task.corpus[index]) and not row[n:].any()


def test_clips_of_like_length_are_together_in_batches_of_any_order():
    task = tiny(batch=5)
    lengths = torch.randint(100, 1600, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    task.train = range(100)
    task.corpus = speech_features.Corpus(torch.ones(sum(lengths), 20).half(), starts, ["a"] * 100)
    batches = list(task.batches(20))
    used = [batch.frames.sum().item() / batch.features[..., 0].numel() for batch in batches]
    assert sum(used) / 20 > 0.8  # 0.6 in batches of random clips
    longest = [batch.features.shape[1] for batch in batches]
    assert longest != sorted(longest)


def test_learning_rates():
    task = tiny()
    assert [task.learning_rate(2.0, done, []) for done in (0, 0.25, 0.5)] == [2.0, 1.5, 1.0]
    task = tiny(annealing="one_cycle")
    optimizer = torch.optim.SGD(task.model.parameters(), lr=2.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.0, total_steps=1001, anneal_strategy="linear")
    for step in range(1000):
        assert task.learning_rate(2.0, step / 1000, []) == pytest.approx(theirs.get_last_lr()[0], abs=0.01)
        optimizer.step()
        theirs.step()


def test_every_option_is_told():
    arguments = set(inspect.signature(speech.SpeechTask.__init__).parameters) - {"self", "seed", "device"}
    assert arguments == set(speech.OPTIONS) and set(speech.CHOICES) < arguments
    shown = command_line.parser("speech").format_help()
    assert all(f"--{name.replace('_', '-')}" in shown for name in arguments)


# -- training --


def test_a_net_learns_a_few_clips_by_heart():
    task = tiny(clips=2, dropout=0.0, hidden=64, channels=4)
    task.test = list(task.train)
    optimizer = task.optimizer([{"params": list(task.model.parameters())}], 5e-3)
    before = task.measures()
    for batch in task.batches(120):
        optimizer.zero_grad()
        task.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()
    after = task.measures()
    assert after["ctc_loss"] < 0.1 * before["ctc_loss"] and after["error"] < 20 < before["error"]


def config(**changes) -> Config:
    return Config(**{
        "task": "speech", "net": "torus", "seed": 0, "options": TINY, "schedule": mk.linear_schedule(0.9, 3),
        "batches": 3, "lr": 5e-4, "strength": 1e-2, **changes})


@pytest.mark.parametrize("recurrent, net", [("one", "none"), ("three", "torus_trained")])
def test_broken_off_and_started_again_it_ends_bitwise_where_an_unbroken_run_ends(tmp_path, recurrent, net):
    settings = config(net=net, options={**TINY, "recurrent": recurrent})
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for folder in (unbroken, broken):
        folder.mkdir()
    whole = Run(settings, unbroken)
    whole.train()
    first = Run(settings, broken)
    loss, calls = first.task.loss, []

    def interrupted(batch):
        calls.append(batch)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return loss(batch)

    first.task.loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        first.train()
    torch.manual_seed(99)  # dropout's state is the checkpoint's
    again = Run(settings, broken)
    assert len(again.result.history) == 1
    again.train()
    assert_same_nets(whole, again)
    last = whole.result.history[-1]
    assert last["sparsity"] == 0.9 and set(last) >= {"error", "wer", "ctc_loss"} and last["density"] < 0.3


@pytest.mark.parametrize("recurrent", ["one", "three"])
def test_the_lottery_has_the_mask_and_fresh_weights(tmp_path, recurrent):
    settings = config(options={**TINY, "recurrent": recurrent})
    lottery = dataclasses.replace(settings, lottery=True)
    for each in (settings, lottery):
        each.folder(tmp_path).mkdir()
    first = Run(settings, settings.folder(tmp_path))
    first.train()
    second = Run(lottery, lottery.folder(tmp_path))
    for (weight, mask), (fresh, same) in zip(first.task.recurrent(), second.task.recurrent(), strict=True):
        assert torch.equal(mask, same) and 0 < mask.sum() < 0.3 * mask.numel()
        assert not fresh[~mask].any() and not torch.equal(weight, fresh)
    result = second.train()
    assert result.collapsed is None and all(entry["sparsity"] == 0.9 for entry in result.history)
