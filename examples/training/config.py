"""What a run is (Config) and what it gives (Result)."""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from . import checkpoint, nets
from .task import Task

EXAMPLES = Path(__file__).resolve().parents[1]  # the folder examples/, where runs/ and results/ lie
TASKS = ("navigation", "adding", "language_model", "speech")  # modules in examples/, each with TASK and PRESETS
CUTS = ("all", "recurrent")
BLOCK_ORDERS = ("manifold", "random")
REDUCTIONS = ("mean", "sum")
PRECISIONS = ("float32", "tf32", "bfloat16")
PLACE = ("device", "graph")  # fields of a Config that change where it is computed, not what


def task_module(name: str) -> ModuleType:
    """Imports examples/<name>.py. By name, since those modules import this one."""
    return importlib.import_module(f"examples.{name}")


def task_class(name: str) -> type[Task]:
    """Returns the Task of examples/<name>.py."""
    return task_module(name).TASK


@dataclass(frozen=True)
class Config:
    """One run."""

    task: str
    net: str
    seed: int
    options: dict[str, Any]  # the task's keyword arguments
    schedule: list[float]  # the sparsity at the start of each epoch
    batches: int  # per epoch
    lr: float
    strength: float  # lambda: multiplies the mean over the entries of W_hh, or their sum
    inhibitor: str = "dog"
    reduction: str = "mean"
    clip: float | None = None  # the norm that gradients are clipped to
    frozen_epochs: int = 0  # in so many epochs at the end, trained points rest
    point_damping: float = 1.0  # in epoch k, trained points' gradients are multiplied by its k-th power
    r3: str = "paper"  # R^3 as the paper or as the authors' code has it, see nets.py
    lottery: bool = False  # fresh weights on the final mask of the same run without lottery
    precision: str = "float32"
    device: str = "cpu"
    graph: bool = False  # steps as CUDA graphs
    cut: str = "all"  # what the schedule prunes: all weights of the task together, or the "recurrent" ones alone
    block: int = 1  # side of the blocks in which recurrent weights are cut
    block_order: str = "manifold"  # the order of the neurons in which blocks are cut: of their points, or "random"

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
        """Returns the fields for a record, without the folder of the data sets, which does not change the run."""
        fields = asdict(self)
        fields["options"].pop("data", None)
        return fields

    def folder(self, root: Path) -> Path:
        """Returns the folder of this run below `root`; another configuration has another folder."""
        kind = "-lottery" if self.lottery else ""
        where = "" if self.device == "cpu" else f"-{self.device}"
        return root / f"{self.task}-{self.net}{kind}-seed{self.seed}-{self.key}{where}"

    def antecedent(self) -> Config:
        """Returns the run whose mask a lottery run takes over."""
        return replace(self, lottery=False)

    def pruned_at(self) -> int:
        """Returns the first epoch (from 0) at the last sparsity: pruning ends with it."""
        return self.sparsities().index(self.schedule[-1])

    def sparsities(self) -> list[float]:
        """Returns the sparsity of each epoch. A lottery run has the schedule's last one from the start."""
        return self.schedule[-1:] * len(self.schedule) if self.lottery else self.schedule


@dataclass
class Result:
    """What a run gives."""

    history: list[dict[str, float]] = field(default_factory=list)  # an entry for each finished epoch
    seconds: float = 0.0  # training and evaluation, all parts of an interrupted run together
    parts: dict[str, float] = field(default_factory=dict)  # seconds of each part of the training steps
    peak_mib: float = 0.0  # peak memory of the process (CPU) or of the GPU
    collapsed: str | None = None  # says how the run ended, if not well
    environment: dict[str, Any] = field(default_factory=dict)  # device, versions and commit when the run began
    references: dict[str, float] = field(default_factory=dict)  # errors of simple answers to the same tests


def finished(config: Config, folder: Path) -> Result | None:
    """Returns the result of a run that has nothing left to train, without making its net; None for any other run."""
    info = checkpoint.load_info(folder)
    result = Result(**info["result"]) if info is not None else Result()
    return result if len(result.history) == len(config.schedule) else None
