"""Speech recognition: a net reads the spectrogram of a sentence and writes down its characters.

This is the experiment of the paper's appendix A.4, whose sizes are those of a well-known tutorial (AssemblyAI's
"Building an end-to-end speech recognition model in PyTorch"): a log-mel spectrogram, a convolution and three residual
ones, a linear layer, a recurrent part, two linear layers, and CTC loss over characters. The recurrent part is an
`mk.SparseRNN`.

    python -m examples.speech --data ../shared/data --net torus --cut 0.9
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import moduli_kernels as mk

from .data import speech_features
from .data.datasets import librispeech
from .training.preset import Preset
from .training.task import WORLD_SEED, Task

CORPORA = {  # the publisher's (training part, test part)
    "mini": ("train-clean-5", "dev-clean-2"),
    "train-clean-100": ("train-clean-100", "dev-clean"),
}
SPLIT_SEED = 0  # all runs train on the same clips
TRAIN_SHARE = 0.8
JITTER = 0.2  # lengths are varied by this share when clips of like length are put together, so that batches differ
WARM_UP = 0.3  # with "one_cycle", the learning rate rises in this share of the steps
WARM_UP_FROM = 1 / 25  # it rises from this share of the highest one
CONSTANTS = 100  # so many training transcripts are tried as one answer to all test clips


class Utterances(NamedTuple):
    """A batch of clips."""

    features: Tensor  # (batch, frames, n_mels), padded with 0
    frames: Tensor  # (batch,) int64 on the CPU: frames of each clip
    labels: Tensor  # (all characters of the batch,) int64: their classes, clip after clip
    lengths: Tensor  # (batch,) int64 on the CPU: characters of each clip


class ResidualConvolutions(nn.Module):
    """Computes x + conv(gelu(norm(conv(gelu(norm(x)))))), with 3x3 convolutions, layer norm over the bands, and dropout
    before each convolution."""

    def __init__(self, channels: int, bands: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(bands) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """Returns a tensor of x's shape.

        Args:
            x: (batch, channels, frames, bands).
            inside: (batch, 1, frames, 1), 0 where a clip has ended, else 1.
        """
        y = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            y = convolution(self.dropout(nn.functional.gelu(norm(y))) * inside)
        return x + y


class Recognizer(nn.Module):
    """The net. A clip's output does not depend on the other clips of the batch, since every convolution sees zeros
    beyond the clip's end.

    Args:
        recurrent: "one" layer, or "three" layers of both directions.
    """

    def __init__(self, n_mels: int, hidden: int, channels: int, stride: int, recurrent: str, dropout: float) -> None:
        super().__init__()
        self.stride = stride
        bands, width = (n_mels + 1) // 2, max(3, 2 * stride - 1)  # wide enough to see every frame
        self.front = nn.Conv2d(1, channels, (width, 3), stride=(stride, 2), padding=(width // 2, 1))
        self.residual = nn.ModuleList(ResidualConvolutions(channels, bands, dropout) for _ in range(3))
        self.projection = nn.Linear(channels * bands, hidden)
        self.norm = nn.LayerNorm(hidden)
        if recurrent == "one":
            self.rnn = mk.SparseRNN(hidden, hidden)
        else:
            self.rnn = mk.SparseRNN(hidden, hidden, num_layers=3, bidirectional=True, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(hidden if recurrent == "one" else 2 * hidden, hidden)
        self.output = nn.Linear(hidden, speech_features.CLASSES)

    def forward(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log-probabilities (steps, batch, CLASSES) and the number of steps of each clip (batch,).

        There is a step for every `stride` frames.

        Args:
            features: (batch, frames, n_mels).
            frames: (batch,), frames of each clip.
        """
        steps = (frames - 1) // self.stride + 1
        x = self.front(features[:, None])
        inside = torch.arange(x.shape[2], device=x.device) < steps.to(x.device)[:, None]
        inside = inside[:, None, :, None].to(x.dtype)
        for block in self.residual:
            x = block(x, inside)
        x = self.projection(x.permute(2, 0, 1, 3).flatten(2))
        x = nn.functional.gelu(self.norm(x))
        states, _ = self.rnn(pack_padded_sequence(x, steps, enforce_sorted=False))
        states, _ = pad_packed_sequence(states)
        logits = self.output(self.dropout(nn.functional.gelu(self.hidden(self.dropout(states)))))
        return logits.float().log_softmax(dim=-1), steps


class SpeechTask(Task):
    """Recognition of clips of LibriSpeech by CTC. `OPTIONS` says what the arguments are; the defaults are the paper's
    sizes."""

    METRIC = "CER"
    UNIT = "%"
    DIGITS = 1

    def __init__(self, *, data: str = "", corpus: str = "mini", split: str = "paper", clips: int = 0, tests: int = 0,
                 max_seconds: float = 0.0, n_mels: int = 128, stride: int = 2, channels: int = 32, hidden: int = 512,
                 recurrent: str = "one", dropout: float = 0.1, batch: int = 20, annealing: str = "linear",
                 seed: int = 0, device: str = "cpu") -> None:
        chosen = {"corpus": corpus, "split": split, "recurrent": recurrent, "annealing": annealing}
        for name, value in chosen.items():
            if value not in CHOICES[name]:
                raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r}")
        self.batch_size, self.annealing, self.device = batch, annealing, device
        self._read(data, corpus, split, n_mels)
        self._choose(split, clips, tests, max_seconds)
        torch.manual_seed(seed)  # PyTorch's default initial weights, and dropout
        self.model = Recognizer(n_mels, hidden, channels, stride, recurrent, dropout).to(device)
        self.generator = torch.Generator(device).manual_seed(WORLD_SEED + seed)

    def _read(self, data: str, corpus: str, split: str, n_mels: int) -> None:
        train, test = CORPORA[corpus]
        found = librispeech(train, data)
        self.first_test = len(found)  # in the official split, test clips begin here
        if split == "official" or corpus == "mini":
            found = [*found, *librispeech(test, data)]
        self.corpus = speech_features.load(found, n_mels)

    def _choose(self, split: str, clips: int, tests: int, max_seconds: float) -> None:
        everything = torch.randperm(len(self.corpus), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
        if split == "paper":
            cut = round(TRAIN_SHARE * len(everything))
            sides = everything[:cut], everything[cut:]
        else:
            sides = [i for i in everything if i < self.first_test], [i for i in everything if i >= self.first_test]
        longest = max_seconds * speech_features.SAMPLE_RATE / speech_features.HOP or float("inf")
        sides = [[i for i in side if self.corpus.frames(i) <= longest] for side in sides]
        for name, side, count in (("clips", sides[0], clips), ("tests", sides[1], tests)):
            if not side or not 0 <= count <= len(side):
                raise ValueError(f"{name} must be 0 (all) to {len(side)}, the clips there are of at most "
                                 f"{max_seconds:g} s (0: of any length), got {count}")
        self.train = sides[0][: clips or None]
        self.test = sorted(sides[1][: tests or None], key=self.corpus.frames)  # like lengths side by side

    def _collate(self, indices: Sequence[int]) -> Utterances:
        features = [self.corpus[i] for i in indices]
        labels = [speech_features.encode(self.corpus.words[i]) for i in indices]
        return Utterances(
            pad_sequence(features, batch_first=True).to(self.device), torch.tensor([len(each) for each in features]),
            torch.tensor([label for each in labels for label in each], device=self.device),
            torch.tensor([len(each) for each in labels]),
        )

    # -- training --

    def batches(self, count: int) -> Iterator[Utterances]:
        """Yields `count` batches of clips of like length.

        The batches pass through the training clips, each of which is seen once a pass. An epoch starts a new pass.
        """
        frames = torch.tensor([self.corpus.frames(i) for i in self.train], device=self.device)
        while count > 0:
            noise = torch.rand(len(frames), generator=self.generator, device=self.device)
            order = (frames * (1 + JITTER * noise)).argsort().tolist()
            parts = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
            for i in torch.randperm(len(parts), generator=self.generator, device=self.device)[:count].tolist():
                yield self._collate([self.train[j] for j in parts[i]])
            count -= len(parts)

    def loss(self, batch: Utterances) -> Tensor:
        """Returns the clips' mean CTC loss, nats per character. A clip with too few steps for its text counts as 0."""
        return self._ctc(*self.model(batch.features, batch.frames), batch)

    def _ctc(self, scores: Tensor, steps: Tensor, batch: Utterances) -> Tensor:
        return nn.functional.ctc_loss(scores, batch.labels, steps, batch.lengths, blank=speech_features.BLANK,
                                      zero_infinity=True)

    def optimizer(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Returns AdamW with PyTorch's weight decay, 0.01; the paper names none."""
        return torch.optim.AdamW(groups, lr=lr, fused=True)

    def learning_rate(self, lr: float, done: float, history: list[dict[str, float]]) -> float:
        """Lets the rate fall in a straight line; with "one_cycle" it rises first."""
        if self.annealing == "linear":
            return lr * (1 - done)
        if done < WARM_UP:
            return lr * (WARM_UP_FROM + (1 - WARM_UP_FROM) * done / WARM_UP)
        return lr * (1 - done) / (1 - WARM_UP)

    # -- measuring --

    @torch.no_grad()
    def transcribe(self) -> tuple[list[str], float]:
        """Returns what the net writes for each test clip, and the mean of `loss` over them."""
        written, total = [], 0.0
        self.model.eval()
        try:
            for first in range(0, len(self.test), self.batch_size):
                batch = self._collate(self.test[first : first + self.batch_size])
                scores, steps = self.model(batch.features, batch.frames)
                total += self._ctc(scores, steps, batch).item() * len(steps)
                best = scores.argmax(dim=-1).T.tolist()
                written += [speech_features.decode(row[:n]) for row, n in zip(best, steps.tolist(), strict=True)]
        finally:
            self.model.train()
        return written, total / len(self.test)

    def measures(self) -> dict[str, float]:
        """Returns "error" (character error rate, %), "wer" (word error rate, %) and "ctc_loss" (nats per character)."""
        import jiwer

        written, loss = self.transcribe()
        said = [self.corpus.words[i] for i in self.test]
        return {"error": 100 * jiwer.cer(said, written), "wer": 100 * jiwer.wer(said, written), "ctc_loss": loss}

    def error(self) -> float:
        """Returns the character error rate, %."""
        return self.measures()["error"]

    def references(self) -> dict[str, float]:
        """Returns character error rates (%) of answers that do not listen."""
        import jiwer

        said = [self.corpus.words[i] for i in self.test]
        constants = {self.corpus.words[i] for i in self.train[:CONSTANTS]}
        best = min(jiwer.cer(said, [constant] * len(said)) for constant in sorted(constants))
        return {"always nothing": 100 * jiwer.cer(said, [""] * len(said)),
                f"always the best of {len(constants)} training transcripts": 100 * best}

    # -- weights --

    def _recurrent_names(self, kind: str) -> list[str]:
        return [name for name, _ in self.model.rnn.named_parameters() if name.startswith(f"weight_{kind}")]

    def pruned(self) -> list[tuple[nn.Module, str]]:
        """Returns W_hh and W_ih of each layer and direction and the three linear layers. The paper does not say which
        weights it prunes. Convolutions, norms and biases stay whole."""
        model = self.model
        recurrent = [(model.rnn, name) for kind in ("hh", "ih") for name in self._recurrent_names(kind)]
        return [*recurrent, *((linear, "weight") for linear in (model.projection, model.hidden, model.output))]

    def recurrent(self) -> list[tuple[Tensor, Tensor]]:
        rnn = self.model.rnn
        return [(getattr(rnn, name).detach(), getattr(rnn, f"{name}_mask")) for name in self._recurrent_names("hh")]


TASK = SpeechTask
CHOICES = {
    "corpus": tuple(CORPORA),
    "split": ("paper", "official"),
    "recurrent": ("one", "three"),
    "annealing": ("linear", "one_cycle"),
}
OPTIONS = {
    "data": "folder with LibriSpeech's archives or unpacked parts; left out: fetched from OpenSLR and cached",
    "corpus": "mini: Mini LibriSpeech, 7.3 h; train-clean-100: that part of LibriSpeech, 100 h (--batches 1142 is then "
              "an epoch of the paper's split). The paper says LibriSpeech, not which part",
    "split": "paper: 80 % of the clips, drawn at random, to train, the others to test, so that a voice is on both "
             "sides; official: the publisher's parts, train-clean-5 and dev-clean-2, or train-clean-100 and dev-clean",
    "clips": "training clips used; 0: all",
    "tests": "test clips used; 0: all",
    "max_seconds": "clips longer than this are left out, in training and in test; 0: no clip is",
    "n_mels": "bands of the spectrogram (the paper does not say; 128 in the tutorial whose net the paper's is like)",
    "stride": "frames of 10 ms from one step of the net to the next (2 in the tutorial)",
    "channels": "channels of the convolutions",
    "hidden": "units of the recurrent part, in each layer and direction, and of the linear layers",
    "recurrent": "one: a single layer, as the paper says in one place; three: three layers of both directions, as it "
                 "says in another",
    "dropout": "share of activations set to 0 in training",
    "batch": "clips in a batch",
    "annealing": "how the learning rate changes. linear: falls to 0 in a straight line, as the paper says; one_cycle: "
                 "rises for 30 % of the steps, then falls (the tutorial: OneCycleLR, anneal_strategy='linear')",
}
# The paper's sizes, and the tutorial's where the paper says nothing.
SIZE = {"corpus": "mini", "split": "paper", "clips": 0, "tests": 0, "max_seconds": 0.0, "n_mels": 128, "stride": 2,
        "channels": 32, "hidden": 512, "recurrent": "one", "dropout": 0.1, "batch": 20, "annealing": "linear"}
PRESETS = {
    "full": Preset("the paper's sizes, 10 epochs of Mini LibriSpeech", SIZE, epochs=10, batches=105, lr=5e-4,
                   strength=1e-2),
    # Sizes and learning rate were chosen by how well the net without penalty and pruning trains in some 8 minutes.
    "quick": Preset(
        "8 epochs of Mini LibriSpeech; 256 units, 8 channels, 40 bands, a step every 40 ms, no dropout, batches of 8, "
        "200 test clips, learning rate up to 2e-3 and back", epochs=8, batches=261, lr=2e-3, strength=1e-2, clip=5.0,
        options={**SIZE, "n_mels": 40, "stride": 4, "channels": 8, "hidden": 256, "dropout": 0.0, "batch": 8,
                 "tests": 200, "annealing": "one_cycle"},
    ),
}

if __name__ == "__main__":
    from .training.command_line import main

    sys.exit(main("speech"))
