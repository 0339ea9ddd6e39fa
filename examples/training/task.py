"""What the trainer asks of a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import moduli_kernels as mk

WORLD_SEED = 1000  # added to a run's seed, so that the data's random numbers are not those of the initial weights


class Task:
    """Data, net, loss and error of an experiment. To make your own, subclass it and fill in what raises here.

    Attributes:
        model: the net.
        generator: every draw of training data comes from it; the checkpoint holds its state.
    """

    METRIC = "error"  # the name of `error`, for tables
    UNIT = ""  # shown behind an error
    DIGITS = 3  # decimals of an error
    PAPERS_MEASURE = "error"  # the one of `measures` that the paper's tables show
    PAPERS_METRIC = ""  # its name, where that is not "error"
    FIXED_SHAPES = False  # True where CUDA graphs work: batches have one shape, and a step changes only weights
    R3_SPREAD = 1.0  # standard deviation of the authors' initial trained points in R^3

    model: nn.Module
    generator: torch.Generator

    def batches(self, count: int) -> Iterator[Any]:
        """Yields the batches of an epoch."""
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor:
        """Returns what is minimized, without penalties, 0-d."""
        raise NotImplementedError

    def error(self) -> float:
        """Returns the error on the test data; smaller is better."""
        raise NotImplementedError

    def measures(self) -> dict[str, float]:
        """Returns what is recorded after an epoch: "error", and whatever else the task measures."""
        return {"error": self.error()}

    def references(self) -> dict[str, float]:
        """Returns errors of simple answers to the same tests, by name, to set the net's error beside."""
        return {}

    def pruned(self) -> list[tuple[nn.Module, str]]:
        """Returns the weights that are ranked and cut together, as (module, parameter's name)."""
        raise NotImplementedError

    def targets(self) -> Sequence[mk.Target] | None:
        """Returns the weights under the penalty; None means the recurrent ones, which `mk.regularize` finds."""
        return None

    def recurrent(self) -> list[tuple[Tensor, Tensor]]:
        """Returns each W_hh (n, n) and its mask (True = kept), for density and plots. The pruner must exist already."""
        raise NotImplementedError

    def optimizer(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Returns the optimizer over these parameter groups; Adam unless the task says otherwise."""
        return torch.optim.Adam(groups, lr=lr, fused=True)

    def learning_rate(self, lr: float, done: float, history: list[dict[str, float]]) -> float:
        """Returns the learning rate of the next step.

        Args:
            lr: the run's learning rate.
            done: the share of all steps that is already trained, in [0, 1).
            history: entries of the finished epochs (Result.history).
        """
        return lr

    def extra_penalty(self) -> Tensor | None:
        """Returns a penalty that every net of the task has, 0-d, before it is multiplied by the strength; or None."""
        return None

    @classmethod
    def with_unit(cls, error: float) -> str:
        """Puts an error into words, such as "11.4 cm"."""
        return f"{error:.{cls.DIGITS}f} {cls.UNIT}"
