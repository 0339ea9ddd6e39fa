"""Word-level language model on WikiText-2: a net reads a text and says at each word how likely each next word is.

This is PyTorch's word_language_model example with tanh layers: an embedding, recurrent layers, a decoder, and plain SGD
whose rate is divided by 4 when the validation loss does not improve. Losses are in nats per token. The error is the
perplexity e^loss; what the paper calls perplexity is 2^loss, which is recorded too. Token tensors are time-major,
(steps, batch).

    python -m examples.language_model --net torus --cut 0.9 --data ../shared/data
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import moduli_kernels as mk

from .data import datasets
from .training.preset import Preset
from .training.task import WORLD_SEED, Task

END = "<eos>"  # closes a line
START_RANGE = 0.1  # embedding and decoder start uniform between minus and plus this
TEST_BATCH = 10  # columns in which validation and test texts are read, as in PyTorch's example
ANNEALING = 4.0  # the learning rate is divided by it


class Corpus(NamedTuple):
    """The texts as word numbers, (tokens,) int64 each. END closes each line."""

    train: Tensor
    valid: Tensor
    test: Tensor
    words: int  # size of the vocabulary


def corpus(texts: dict[str, str], share: float = 1.0) -> Corpus:
    """Numbers words by first appearance in train, then valid, then test.

    Args:
        texts: "train", "valid", "test".
        share: this share of each text's tokens is kept, from the start. Words that occur only in the rest are not in
            the vocabulary.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share!r}; 1 is the whole corpus")
    numbers: dict[str, int] = {}
    tokens = []
    for split in ("train", "valid", "test"):
        # splitlines() would also break lines at characters that WikiText has inside of them.
        lines = texts[split].removesuffix("\n").split("\n")
        count = round(share * sum(len(line.split()) + 1 for line in lines))
        words = itertools.chain.from_iterable((*line.split(), END) for line in lines)
        kept = itertools.islice(words, count)
        tokens.append(torch.tensor([numbers.setdefault(word, len(numbers)) for word in kept]))
    return Corpus(*tokens, len(numbers))


def columns(tokens: Tensor, batch: int) -> Tensor:
    """Cuts the text into `batch` equal columns, (tokens,) -> (tokens // batch, batch), and drops the rest."""
    steps = len(tokens) // batch
    if steps < 2:
        raise ValueError(f"batch must leave at least 2 tokens to each column, got {batch} for {len(tokens)} tokens; "
                         f"take a smaller batch or a larger share")
    return tokens[:steps * batch].view(batch, steps).t().contiguous()


class Window(NamedTuple):
    """Some rows of the columns, and for each word the one that follows it."""

    inputs: Tensor  # (steps, batch) int64
    targets: Tensor  # (steps, batch) int64


def windows(text: Tensor, steps: int) -> Iterator[Window]:
    """Yields `text`, (rows, batch), in windows of `steps` rows, in order. The last one may be shorter."""
    last = len(text) - 1
    for begin in range(0, last, steps):
        end = min(begin + steps, last)
        yield Window(text[begin:end], text[begin + 1:end + 1])


class LanguageModel(nn.Module):
    """An embedding, tanh layers and a decoder, with biases."""

    def __init__(self, words: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding)
        self.rnn = mk.SparseRNN(embedding, hidden, layers, nonlinearity="tanh")
        self.decoder = nn.Linear(hidden, words)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws initial weights as PyTorch's example. mk.reinitialize_ also calls it, after the parts' own."""
        self.embedding.weight.uniform_(-START_RANGE, START_RANGE)
        self.decoder.weight.uniform_(-START_RANGE, START_RANGE)
        self.decoder.bias.zero_()

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Maps words (steps, batch) int64 and a state (layers, batch, hidden) to logits (steps, batch, words) and the
        last state."""
        states, last = self.rnn(self.embedding(inputs), state)
        return self.decoder(states), last

    def fresh_state(self, batch: int) -> Tensor:
        """Returns a state of zeros, (layers, batch, hidden)."""
        return self.decoder.weight.new_zeros(self.rnn.num_layers, batch, self.rnn.hidden_size)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Returns the cross entropy in nats, 0-d, computed in float32 whatever the logits are."""
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)


class LanguageModelTask(Task):
    """Language modelling on WikiText-2. `OPTIONS` says what the arguments are; the defaults are the paper's sizes.

    Within an epoch, the hidden state goes on from one window to the next, without its gradient. It starts at zero in
    each epoch.
    """

    METRIC = "test perplexity"
    PAPERS_MEASURE = "paper_perplexity"
    PAPERS_METRIC = "2^loss"
    DIGITS = 1

    def __init__(self, *, hidden: int = 650, embedding: int = 650, layers: int = 3, batch: int = 20, bptt: int = 35,
                 share: float = 1.0, rest: bool = True, data: str = "", seed: int = 0, device: str = "cpu") -> None:
        self.bptt, self.rest = bptt, rest
        self.corpus = corpus(datasets.wikitext2(data), share)
        self.train, *self.held_out = (
            columns(tokens, size).to(device)
            for tokens, size in zip(self.corpus[:3], (batch, TEST_BATCH, TEST_BATCH), strict=True))
        torch.manual_seed(seed)  # the initial weights
        self.model = LanguageModel(self.corpus.words, embedding, hidden, layers).to(device)
        self.state = self.model.fresh_state(batch)
        # Training draws nothing from it, since the text has its order.
        self.generator = torch.Generator(device).manual_seed(WORLD_SEED + seed)

    @property
    def windows_per_epoch(self) -> int:
        """How many windows the training text has."""
        return math.ceil((len(self.train) - 1) / self.bptt)

    def optimizer(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=lr)

    def learning_rate(self, lr: float, done: float, history: list[dict[str, float]]) -> float:
        """Divides the rate by ANNEALING for each epoch whose validation loss was not below all before it."""
        best, rate = math.inf, lr
        for entry in history:
            if entry["valid_loss"] < best:
                best = entry["valid_loss"]
            else:
                rate /= ANNEALING
        return rate

    def batches(self, count: int) -> Iterator[Window]:
        """Yields the first `count` windows of the training text, from a fresh hidden state."""
        if count > self.windows_per_epoch:
            raise ValueError(f"batches must be at most {self.windows_per_epoch}, the windows of {self.bptt} steps in "
                             f"this training text, got {count}")
        self.state.zero_()
        yield from itertools.islice(windows(self.train, self.bptt), count)

    def loss(self, batch: Window) -> Tensor:
        """Returns the cross entropy, nats a token, and hands the hidden state on to the next window."""
        # The net gets a copy, since the backward pass still needs the state that is overwritten below.
        logits, last = self.model(batch.inputs, self.state.clone())
        self.state.copy_(last.detach())
        return cross_entropy(logits, batch.targets)

    def extra_penalty(self) -> Tensor | None:
        """Returns the sum of the mean absolute weights of each W_ih, the decoder and the embedding, if `rest`."""
        if not self.rest:
            return None
        rnn = self.model.rnn
        weights = [getattr(rnn, f"weight_ih_l{k}") for k in range(rnn.num_layers)]
        weights += [self.model.decoder.weight, self.model.embedding.weight]
        return torch.stack([weight.abs().mean() for weight in weights]).sum()

    @torch.no_grad()
    def held_out_loss(self, text: Tensor) -> float:
        """Returns nats a token over `text`, (rows, TEST_BATCH), read in windows as in training to save memory."""
        state = self.model.fresh_state(text.shape[1])
        total = torch.zeros((), dtype=torch.float64, device=text.device)
        for window in windows(text, self.bptt):
            logits, state = self.model(window.inputs, state)
            total += cross_entropy(logits, window.targets, "sum")
        return total.item() / text[1:].numel()

    def measures(self) -> dict[str, float]:
        """Returns "error" (perplexity on the test text), "paper_perplexity" (2^loss), and losses in nats a token."""
        valid, test = map(self.held_out_loss, self.held_out)
        papers = perplexity(test * math.log(2))
        return {"error": perplexity(test), "loss_test": test, "valid_loss": valid, "paper_perplexity": papers}

    def error(self) -> float:
        """Returns the perplexity on the test text."""
        return perplexity(self.held_out_loss(self.held_out[1]))

    def references(self) -> dict[str, float]:
        """Returns perplexities, on all test tokens, of answers that ignore the text before."""
        return {"unigram model": perplexity(unigram_loss(self.corpus)), "all words alike": float(self.corpus.words)}

    def pruned(self) -> list[tuple[nn.Module, str]]:
        model = self.model
        rnn = [(model.rnn, f"weight_{kind}_l{k}") for k in range(model.rnn.num_layers) for kind in ("hh", "ih")]
        return [(model.embedding, "weight"), (model.decoder, "weight"), *rnn]

    def recurrent(self) -> list[tuple[Tensor, Tensor]]:
        rnn = self.model.rnn
        names = [f"weight_hh_l{k}" for k in range(rnn.num_layers)]
        return [(getattr(rnn, name).detach(), getattr(rnn, f"{name}_mask")) for name in names]


def perplexity(loss: float) -> float:
    """Returns e^loss, or infinity where a diverging net's is too large for a float."""
    return torch.tensor(loss, dtype=torch.float64).exp().item()


def unigram_loss(corpus: Corpus) -> float:
    """Returns nats a token on the test text if each word is as likely as its share of the training text.

    Each count is raised by 1, so that a word that the training text lacks is not impossible. (In the whole corpus there
    is no such word.)
    """
    counts = torch.bincount(corpus.train, minlength=corpus.words).double() + 1
    return -(counts / counts.sum()).log()[corpus.test].mean().item()


TASK = LanguageModelTask
# the authors' sizes
SIZE = {"hidden": 650, "embedding": 650, "layers": 3, "batch": 20, "bptt": 35, "share": 1.0, "rest": True}
PRESETS = {
    # The authors' code has 15 epochs (early logs have 40), each over the whole text.
    "full": Preset("the authors' code at full size", SIZE, epochs=15, batches=2984, lr=20.0, strength=0.1, clip=0.25,
                   variant="language_model"),
    "quick": Preset("128 neurons a layer, a 25th of the corpus (10,495 words), a quarter of the learning rate, since "
                    "so small a net diverges at 20; 5 minutes on a core",
                    {**SIZE, "hidden": 128, "embedding": 128, "share": 0.04}, epochs=15, batches=120, lr=5.0,
                    strength=0.1, clip=0.25, variant="language_model"),
}
OPTIONS = {
    "hidden": "neurons of each layer (paper and code: 650)",
    "embedding": "numbers a word is embedded as (paper and code: 650)",
    "layers": "tanh layers (paper and code: 3)",
    "batch": "columns that the training text is cut into (paper and code: 20)",
    "bptt": "steps that gradients go back (paper and code: 35)",
    "share": "share of each text that is kept, from its start, with the words in it; another share has another number "
             "of batches an epoch, and perplexities that cannot be compared",
    "rest": "a penalty on the mean |W_ih| of each layer, |decoder| and |embedding| too, as the authors' code has it "
            "for every net, \"none\" included; without it only the recurrent weights are penalized, as the paper says",
    "data": "folder with wikitext-2/ (or its archive); empty: fetched and cached",
}

if __name__ == "__main__":
    from .training.command_line import main

    sys.exit(main("language_model"))
