"""Head direction: a recurrent net sees where a head points at first and how it turns, and says where it points.

The net sees the angle of every turn, and the landmark activations of the first direction only; it must give the
landmark activations of every later direction. So its hidden space is known: it is a circle. Angles are in radians,
errors in degrees. Tensors are time-major, (steps, batch, ...). The net is that of examples/navigation.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..navigation import TEST_BATCHES, PathIntegrator, soft_cross_entropy
from ..training.task import WORLD_SEED, Task

MEMORY = 0.8  # correlation of two turns that follow each other


class Turns(NamedTuple):
    """A batch of heads that turn."""

    start: Tensor  # (batch,) rad, in [0, 2 pi)
    turns: Tensor  # (steps, batch, 1) rad, the turn of each step, which is the net's input
    directions: Tensor  # (steps, batch) rad, directions[t] = start + turns[:t + 1].sum(0), not wrapped


def turns(batch: int, steps: int, spread: float, *, generator: torch.Generator) -> Turns:
    """Draws the turns of `batch` heads: a stationary Gaussian sequence in which neighbours have correlation MEMORY.

    Args:
        spread: standard deviation of a turn, rad.
        generator: every draw comes from it, on its device.
    """
    device = generator.device
    start = 2 * math.pi * torch.rand(batch, generator=generator, device=device)
    drawn = spread * torch.randn(steps, batch, generator=generator, device=device)
    for t in range(1, steps):
        drawn[t] = MEMORY * drawn[t - 1] + math.sqrt(1 - MEMORY**2) * drawn[t]
    return Turns(start, drawn[..., None], start + drawn.cumsum(0))


def wrapped(angles: Tensor) -> Tensor:
    """Returns the angles in [-pi, pi), rad."""
    return torch.remainder(angles + math.pi, 2 * math.pi) - math.pi


class RingTask(Task):
    """Head direction with landmarks that stand evenly on the circle. Angles in the arguments are in degrees.

    Args:
        hidden: neurons.
        landmarks: landmarks on the circle.
        width: sigma of a landmark's activation.
        steps: steps of a sequence.
        batch: sequences in a batch.
        spread: standard deviation of a turn.
        seed: of weights and data.
        device: where the net is trained.
    """

    METRIC = "mean error"
    UNIT = "degrees"
    DIGITS = 2
    FIXED_SHAPES = True

    def __init__(self, *, hidden: int = 512, landmarks: int = 64, width: float = 10.0, steps: int = 50,
                 batch: int = 32, spread: float = 10.0, seed: int = 0, device: str = "cpu") -> None:
        self.batch_size, self.steps, self.spread = batch, steps, math.radians(spread)
        torch.manual_seed(seed)  # the initial weights: PyTorch's default
        self.model: nn.Module = PathIntegrator(landmarks, hidden, inputs=1).to(device)
        self.generator = torch.Generator(device).manual_seed(WORLD_SEED + seed)
        self.landmarks = torch.arange(landmarks, device=device) * (2 * math.pi / landmarks)
        self.width = math.radians(width)
        self.test = turns(TEST_BATCHES * batch, steps, self.spread, generator=self.generator)

    def batches(self, count: int) -> Iterator[Turns]:
        """Yields `count` fresh batches. They are drawn together, so that the loop over steps costs little for each."""
        drawn = turns(count * self.batch_size, self.steps, self.spread, generator=self.generator)
        for i in range(0, count * self.batch_size, self.batch_size):
            part = slice(i, i + self.batch_size)
            yield Turns(drawn.start[part], drawn.turns[:, part], drawn.directions[:, part])

    def activation(self, directions: Tensor) -> Tensor:
        """Returns the landmarks' activations, softmax(-d^2 / (2 width^2)): (...) rad -> (..., landmarks)."""
        distances = wrapped(directions[..., None] - self.landmarks)
        return torch.softmax(distances.square() / (-2 * self.width**2), dim=-1)

    def logits(self, batch: Turns) -> Tensor:
        """Returns the net's answers, (steps, batch, landmarks)."""
        return self.model(self.activation(batch.start), batch.turns)

    def loss(self, batch: Turns) -> Tensor:
        """Returns the cross entropy with the true activations, nats."""
        return soft_cross_entropy(self.logits(batch), self.activation(batch.directions))

    def decode(self, activations: Tensor) -> Tensor:
        """Returns the direction of the landmarks' mean, weighted by activations: (..., landmarks) -> (...) rad."""
        return torch.atan2(activations @ self.landmarks.sin(), activations @ self.landmarks.cos())

    @torch.no_grad()
    def error(self) -> float:
        """Returns the mean angle between decoded and true direction over all steps of the test sequences, degrees."""
        return self._mean_angle(self.decode(torch.softmax(self.logits(self.test), dim=-1)))

    def references(self) -> dict[str, float]:
        """Returns errors (degrees) of simple answers, to set the net's beside."""
        return {"staying at the start": self._mean_angle(self.test.start),
                "perfect activations, decoded": self._mean_angle(self.decode(self.activation(self.test.directions)))}

    def _mean_angle(self, guess: Tensor) -> float:
        return math.degrees(wrapped(guess - self.test.directions).abs().mean().item())

    def pruned(self) -> list[tuple[nn.Module, str]]:
        return [(self.model.rnn, "weight_hh_l0")]

    def recurrent(self) -> list[tuple[Tensor, Tensor]]:
        rnn: Any = self.model.rnn
        return [(rnn.weight_hh_l0.detach(), rnn.weight_hh_l0_mask)]
