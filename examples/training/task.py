"""What the trainer needs of a task, and a preset: one protocol of training for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import moduli_kernels as mk

WORLD_SEED = 1000  # added to a run's seed: the data's stream of draws, apart from the initial weights


class Task:
    """Data, net, loss and error of an experiment. A task of one's own fills in what raises here.

    Attributes:
        model: the net. generator: every draw of training data comes from it; its state is saved.
    """

    METRIC = "error"  # of `error`, for tables
    UNIT = ""  # behind the number
    DIGITS = 3
    PAPERS_MEASURE = "error"  # of `measures`: what the paper's tables show
    PAPERS_METRIC = ""  # its name, where it is not "error"
    FIXED_SHAPES = False  # every batch has the same, and a step leaves nothing behind but weights: CUDA graphs
    R3_SPREAD = 1.0  # standard deviation of the authors' initial trained points in R^3

    model: nn.Module
    generator: torch.Generator

    def batches(self, count: int) -> Iterator[Any]:
        """The batches of an epoch."""
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor:
        """What is minimized, without penalties, 0-d."""
        raise NotImplementedError

    def error(self) -> float:
        """On the test data, the smaller the better."""
        raise NotImplementedError

    def measures(self) -> dict[str, float]:
        """What is recorded after an epoch: "error", and what else the task measures."""
        return {"error": self.error()}

    def references(self) -> dict[str, float]:
        """Errors of simple answers to the same tests, which put the net's into proportion."""
        return {}

    def pruned(self) -> list[tuple[nn.Module, str]]:
        """The weights that are ranked and cut together."""
        raise NotImplementedError

    def targets(self) -> Sequence[mk.Target] | None:
        """The weights the penalty is on; None: those `mk.regularize` finds, the recurrent ones."""
        return None

    def recurrent(self) -> list[tuple[Tensor, Tensor]]:
        """Each W_hh (n, n) and its mask (True = kept), for density and plots; read after the pruner was made."""
        raise NotImplementedError

    def optimizer(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, lr=lr, fused=True)

    def learning_rate(self, lr: float, done: float, history: list[dict[str, float]]) -> float:
        """For the next step. done: the share of all steps that is behind, in [0, 1)."""
        return lr

    def extra_penalty(self) -> Tensor | None:
        """Penalties that every net of the task has, 0-d, before they are multiplied by the strength."""
        return None


@dataclass(frozen=True)
class Preset:
    """A protocol of training. An epoch at sparsity 0 for each of `before`, then `epochs` in which the sparsity
    rises to the cut, then `hold` on the final mask, in which trained points rest."""

    what: str  # for the reader
    options: dict[str, Any]  # of the task
    epochs: int
    batches: int  # per epoch
    lr: float
    strength: float
    clip: float | None = None  # gradient norm
    before: int = 0
    hold: int = 0
    variant: str = "paper"  # of mk.linear_schedule
    settings: dict[str, Any] = field(default_factory=dict)  # further ones of Config

    def schedule(self, cut: float) -> list[float]:
        """Sparsity at the start of each epoch."""
        return [0.0] * self.before + mk.linear_schedule(cut, self.epochs, variant=self.variant, hold=self.hold)

    def config(self, task: str, net: str, seed: int, cut: float = 0.0, data: str = "", **settings):
        """The Config of one run. data: the task's folder of data sets, if it has that option. settings: further fields
        of Config, in place of the preset's."""
        from .config import Config

        made = self.fields(cut)
        if data:
            made["options"] = {**self.options, "data": data}
        return Config(**{"task": task, "net": net, "seed": seed, **made, **settings})

    def fields(self, cut: float) -> dict[str, Any]:
        """Of Config, for every net and seed."""
        return {"options": self.options, "schedule": self.schedule(cut), "batches": self.batches, "lr": self.lr,
                "strength": self.strength, "clip": self.clip, "frozen_epochs": self.hold, **self.settings}
