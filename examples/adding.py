"""The adding problem: a net reads 50 pairs (number, mark) and must give the sum of the two marked numbers.

It is a test of memory, since the marks may stand far apart and far from the end. Always answering 1 gives a root mean
square error (RMSE) of 0.41. Tensors are time-major, (steps, batch, ...).

    python -m examples.adding --net torus --cut 0.95
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import moduli_kernels as mk

from .training.preset import Preset
from .training.task import WORLD_SEED, Task

INPUTS = 2  # the number and its mark


class Sums(NamedTuple):
    """A batch of problems."""

    inputs: Tensor  # (steps, batch, 2): uniform numbers in [0, 1), marks 0 or 1
    target: Tensor  # (batch,): the sum of the two marked numbers


def sums(batch: int, steps: int, *, generator: torch.Generator) -> Sums:
    """Draws problems on the generator's device. The marked places differ, and all pairs are equally likely."""
    device = generator.device
    numbers = torch.rand(steps, batch, generator=generator, device=device)
    first = torch.randint(steps, (batch,), generator=generator, device=device)
    # The second place is one of the other steps - 1, so places from `first` on move up by one.
    second = torch.randint(steps - 1, (batch,), generator=generator, device=device)
    second = second + (second >= first)
    places = torch.stack((first, second))
    marks = torch.zeros(steps, batch, device=device).scatter_(0, places, 1.0)
    return Sums(torch.stack((numbers, marks), dim=-1), numbers.gather(0, places).sum(dim=0))


class Adder(nn.Module):
    """One ReLU layer, h_t = relu(W_ih x_t + W_hh h_{t-1} + b) with h_{-1} = 0, and a linear read-out of its last state.

    The authors have W_ih and W_hh side by side in one matrix with nn.Linear's default initialization. These two start
    from the same distribution, and they are pruned together.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = mk.SparseRNN(INPUTS, hidden, nonlinearity="relu")
        self.readout = nn.Linear(hidden, 1)
        self.rnn.bias_hh_l0.requires_grad_(False)  # one bias: a second one would double its learning rate
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws initial weights. mk.reinitialize_ also calls it, after the parts' own reset_parameters."""
        bound = (INPUTS + self.rnn.hidden_size) ** -0.5
        for parameter in self.rnn.parameters():
            parameter.uniform_(-bound, bound)
        self.rnn.bias_hh_l0.zero_()

    def forward(self, inputs: Tensor) -> Tensor:
        """Maps inputs (steps, batch, 2) to answers (batch,)."""
        _, last = self.rnn(inputs)
        return self.readout(last[0])[:, 0]


class AddingTask(Task):
    """The adding problem. The defaults are the paper's sizes."""

    METRIC = "RMSE"
    UNIT = "RMSE"
    FIXED_SHAPES = True
    R3_SPREAD = 10.0

    def __init__(self, *, hidden: int = 128, steps: int = 50, batch: int = 32, tests: int = 4000, seed: int = 0,
                 device: str = "cpu") -> None:
        self.batch_size, self.steps = batch, steps
        torch.manual_seed(seed)  # the initial weights
        self.model = Adder(hidden).to(device)
        self.generator = torch.Generator(device).manual_seed(WORLD_SEED + seed)
        self.test = sums(tests, steps, generator=self.generator)

    def batches(self, count: int) -> Iterator[Sums]:
        """Yields `count` fresh batches."""
        drawn = sums(count * self.batch_size, self.steps, generator=self.generator)
        for i in range(0, count * self.batch_size, self.batch_size):
            part = slice(i, i + self.batch_size)
            yield Sums(drawn.inputs[:, part], drawn.target[part])

    def loss(self, batch: Sums) -> Tensor:
        """Returns the mean squared error."""
        return nn.functional.mse_loss(self.model(batch.inputs), batch.target)

    @torch.no_grad()
    def error(self) -> float:
        """Returns the root mean square error over the test problems."""
        return self.loss(self.test).sqrt().item()

    def references(self) -> dict[str, float]:
        """Returns the RMSE of the best answer that ignores the input."""
        return {"always answering 1": (self.test.target - 1).square().mean().sqrt().item()}

    def pruned(self) -> list[tuple[nn.Module, str]]:
        rnn = self.model.rnn
        return [(rnn, "weight_ih_l0"), (rnn, "weight_hh_l0"), (self.model.readout, "weight")]

    def recurrent(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.model.rnn.weight_hh_l0.detach(), self.model.rnn.weight_hh_l0_mask)]


TASK = AddingTask
SIZE = {"hidden": 128, "steps": 50, "batch": 32, "tests": 4000}  # the authors' sizes
PRESETS = {
    # The authors' code has 100 epochs of 10,000 samples, then 10 on the final mask.
    "full": Preset("the authors' code at full size", SIZE, epochs=100, hold=10, batches=313, lr=1e-4, strength=1e-3,
                   clip=0.5, settings={"point_damping": 0.99}),
    "quick": Preset("44 epochs at three times the learning rate", SIZE, before=14, epochs=20, hold=10, batches=313,
                    lr=3e-4, strength=1e-3, clip=0.5, settings={"point_damping": 0.99}),
}

OPTIONS = {"hidden": "neurons (paper 128)", "steps": "numbers in a problem (paper 50)",
           "batch": "problems in a batch (paper 32)", "tests": "test problems, drawn once"}

if __name__ == "__main__":
    from .training.command_line import main

    sys.exit(main("adding"))
