"""Finds finished runs and reads from their checkpoints what the paper's figures show of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import moduli_kernels as mk

from ..training import checkpoint, nets
from ..training.config import Config, Result, task_class

PRUNE = "python -m examples.navigation --net torus --cut 0.9"  # named where a run is missing


class Missing(Exception):
    """A figure cannot be drawn: no run suits, or a package is not installed."""


@dataclass(eq=False)
class Saved:
    """A finished run as its checkpoint holds it. Neither its data sets nor its net are made."""

    folder: Path
    config: Config
    result: Result

    def __post_init__(self) -> None:
        self.sparsity = self.config.schedule[-1]
        self.manifold = mk.manifold(nets.manifold_of(self.config.net))

    def first(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the first recurrent weight: W_hh (n, n), its mask (True = kept) and points (n, ambient_dim).

        Of a weight with gate blocks, the first block is returned.
        """
        tensors, _ = checkpoint.load(self.folder)
        tail = ".rows.points"
        keys = (key for key in tensors if key.startswith("geometry.") and key.endswith(tail) and "weight_hh" in key)
        key = min(keys).removeprefix("geometry.regularizers.").removesuffix(tail)
        model = checkpoint.select("model", tensors)
        # The regularizer's key is the weight's name with its dots replaced.
        name = next(name for name in model if name.replace(".", "_") == key)
        points, weight = tensors[f"geometry.regularizers.{key}{tail}"], model[name]
        mask = model.get(f"{name}_mask", weight != 0).bool()
        n = len(points)
        return weight[:n], mask[:n], points

    def in_words(self) -> str:
        """Names task, net, seed, error and sparsity."""
        error = task_class(self.config.task).with_unit(self.result.history[-1]["error"])
        return f"{self.config.task}, {self.config.net}, seed {self.config.seed}: {error} at {100 * self.sparsity:g} %"

    def record(self) -> dict[str, Any]:
        """Returns what a figure's JSON file says about the run."""
        return {"folder": self.folder.name, "config": self.config.described(), "end": self.result.history[-1],
                "trained_at": self.result.environment}


def saved(folder: Path) -> Saved:
    """Returns the finished run in a folder. Raises Missing, which says what is wrong with it."""
    path = folder / checkpoint.NAME
    if not path.is_file():
        raise Missing(f"run must be a folder with a {checkpoint.NAME}, got {folder}; train a net, e.g. with {PRUNE}")
    try:
        info = checkpoint.load_info(folder)
        made = Saved(folder, Config(**info["config"]), Result(**info["result"]))
    except ImportError:
        raise Missing("checkpoints need safetensors, which is not installed; run pip install safetensors") from None
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise Missing(f"run must be a checkpoint of this trainer, got {path} ({error}); train the net again") from error
    done, of = len(made.result.history), len(made.config.schedule)
    if done < of:
        raise Missing(f"run must be finished, got {folder} after {done} of {of} epochs; let it go on")
    return made


def finished_runs(root: Path) -> list[Saved]:
    """Returns all finished runs below `root`, the newest first. Runs of another version are left out."""
    found = []
    for path in sorted(root.glob(f"*/{checkpoint.NAME}"), key=lambda p: p.stat().st_mtime_ns, reverse=True):
        try:
            found.append(saved(path.parent))
        except Missing:
            continue
    return found


def newest(found: list[Saved], suits: Callable[[Saved], bool], what: str, train: str) -> Saved:
    """Returns the first run that suits.

    Args:
        what: says in words which run is needed, for Missing.
        train: a command that trains one, for Missing.
    """
    for run in filter(suits, found):
        return run
    raise Missing(f"the figure needs {what}, got none; train one, e.g. with {train}, or name its folder with --run")
