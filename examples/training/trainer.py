"""Trains a task while pruning it: epochs, schedule, penalty, evaluation, and a checkpoint after every epoch.

A run that was killed at any moment and is started again with the same configuration goes on from its last checkpoint.
On the CPU it ends bitwise where an unbroken run ends, since the checkpoint holds weights, masks, points, the
optimizer's state and every random state.
"""

from __future__ import annotations

import contextlib
import functools
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moduli_kernels as mk
from moduli_kernels.env_report import environment

from . import checkpoint, nets
from .config import Config, Result, finished, task_class
from .cuda_graph import GraphedStep
from .logs import TensorBoardLog
from .timing import StepClock

REPORT_SECONDS = 0.25  # between two reports of a run's progress
POINTS_SEED = 2000  # added to a run's seed, so that points are not drawn from the numbers of weights or data
LOTTERY_SEED = 3000  # the same for the fresh weights of a lottery run


class Collapse(Exception):
    """The loss or the weights are no longer finite."""


class Run:
    """One net in training. It loads the checkpoint in `folder`, if there is one.

    A lottery run looks for the checkpoint of its antecedent beside `folder`, and raises RuntimeError without it.

    Args:
        logs: train() writes TensorBoard logs into folder/logs.

    Attributes:
        task, geometry, penalty, pruner, optimizer: what is trained; see task.py and nets.py.
        points: the trained points, empty where points are fixed.
        result: what there is of the run so far.
    """

    def __init__(self, config: Config, folder: Path, *, logs: bool = False) -> None:
        self.config, self.folder, self.logs = config, folder, logs
        torch.set_num_threads(1)  # so that every sum is taken in the same order, whatever else the machine does
        torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
        random.seed(config.seed)
        self.task = task_class(config.task)(**config.options, seed=config.seed, device=config.device)
        generator = torch.Generator(config.device).manual_seed(POINTS_SEED + config.seed)
        choice = {"strength": config.strength, "reduction": config.reduction, "r3": config.r3, "generator": generator}
        self.geometry = nets.geometry(self.task, config.net, config.inhibitor, **choice)
        self.penalty = nets.penalty(self.geometry, self.task, config.net, **choice)
        self.points = list(self.geometry.parameters())
        groups = [{"params": list(self.task.model.parameters())}]
        if self.points:
            groups.append({"params": self.points, "weight_decay": 0.0})  # decay would pull points to the origin
        self.optimizer = self.task.optimizer(groups, config.lr)
        for group in self.optimizer.param_groups if config.graph else ():
            group["capturable"] = True
        self.pruner = self._pruner(generator)
        self.clock = StepClock("cpu" if config.graph else config.device)  # a graph has no room for events
        self.result = Result()
        if not self._load() and config.lottery:
            self._inherit()

    def neurons_order(self) -> Tensor:
        """Returns the neurons of the first recurrent weight in manifold order of their points, (n,) int64."""
        _, regularizer = next(iter(self.geometry.items()))
        return mk.manifold_order(regularizer.rows.points.detach(), regularizer.manifold)

    def _pruner(self, generator: torch.Generator) -> mk.MagnitudePruner:
        config = self.config
        recurrent = [(m, name) for m, name in self.task.pruned() if name.startswith("weight_hh")]
        targets = recurrent if config.cut == "recurrent" else self.task.pruned()
        blocks = {}
        if config.block > 1:
            if len(recurrent) > 1:
                raise ValueError(f"block must be 1 for {config.task}, which has more than one recurrent weight, got "
                                 f"{config.block}")
            order = self.neurons_order()
            if config.block_order == "random":
                order = torch.randperm(len(order), generator=generator, device=order.device)
            blocks = {"block": (config.block,) * 2, "order": dict.fromkeys(recurrent, (order, order))}
        return mk.MagnitudePruner(targets, optimizer=self.optimizer, **blocks)

    def _inherit(self) -> None:
        """Takes masks and points from the antecedent, and draws fresh weights."""
        antecedent = self.config.antecedent()
        folder = antecedent.folder(self.folder.parent)
        if finished(antecedent, folder) is None:
            raise RuntimeError(f"the lottery needs the finished run in {folder}, got none; train that first")
        tensors, _ = checkpoint.load(folder)
        self._load_parts(tensors)
        generator = torch.Generator(self.config.device).manual_seed(LOTTERY_SEED + self.config.seed)
        mk.reinitialize_(self.task.model, self.pruner, generator=generator)

    # -- training --

    def train(self, report: Callable[[dict[str, Any]], None] = lambda progress: None,
              after_epoch: Callable[[int], None] = lambda epoch: None) -> Result:
        """Trains the epochs that are left and returns the result of the whole run.

        Args:
            report: called about four times a second with a dict: step, steps, loss, error (after the last epoch, or
                None), sparsity, left (seconds).
            after_epoch: called with the number of epochs done, before they are saved. If the process is killed in
                between, the next one calls it again with the same net.
        """
        config, result = self.config, self.result
        if not result.environment:
            result.environment, result.references = environment(), self.task.references()
        begun, first = time.perf_counter(), len(result.history)
        spent, parts = result.seconds, dict(result.parts)
        log = TensorBoardLog(self.folder / "logs", first) if self.logs else None
        for epoch in range(first, len(config.schedule)):
            try:
                entry = self._epoch(epoch, report, begun, first)
            except Collapse as collapse:
                result.collapsed = str(collapse)
                return result
            result.history.append(entry)
            if log is not None:
                log.write(entry, self.clock.seconds())
            result.seconds = spent + time.perf_counter() - begun
            result.parts = {name: parts.get(name, 0.0) + more for name, more in self.clock.seconds().items()}
            result.peak_mib = max(result.peak_mib, _peak_mib(config.device))
            after_epoch(epoch + 1)
            self._save()
        return result

    def _epoch(self, epoch: int, report: Callable, begun: float, first: int) -> dict[str, float]:
        config, task, model, clock = self.config, self.task, self.task.model, self.clock
        sparsity, epochs = config.sparsities()[epoch], len(config.schedule)
        with warnings.catch_warnings():
            # The paper ranks the weights of all layers together.
            warnings.filterwarnings("ignore", ".*because weights are ranked over all targets", UserWarning)
            self.pruner.step_to(sparsity)
        resting = config.lottery or epoch >= epochs - config.frozen_epochs
        for points in self.points:
            points.requires_grad_(not resting)
        error = self.result.history[-1]["error"] if self.result.history else None
        losses: list[Tensor] = []
        reported = 0.0
        batches = iter(task.batches(config.batches))
        damping = None if resting else config.point_damping**epoch
        step = functools.partial(self._step, damping=damping)
        if config.graph:
            step = GraphedStep(step, self.optimizer)  # a new one, with this epoch's masks and learning rate
        for _ in range(config.batches):
            clock.begin()
            batch = next(batches)
            clock.end("data")
            self._set_learning_rate((epoch * config.batches + len(losses)) / (epochs * config.batches))
            losses.append(step(batch))
            if len(losses) == config.batches or time.perf_counter() - reported > REPORT_SECONDS:
                _check(losses, epoch, config.batches)  # reads the losses, so on a GPU it waits for them
                reported = time.perf_counter()
                done = (epoch - first) * config.batches + len(losses)
                whole = (epochs - first) * config.batches
                report({
                    "step": epoch * config.batches + len(losses), "steps": epochs * config.batches,
                    "loss": losses[-1][0].item(), "error": error, "sparsity": sparsity,
                    "left": (reported - begun) * (whole - done) / done,
                })
        if not all(p.isfinite().all() for p in model.parameters()):
            raise Collapse(f"weights became non-finite in epoch {epoch + 1}")
        loss, penalty = torch.stack(losses).double().mean(dim=0).tolist()
        masks = [mask for _, mask in task.recurrent()]
        density = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        return {"epoch": epoch + 1, "sparsity": sparsity, "density": density, "loss": loss, "penalty": penalty,
                "lr": self.optimizer.param_groups[0]["lr"], **task.measures()}

    def _step(self, batch: Any, damping: float | None) -> Tensor:
        """Takes one step and returns (loss, penalty). The host reads no tensor here, so that a CUDA graph can hold it.

        Args:
            damping: multiplies the gradients of trained points; None where they rest.
        """
        config, clock = self.config, self.clock
        self.optimizer.zero_grad()
        with self._precision():
            loss = self.task.loss(batch)
        extra = self.task.extra_penalty()
        clock.end("forward")
        (loss if extra is None else loss + config.strength * extra).backward()
        clock.end("backward")
        penalty = torch.zeros_like(loss)
        if self.penalty is not None:
            penalty = self.penalty()
            penalty.backward()
            if damping is not None:
                for points in self.points:
                    points.grad *= damping
        clock.end("penalty")
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), config.clip)
        self.optimizer.step()
        clock.end("update")
        return torch.stack((loss.detach().float(), penalty.detach().float()))

    def _set_learning_rate(self, done: float) -> None:
        rate = self.task.learning_rate(self.config.lr, done, self.result.history)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.config.precision != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.config.device).type, torch.bfloat16)

    # -- checkpoints --

    def _modules(self) -> dict[str, torch.nn.Module]:
        # The masks are in the model's state. A control's penalty holds coefficients, so the points are saved apart.
        modules = {"model": self.task.model, "geometry": self.geometry}
        return modules if self.penalty is None else {**modules, "penalty": self.penalty}

    def _load_parts(self, tensors: dict[str, Tensor]) -> None:
        for name, module in self._modules().items():
            module.load_state_dict(checkpoint.select(name, tensors))

    def _save(self) -> None:
        tensors = {"rng.torch": torch.get_rng_state(), "rng.task": self.task.generator.get_state()}
        if self.config.device != "cpu":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.config.device)
        for name, module in self._modules().items():
            tensors |= checkpoint.flatten(name, module.state_dict())
        for i, state in self.optimizer.state_dict()["state"].items():
            kept = {key: value for key, value in state.items() if value is not None}  # SGD without momentum: None
            tensors |= checkpoint.flatten(f"optimizer.{i}", kept)
        # A moduli net's penalty is its geometry, and safetensors takes no two tensors with the same memory.
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        info = {"config": asdict(self.config), "result": asdict(self.result), "random": random.getstate()}
        checkpoint.save(self.folder, tensors, info)

    def _load(self) -> bool:
        """Loads the checkpoint and returns whether there was one."""
        loaded = checkpoint.load(self.folder)
        if loaded is None:
            return False
        tensors, info = loaded
        if Config(**info["config"]).key != self.config.key:
            message = f"the checkpoint in {self.folder} must be of this configuration, got another; delete it"
            raise RuntimeError(message)
        self._load_parts(tensors)
        state = self.optimizer.state_dict()  # its settings stay those of the configuration
        count = sum(len(group["params"]) for group in state["param_groups"])
        moments = {i: checkpoint.select(f"optimizer.{i}", tensors) for i in range(count)}
        state["state"] = {i: each for i, each in moments.items() if each}  # points that rest have no moments
        self.optimizer.load_state_dict(state)
        torch.set_rng_state(tensors["rng.torch"])
        self.task.generator.set_state(tensors["rng.task"])
        if self.config.device != "cpu":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.config.device)
        version, numbers, gauss = info["random"]
        random.setstate((version, tuple(numbers), gauss))
        self.result = Result(**info["result"])
        return True


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
