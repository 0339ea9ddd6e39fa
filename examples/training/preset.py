"""A protocol of training for a task, from which the configurations of all its nets and seeds are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import moduli_kernels as mk

from .config import Config


@dataclass(frozen=True)
class Preset:
    """A protocol of training.

    First come `before` epochs at sparsity 0, then `epochs` in which the sparsity rises to the cut, then `hold` epochs
    on the final mask, in which trained points rest.
    """

    what: str  # says in words what the preset is
    options: dict[str, Any]  # the task's keyword arguments
    epochs: int
    batches: int  # per epoch
    lr: float
    strength: float
    clip: float | None = None  # the norm that gradients are clipped to
    before: int = 0
    hold: int = 0
    variant: str = "paper"  # mk.linear_schedule's
    settings: dict[str, Any] = field(default_factory=dict)  # further fields of Config

    def schedule(self, cut: float) -> list[float]:
        """Returns the sparsity at the start of each epoch."""
        return [0.0] * self.before + mk.linear_schedule(cut, self.epochs, variant=self.variant, hold=self.hold)

    def config(self, task: str, net: str, seed: int, cut: float = 0.0, data: str = "", **settings) -> Config:
        """Returns the Config of one run.

        Args:
            cut: the share of the weights to prune.
            data: the folder with the task's data sets, if the task has that option.
            settings: further fields of Config, in place of the preset's.
        """
        made = self.fields(cut)
        if data:
            made["options"] = {**self.options, "data": data}
        return Config(**{"task": task, "net": net, "seed": seed, **made, **settings})

    def fields(self, cut: float) -> dict[str, Any]:
        """Returns the fields of Config that are the same for every net and seed."""
        return {"options": self.options, "schedule": self.schedule(cut), "batches": self.batches, "lr": self.lr,
                "strength": self.strength, "clip": self.clip, "frozen_epochs": self.hold, **self.settings}
