"""What a run is (Config) and what it gives (Result)."""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from . import checkpoint, nets
from .task import Task

TASKS = ("navigation", "adding", "language_model", "speech")  # modules beside this one, each with a TASK
CUTS = ("all", "recurrent")
BLOCK_ORDERS = ("manifold", "random")
REDUCTIONS = ("mean", "sum")
PLACE = ("device", "graph")  # of a Config, what does not change the experiment; of its options, "data" does not
PRECISIONS = ("float32", "tf32", "bfloat16")


def task_class(name: str) -> type[Task]:
    """The Task of examples/<name>.py."""
    return importlib.import_module(f"{__package__}.{name}").TASK


@dataclass(frozen=True)
class Config:
    """One run. `schedule` is the sparsity at the start of each epoch; `options` go to the task."""

    task: str
    net: str
    seed: int
    options: dict[str, Any]
    schedule: list[float]
    batches: int  # per epoch
    lr: float
    strength: float  # lambda: multiplies the mean over the entries of W_hh, or their sum
    inhibitor: str = "dog"
    reduction: str = "mean"
    clip: float | None = None  # gradient norm
    frozen_epochs: int = 0  # the last ones, in which trained points rest
    point_damping: float = 1.0  # trained points' gradients are multiplied by its epoch-th power
    r3: str = "paper"  # R^3 as the paper says it, or as the authors' code has it: nets.py
    lottery: bool = False  # fresh weights on the final mask of the same run without it
    precision: str = "float32"
    device: str = "cpu"
    graph: bool = False  # steps as CUDA graphs
    cut: str = "all"  # what the schedule is of: all weights of the task together, or its "recurrent" ones alone
    block: int = 1  # side of the blocks that recurrent weights are cut in
    block_order: str = "manifold"  # of the neurons' points, or "random"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("task", self.task, TASKS), ("net", self.net, nets.NETS), ("cut", self.cut, CUTS),
            ("inhibitor", self.inhibitor, nets.INHIBITORS), ("reduction", self.reduction, REDUCTIONS),
            ("r3", self.r3, nets.R3), ("precision", self.precision, PRECISIONS),
            ("block_order", self.block_order, BLOCK_ORDERS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.graph and self.device == "cpu":
            raise ValueError("graph must be False on the CPU, got True; CUDA graphs need --device cuda")
        if self.graph and not task_class(self.task).FIXED_SHAPES:
            raise ValueError(f"graph must be False for {self.task}, whose steps differ from each other, got True")

    @cached_property
    def key(self) -> str:
        """Names the experiment, wherever and however it is computed."""
        fields = {name: value for name, value in self.described().items() if name not in PLACE}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]

    def described(self) -> dict[str, Any]:
        """For records, without the folder that the data lay in."""
        fields = asdict(self)
        fields["options"].pop("data", None)
        return fields

    def folder(self, root: Path) -> Path:
        """Where this run is kept: another configuration has another folder."""
        kind = "-lottery" if self.lottery else ""
        where = "" if self.device == "cpu" else f"-{self.device}"
        return root / f"{self.task}-{self.net}{kind}-seed{self.seed}-{self.key}{where}"

    def antecedent(self) -> Config:
        """The run whose mask a lottery run has."""
        return replace(self, lottery=False)

    def pruned_at(self) -> int:
        """The first epoch (from 0) at the last sparsity: pruning ends with it."""
        return self.sparsities().index(self.schedule[-1])

    def sparsities(self) -> list[float]:
        """Of each epoch: a lottery run is at the schedule's last all along."""
        return self.schedule[-1:] * len(self.schedule) if self.lottery else self.schedule


@dataclass
class Result:
    """What a run gives. `history` has an entry for each finished epoch."""

    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0  # of training and evaluation, all parts of an interrupted run together
    parts: dict[str, float] = field(default_factory=dict)  # seconds of each part of the training steps
    peak_mib: float = 0.0  # of the process (CPU) or of the GPU's memory
    collapsed: str | None = None  # how the run ended, if not well
    environment: dict[str, Any] = field(default_factory=dict)  # where it began
    references: dict[str, float] = field(default_factory=dict)  # errors of simple answers to the same tests


def finished(config: Config, folder: Path) -> Result | None:
    """The result of a run that has nothing left to train, without making its net."""
    info = checkpoint.load_info(folder)
    result = Result(**info["result"]) if info is not None else Result()
    return result if len(result.history) == len(config.schedule) else None
