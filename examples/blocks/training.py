"""Trains one trial: until its net has converged, then through the cuts.

Training goes in legs: from one measurement of the error to the next, or from one stop of the cut to the next. A
checkpoint follows every leg. A trial that was killed and is started again goes on from the last one and, on the CPU,
ends bitwise where an unbroken one ends. It loses at most one leg, which is 400 steps.
"""

from __future__ import annotations

import functools
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import moduli_kernels as mk
from moduli_kernels.env_report import environment

from ..training import checkpoint, files
from ..training.trainer import Collapse
from .penalties import Geometry, filled, learned_order, penalty, start_mask
from .plan import SIDE, Protocol, Trial

WEIGHT = "weight_hh_l0"
MASKS = "masks.npz"


@dataclass
class Progress:
    """What there is of a trial so far. `seconds` are CPU seconds of training on one thread, without measurements.

    legs: how many legs are done.
    steps: training steps so far, those of the dense net that a cut goes on from not counted.
    seconds: what they took.
    history: [steps, seconds, error] at every measurement of a net that is trained until it has converged.
    converged: whether it has; None for cuts.
    error: of the dense net or of a net that was sparse from the start, at the end.
    stops: for each stop of a cut: sparsity, density, filled (share of blocks), error, steps, seconds.
    collapsed: says how the training ended, if not well.
    done: whether there is nothing left to train.
    """

    legs: int = 0
    steps: int = 0
    seconds: float = 0.0
    history: list[list[float]] = field(default_factory=list)
    converged: bool | None = None
    error: float | None = None
    stops: list[dict[str, float]] = field(default_factory=list)
    collapsed: str | None = None
    done: bool = False


def rate_after(errors: list[float], protocol: Protocol) -> float | None:
    """Returns what multiplies the learning rate after these measurements, or None once the net has converged.

    The rate is halved as torch.optim.lr_scheduler.ReduceLROnPlateau halves it; see Protocol for the rule.
    """
    best, waited, halved = float("inf"), 0, 0
    for error in errors:
        if error < best * (1 - protocol.tolerance):
            best, waited = error, 0
        else:
            waited += 1
        if waited == protocol.patience:
            halved, waited = halved + 1, 0
    return None if halved > protocol.halvings else 0.5**halved


class Training:
    """One trial in training. It loads the checkpoint in its folder, if there is one.

    Args:
        trial: what is trained. A cut needs the checkpoint of its dense trial.
        root: the folder of all checkpoints.
    """

    def __init__(self, trial: Trial, root: Path) -> None:
        torch.set_num_threads(1)  # so that every sum is taken in the same order, whatever else the machine does
        self.trial, self.protocol, self.folder = trial, trial.protocol, trial.folder(root)
        self.task = self.protocol.task(**self.protocol.options, seed=trial.seed)
        self.rnn: Any = self.task.model.rnn
        self.geometry = Geometry(trial, self.rnn.hidden_size)
        self.penalty = penalty(trial, self.geometry)
        self.optimizer = self.task.optimizer([{"params": list(self.task.model.parameters())}], self.protocol.lr)
        self.progress = Progress()
        self.order = self.geometry.order
        self.pruner: mk.MagnitudePruner | None = None
        saved = checkpoint.load(self.folder)
        if trial.kind in ("blocks", "scattered", "uncut"):
            self._begin_cut(saved, root)
        elif trial.kind == "start":
            self._begin_sparse()
        if saved is not None:
            self._load(saved[0])
            self.progress = Progress(**saved[1]["progress"])

    def _begin_cut(self, saved: tuple[dict[str, Tensor], dict[str, Any]] | None, root: Path) -> None:
        """Takes over the dense net, and makes the pruner."""
        dense = self.trial.dense()
        found = checkpoint.load(dense.folder(root))
        if found is None or not found[1]["progress"]["done"]:
            raise RuntimeError(f"{self.trial.in_words()} needs the trained net of {dense.in_words()}, got none in "
                               f"{dense.folder(root)}; train that first")
        self._load(found[0])
        self.progress.collapsed = found[1]["progress"]["collapsed"]
        if self.trial.family == "learned_order":
            self.order = learned_order(getattr(self.rnn, WEIGHT))
        self.rnn.set_order(WEIGHT, self.order)
        blocks = {}
        if self.trial.kind == "blocks":
            blocks = {"block": (SIDE, SIDE), "order": {(self.rnn, WEIGHT): (self.order, self.order)}}
        self.pruner = mk.MagnitudePruner([(self.rnn, WEIGHT)], optimizer=self.optimizer, **blocks)

    def _begin_sparse(self) -> None:
        """Gives the net its mask, and scales the first weights to the fan-in that is left."""
        mask = start_mask(self.trial, self.geometry)
        with torch.no_grad():
            getattr(self.rnn, WEIGHT).div_(mask.float().mean().sqrt())
        self.rnn.set_mask(WEIGHT, mask)
        self.rnn.set_order(WEIGHT, self.order)

    # -- training --

    def train(self) -> Progress:
        """Trains what is left."""
        try:
            if self.progress.collapsed is None and not self.progress.done:
                if self.pruner is None:
                    self._until_converged()
                else:
                    self._through_the_cuts(self.pruner)
        except Collapse as collapse:
            self.progress.collapsed = str(collapse)
        self.progress.done = True
        self._save()
        return self.progress

    def _until_converged(self) -> None:
        protocol, progress = self.protocol, self.progress
        while True:
            rate = rate_after([error for _, _, error in progress.history], protocol)
            progress.converged = rate is None
            if rate is None or progress.steps >= protocol.most:
                break
            self._leg(protocol.every, rate * protocol.lr)
            progress.history.append([progress.steps, round(progress.seconds, 2), _digits(self.task.error())])
            self._save()
        self._leg(protocol.settle, (rate or 0.5**protocol.halvings) * protocol.lr, to_zero=True)
        progress.error = _digits(self.task.error())

    def _through_the_cuts(self, pruner: mk.MagnitudePruner) -> None:
        protocol, progress = self.protocol, self.progress
        before = 0.0
        for number, (stop, events) in enumerate(zip(protocol.stops, protocol.events, strict=True)):
            if progress.legs == 2 * number:
                for event in range(1, events + 1):
                    if self.trial.kind != "uncut":
                        pruner.step_to(before + (stop - before) * event / events)
                    self._steps(protocol.between, protocol.cut_lr)
                progress.legs += 1
                self._save()
            if progress.legs == 2 * number + 1:
                self._leg(protocol.settle, protocol.cut_lr, to_zero=True, penalized=False)
                mask = getattr(self.rnn, f"{WEIGHT}_mask")
                progress.stops.append({
                    "sparsity": stop, "density": float(mask.double().mean()), "filled": filled(mask, self.order),
                    "error": _digits(self.task.error()), "steps": progress.steps, "seconds": round(progress.seconds, 2),
                })
                self._keep(stop, mask)
                self._save()
            before = stop

    def _leg(self, steps: int, lr: float, *, to_zero: bool = False, penalized: bool = True) -> None:
        self._steps(steps, lr, to_zero=to_zero, penalized=penalized)
        self.progress.legs += 1

    def _steps(self, steps: int, lr: float, *, to_zero: bool = False, penalized: bool = True) -> None:
        """Takes so many steps.

        Args:
            to_zero: the rate falls linearly to 0.
            penalized: whether the penalty acts.
        """
        weight, parameters = getattr(self.rnn, WEIGHT), list(self.task.model.parameters())
        begun = time.process_time()
        losses: list[Tensor] = []
        for i, batch in enumerate(self.task.batches(steps)):
            for group in self.optimizer.param_groups:
                group["lr"] = lr * (1 - i / steps if to_zero else 1)
            self.optimizer.zero_grad()
            loss = self.task.loss(batch)
            loss.backward()
            if penalized and self.penalty is not None:
                (self.trial.strength * self.penalty(weight)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, self.protocol.clip)
            self.optimizer.step()
            losses.append(loss.detach())
        self.progress.steps += steps
        self.progress.seconds += time.process_time() - begun
        if not torch.stack(losses).isfinite().all() or not all(p.isfinite().all() for p in parameters):
            raise Collapse(f"loss or weights became non-finite before step {self.progress.steps}")

    # -- files --

    def _keep(self, stop: float, mask: Tensor) -> None:
        """Adds a mask to the trial's file of masks, which has the order of the neurons too."""
        path = self.folder / MASKS
        kept = dict(np.load(path)) if path.exists() else {"order": self.order.numpy()}
        kept[f"mask_{stop:g}"] = np.packbits(mask.numpy(), axis=1)
        with files.whole_file(path) as file:
            np.savez_compressed(file, **kept)

    def _save(self) -> None:
        tensors = {"rng.task": self.task.generator.get_state()}
        tensors |= checkpoint.flatten("model", self.task.model.state_dict())
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= checkpoint.flatten(f"optimizer.{i}", state)
        checkpoint.save(self.folder, tensors, {"trial": self.trial.described(), "progress": asdict(self.progress)})

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self.task.model.load_state_dict(checkpoint.select("model", tensors))
        state = self.optimizer.state_dict()
        count = sum(len(group["params"]) for group in state["param_groups"])
        moments = {i: checkpoint.select(f"optimizer.{i}", tensors) for i in range(count)}
        state["state"] = {i: each for i, each in moments.items() if each}
        self.optimizer.load_state_dict(state)
        self.task.generator.set_state(tensors["rng.task"])


def masks_of(folder: Path) -> tuple[np.ndarray, dict[float, np.ndarray]] | None:
    """Reads a cut's order of the neurons, (n,) int64, and its masks: sparsity -> (n, n) bool; None without a file."""
    path = folder / MASKS
    if not path.exists():
        return None
    with np.load(path) as stored:
        order = stored["order"]
        packed = {float(key.removeprefix("mask_")): stored[key] for key in stored if key.startswith("mask_")}
    return order, {stop: np.unpackbits(bits, axis=1, count=len(order)).astype(bool) for stop, bits in packed.items()}


def train(trial: Trial, root: Path) -> dict[str, Any]:
    """Trains a trial, or reads what it gave, and returns its record for the ledger.

    Raises Held if another process trains it.
    """
    with checkpoint.only_writer(trial.folder(root)):
        training = Training(trial, root)
        progress = training.train()
    return {"key": trial.key, "config": trial.described(), **asdict(progress),
            "seconds": round(progress.seconds, 2), "references": training.task.references(),
            "environment": _environment(), "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


@functools.cache
def _environment() -> dict[str, Any]:
    return environment()  # looks for compilers and asks git: half a second


def _digits(error: float) -> float:
    return float(f"{error:.6g}")
