"""The adding problem: a net reads 50 pairs (number, mark) and must give the sum of the two marked numbers.

A test of memory: the marks may stand far apart and far from the end. Always answering 1 gives a root mean
square error (RMSE) of 0.41. Tensors are time-major, (steps, batch, ...).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import moduli_kernels as mk

INPUTS = 2  # the number and its mark
WORLD_SEED = 1000  # added to a run's seed: a stream of draws of its own, apart from the initial weights


class Sums(NamedTuple):
    inputs: Tensor  # (steps, batch, 2): uniform numbers in [0, 1), marks 0 or 1
    target: Tensor  # (batch,): the sum of the two marked numbers


def sums(batch: int, steps: int, *, generator: torch.Generator) -> Sums:
    """Fresh problems on the generator's device; the marked places are distinct, all pairs equally likely."""
    device = generator.device
    numbers = torch.rand(steps, batch, generator=generator, device=device)
    first = torch.randint(steps, (batch,), generator=generator, device=device)
    # A second place among the other steps - 1: those from `first` on move up by one.
    second = torch.randint(steps - 1, (batch,), generator=generator, device=device)
    second = second + (second >= first)
    places = torch.stack((first, second))
    marks = torch.zeros(steps, batch, device=device).scatter_(0, places, 1.0)
    return Sums(torch.stack((numbers, marks), dim=-1), numbers.gather(0, places).sum(dim=0))


class Adder(nn.Module):
    """One ReLU layer whose input and state share a matrix, and a linear read-out of the last state.

    h_t = relu(joint [x_t, h_{t-1}] + b), h_{-1} = 0. `joint.weight` is (hidden, 2 + hidden): W_ih and W_hh
    side by side, as the authors have it, with nn.Linear's default initialization over both.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.joint = nn.Linear(INPUTS + hidden, hidden)
        self.readout = nn.Linear(hidden, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """(steps, batch, 2) -> (batch,)."""
        w_ih, w_hh = self.joint.weight.split((INPUTS, self.joint.out_features), dim=1)
        driven = inputs @ w_ih.t() + self.joint.bias  # all steps at once: saves a concatenation a step
        w_hh = w_hh.t()
        state = torch.relu(driven[0])
        for step in driven[1:]:
            state = torch.relu(torch.addmm(step, state, w_hh))
        return self.readout(state)[:, 0]


class AddingTask:
    """The task as the trainer sees it; see NavigationTask."""

    def __init__(self, *, hidden: int, steps: int, batch: int, seed: int, device: str,
                 tests: int = 4000) -> None:
        self.batch_size, self.steps = batch, steps
        torch.manual_seed(seed)  # the initial weights: PyTorch's default
        self.model = Adder(hidden).to(device)
        self.generator = torch.Generator(device).manual_seed(WORLD_SEED + seed)
        self.test = sums(tests, steps, generator=self.generator)

    def batches(self, count: int) -> Iterator[Sums]:
        """`count` fresh batches."""
        drawn = sums(count * self.batch_size, self.steps, generator=self.generator)
        for i in range(0, count * self.batch_size, self.batch_size):
            part = slice(i, i + self.batch_size)
            yield Sums(drawn.inputs[:, part], drawn.target[part])

    def loss(self, batch: Sums) -> Tensor:
        """Mean squared error."""
        return nn.functional.mse_loss(self.model(batch.inputs), batch.target)

    @torch.no_grad()
    def error(self) -> float:
        """Root mean square error over the test problems."""
        return self.loss(self.test).sqrt().item()

    def references(self) -> dict[str, float]:
        """RMSE of the best answer that ignores the input."""
        return {"always answering 1": (self.test.target - 1).square().mean().sqrt().item()}

    def pruned(self) -> list[tuple[nn.Module, str]]:
        return [(self.model.joint, "weight"), (self.model.readout, "weight")]

    def targets(self) -> list[mk.Target]:
        """The penalty is on W_hh alone, the columns of `joint.weight` after the inputs'."""
        return [mk.Target(self.model.joint, "weight", columns=slice(INPUTS, None))]

    def recurrent(self) -> tuple[Tensor, Tensor]:
        """W_hh (n, n) and its mask (True = kept), for density and plots; read after the pruner was made."""
        joint = self.model.joint
        return joint.weight.detach()[:, INPUTS:], joint.weight_mask[:, INPUTS:]
