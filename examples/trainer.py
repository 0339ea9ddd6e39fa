"""Trains a task while pruning it: epochs, schedule, penalty, evaluation, and a checkpoint after every epoch.

Killed at any moment and started again with the same configuration, a run goes on from its last checkpoint
and, on the CPU, ends bitwise where an unbroken run ends: the checkpoint holds weights, masks, points, optimizer
and every random state.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moduli_kernels as mk
from moduli_kernels.env_report import environment

from . import checkpoint
from .adding import AddingTask
from .navigation import NavigationTask

TASKS = {"navigation": NavigationTask, "adding": AddingTask}
NETS = {
    "torus": "torus penalty, fixed points",
    "torus_trained": "torus penalty, trained points",
    "l1_matched": "constant penalty, the torus penalty's mean coefficient",
    "shuffled": "the torus coefficients, permuted at random",
    "none": "no penalty: magnitude pruning alone",
}
CUTS = ("all", "recurrent")
BLOCK_ORDERS = ("manifold", "random")
REPORT_SECONDS = 0.25
POINTS_SEED = 2000  # added to a run's seed, apart from the streams of weights and data


@dataclass(frozen=True)
class Config:
    """One run. `schedule` is the sparsity at the start of each epoch; `sizes` go to the task."""

    task: str
    net: str
    seed: int
    sizes: dict[str, int]
    schedule: list[float]
    batches: int  # per epoch
    lr: float
    strength: float  # multiplies the mean over the entries of W_hh
    clip: float | None = None  # gradient norm
    frozen_epochs: int = 0  # the last ones, in which trained points rest
    device: str = "cpu"
    cut: str = "all"  # what the schedule is of: all weights of the task together, or its "recurrent" ones alone
    block: int = 1  # side of the blocks that recurrent weights are cut in
    block_order: str = "manifold"  # of the torus' points, or "random"

    def __post_init__(self) -> None:
        for name, value, known in (("task", self.task, TASKS), ("net", self.net, NETS), ("cut", self.cut, CUTS),
                                   ("block_order", self.block_order, BLOCK_ORDERS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    def folder(self, root: Path) -> Path:
        """Where this run is kept: another configuration has another folder."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]
        return root / f"{self.task}-{self.net}-seed{self.seed}-{digest}"


@dataclass
class Result:
    """What a run gives. `history` has an entry for each finished epoch."""

    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0  # of training and evaluation, all parts of an interrupted run together
    peak_mib: float = 0.0  # of the process (CPU) or of the GPU's memory
    collapsed: str | None = None  # how the run ended, if not well
    environment: dict[str, Any] = field(default_factory=dict)  # where it began
    references: dict[str, float] = field(default_factory=dict)  # errors of simple answers to the same tests


def finished(config: Config, folder: Path) -> Result | None:
    """The result of a run that has nothing left to train, without making its net."""
    loaded = checkpoint.load(folder)
    result = Result(**loaded[1]["result"]) if loaded is not None else Result()
    return result if len(result.history) == len(config.schedule) else None


class Collapse(Exception):
    """The loss or the weights are no longer finite."""


class Run:
    """One net in training. Making it loads the checkpoint in `folder`, if there is one."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        # Every sum is then taken in the same order, whatever else the machine does.
        torch.set_num_threads(1)
        random.seed(config.seed)
        self.task = TASKS[config.task](**config.sizes, seed=config.seed, device=config.device)
        # All nets of a seed have the same points, so that the controls can be drawn on the torus too.
        generator = torch.Generator(config.device).manual_seed(POINTS_SEED + config.seed)
        self.torus = mk.regularize(
            self.task.model, self.task.targets(), manifold="torus", strength=config.strength,
            trainable=config.net == "torus_trained", generator=generator,
        )
        self.penalty = {
            "torus": lambda: self.torus,
            "torus_trained": lambda: self.torus,
            "l1_matched": self.torus.matched,
            "shuffled": lambda: self.torus.shuffled(generator),
            "none": lambda: None,
        }[config.net]()
        self.points = list(self.torus.parameters())  # empty where they are fixed
        self.optimizer = torch.optim.Adam([*self.task.model.parameters(), *self.points], lr=config.lr)
        self.pruner = self._pruner(generator)
        self.result = Result()
        self._load()

    def neurons_order(self) -> Tensor:
        """The hidden neurons in manifold order of the torus' points, (n,) int64."""
        _, regularizer = next(iter(self.torus.items()))
        return mk.manifold_order(regularizer.rows.points.detach(), "torus")

    def _pruner(self, generator: torch.Generator) -> mk.MagnitudePruner:
        config = self.config
        recurrent = [(m, name) for m, name in self.task.pruned() if name.startswith("weight_hh")]
        if not recurrent and (config.cut == "recurrent" or config.block > 1):
            raise ValueError(f"cut and block must be 'all' and 1 for {config.task}, whose net holds no weight_hh of its "
                             f"own, got {config.cut!r} and {config.block}")
        targets = recurrent if config.cut == "recurrent" else self.task.pruned()
        blocks = {}
        if config.block > 1:
            order = self.neurons_order()
            if config.block_order == "random":
                order = torch.randperm(len(order), generator=generator, device=order.device)
            blocks = {"block": (config.block,) * 2, "order": dict.fromkeys(recurrent, (order, order))}
        return mk.MagnitudePruner(targets, optimizer=self.optimizer, **blocks)

    # -- training --

    def train(self, report: Callable[[dict[str, Any]], None] = lambda progress: None,
              after_epoch: Callable[[int], None] = lambda epoch: None) -> Result:
        """Trains the epochs that are left; `report` gets a dict about four times a second. after_epoch: called with
        the number of epochs done, before they are saved: again, if killed in between, with the same net."""
        config, result = self.config, self.result
        if not result.environment:
            result.environment, result.references = environment(), self.task.references()
        begun, first = time.perf_counter(), len(result.history)
        spent = result.seconds
        for epoch in range(first, len(config.schedule)):
            try:
                entry = self._epoch(epoch, report, begun, first)
            except Collapse as collapse:
                result.collapsed = str(collapse)
                return result
            result.history.append(entry)
            result.seconds = spent + time.perf_counter() - begun
            result.peak_mib = max(result.peak_mib, _peak_mib(config.device))
            after_epoch(epoch + 1)
            self._save()
        return result

    def _epoch(self, epoch: int, report: Callable, begun: float, first: int) -> dict[str, float]:
        config, task, model = self.config, self.task, self.task.model
        self.pruner.step_to(config.schedule[epoch])
        frozen = epoch >= len(config.schedule) - config.frozen_epochs
        for points in self.points:
            points.requires_grad_(not frozen)
        error = self.result.history[-1]["error"] if self.result.history else None
        losses: list[Tensor] = []
        reported = 0.0
        for batch in task.batches(config.batches):
            self.optimizer.zero_grad()
            loss = task.loss(batch)
            penalty = self.penalty() if self.penalty is not None else torch.zeros_like(loss)
            (loss + penalty).backward()
            if config.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            for points in self.points:
                if not frozen:
                    points.grad *= 0.99**epoch  # as the authors damp it
            self.optimizer.step()
            losses.append(torch.stack((loss.detach(), penalty.detach())))
            if len(losses) == config.batches or time.perf_counter() - reported > REPORT_SECONDS:
                _check(losses, epoch, config.batches)  # reads the losses, so on a GPU it waits for them
                reported = time.perf_counter()
                done = (epoch - first) * config.batches + len(losses)
                whole = (len(config.schedule) - first) * config.batches
                report({
                    "step": epoch * config.batches + len(losses),
                    "steps": len(config.schedule) * config.batches,
                    "loss": losses[-1][0].item(), "error": error, "sparsity": config.schedule[epoch],
                    "left": (reported - begun) * (whole - done) / done,
                })
        if not all(p.isfinite().all() for p in model.parameters()):
            raise Collapse(f"weights became non-finite in epoch {epoch + 1}")
        loss, penalty = torch.stack(losses).double().mean(dim=0).tolist()
        density = task.recurrent()[1].double().mean().item()
        return {
            "epoch": epoch + 1, "sparsity": config.schedule[epoch], "density": density, "loss": loss,
            "penalty": penalty, "error": task.error(),
        }

    # -- checkpoints --

    def _parts(self) -> dict[str, torch.nn.Module]:
        # The model's state has the masks; the torus' points are kept beside a control's coefficients.
        parts = {"model": self.task.model, "torus": self.torus}
        return parts if self.penalty is None else {**parts, "penalty": self.penalty}

    def _save(self) -> None:
        tensors = {"rng.torch": torch.get_rng_state(), "rng.task": self.task.generator.get_state()}
        if self.config.device != "cpu":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.config.device)
        for name, module in self._parts().items():
            tensors |= checkpoint.flatten(name, module.state_dict())
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= checkpoint.flatten(f"optimizer.{i}", state)
        # A torus net's penalty is the torus itself: safetensors wants every tensor to be its own.
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        info = {"config": asdict(self.config), "result": asdict(self.result), "random": random.getstate()}
        checkpoint.save(self.folder, tensors, info)

    def _load(self) -> None:
        loaded = checkpoint.load(self.folder)
        if loaded is None:
            return
        tensors, info = loaded
        if info["config"] != asdict(self.config):
            message = f"the checkpoint in {self.folder} must be of this configuration, got another; delete it"
            raise RuntimeError(message)
        for name, module in self._parts().items():
            module.load_state_dict(checkpoint.select(name, tensors))
        state = self.optimizer.state_dict()  # its settings come from the configuration
        count = len(state["param_groups"][0]["params"])
        moments = {i: checkpoint.select(f"optimizer.{i}", tensors) for i in range(count)}
        state["state"] = {i: each for i, each in moments.items() if each}  # frozen points have none
        self.optimizer.load_state_dict(state)
        torch.set_rng_state(tensors["rng.torch"])
        self.task.generator.set_state(tensors["rng.task"])
        if self.config.device != "cpu":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.config.device)
        version, numbers, gauss = info["random"]
        random.setstate((version, tuple(numbers), gauss))
        self.result = Result(**info["result"])


def _check(losses: list[Tensor], epoch: int, batches: int) -> None:
    """Raises Collapse at the first loss or penalty of the epoch that is not finite."""
    finite = torch.stack(losses).isfinite().all(dim=1)
    if not finite.all():
        step = epoch * batches + int((~finite).int().argmax()) + 1
        raise Collapse(f"loss became non-finite at step {step} (epoch {epoch + 1})")


def _peak_mib(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere
