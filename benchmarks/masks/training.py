"""Trains nets for their masks: what patterns do penalties and pruning modes leave, and at what error?

    python -m benchmarks.train_masks [--jobs 1] [--only quality|masks]

masks: navigation, W_hh alone cut to 90, 95 and 98 % on the way, for each penalty and pruning mode; each run's masks
go to benchmarks/masks/<run>.npz with the neurons' points. quality: what blocks cost, at 90 %, over 3 seeds. Errors go
to benchmarks/masks/runs.json; a run that stands there is not trained again, one that was killed goes on from its last
epoch. `python -m benchmarks.mask_table` counts the blocks that the masks fill.
"""
from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from examples.config import Config
from examples.trainer import Run
from moduli_kernels import linear_schedule

MASKS = Path(__file__).resolve().parent / "masks"
RUNS = MASKS / "runs.json"
CHECKPOINTS = Path(__file__).resolve().parent.parent / "examples" / "runs"  # git-ignored

SPARSITIES = (0.9, 0.95, 0.98)
EPOCHS_AT_EACH = 4  # the last ones measure what is left after some training at that sparsity
BEFORE = [0.0] * 12 + linear_schedule(0.9, 13)
WORLD = {"landmarks": 128, "width_cm": 24, "batch": 50, "steps": 20}
PENALTIES = {"torus-0.1": ("torus", 0.1), "torus-0.5": ("torus", 0.5), "torus-2": ("torus", 2.0),
             "l1_matched-0.5": ("l1_matched", 0.5), "shuffled-0.5": ("shuffled", 0.5), "none": ("none", 0.0)}
BLOCK = 16  # side of the blocks of the pruning mode "block"


def config(penalty: str, hidden: int, sparsities: tuple[float, ...], seed: int = 0, **settings) -> Config:
    net, strength = PENALTIES[penalty]
    schedule = BEFORE + [sparsity for sparsity in sparsities for _ in range(EPOCHS_AT_EACH)]
    return Config(task="navigation", net=net, seed=seed, options={**WORLD, "hidden": hidden}, schedule=schedule,
                  batches=85, lr=2e-3, strength=strength, cut="recurrent", **settings)


def runs(only: str | None) -> dict[str, Config]:
    """Name -> configuration, in the order they are trained."""
    made = {}
    if only != "quality":
        for penalty in PENALTIES:
            made[f"{penalty}-n768-plain"] = config(penalty, 768, SPARSITIES)
            made[f"{penalty}-n768-block"] = config(penalty, 768, SPARSITIES, block=BLOCK)
    if only != "masks":
        for seed in range(3):
            base = config("torus-0.5", 512, SPARSITIES[:1], seed)
            made[f"quality-n512-block1-seed{seed}"] = base
            for block in (8, 16, 32):
                for order in ("manifold", "random"):
                    name = f"quality-n512-block{block}-{order}-seed{seed}"
                    made[name] = replace(base, block=block, block_order=order)
    if only != "quality":
        made["torus-0.5-n1536-plain"] = config("torus-0.5", 1536, SPARSITIES)
        made["torus-0.5-n1536-block"] = config("torus-0.5", 1536, SPARSITIES, block=BLOCK)
    return made


def train(name: str, its: Config) -> None:
    """One run to its end; records it."""
    if name in recorded():
        return
    folder = its.folder(CHECKPOINTS)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(its, folder)
    masks: dict[str, np.ndarray] = {}
    partial = folder / "masks.npz"
    if partial.exists():
        with np.load(partial) as stored:
            masks |= dict(stored)

    def keep(epoch: int) -> None:
        """The mask as it is at the last epoch of each sparsity."""
        if epoch < len(BEFORE) or epoch < len(its.schedule) and its.schedule[epoch] == its.schedule[epoch - 1]:
            return
        ((_, mask),) = run.task.recurrent()
        masks[f"mask_{round(100 * its.schedule[epoch - 1])}"] = np.packbits(mask.cpu().numpy(), axis=1)
        _write(partial, masks)

    result = run.train(after_epoch=keep)
    _, regularizer = next(iter(run.geometry.items()))
    if not name.startswith("quality"):
        _write(MASKS / f"{name}.npz", masks | {"points": regularizer.rows.points.cpu().numpy()})
    _record(name, {"config": asdict(its), "history": result.history, "seconds": result.seconds,
                   "collapsed": result.collapsed, "references": result.references, "environment": result.environment})
    print(f"{name}: error {result.history[-1]['error']:.1f} cm, {result.seconds / 60:.1f} minutes", flush=True)


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.partial")
    with open(unfinished, "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(unfinished, path)


def recorded() -> dict[str, Any]:
    return json.loads(RUNS.read_text()) if RUNS.exists() else {}


def _record(name: str, entry: dict[str, Any]) -> None:
    RUNS.parent.mkdir(parents=True, exist_ok=True)
    with open(RUNS.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        unfinished = RUNS.with_suffix(".partial")
        unfinished.write_text(json.dumps(recorded() | {name: entry}, indent=1) + "\n")
        os.replace(unfinished, RUNS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_masks", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="nets trained at once, one core each")
    parser.add_argument("--only", choices=("quality", "masks"))
    options = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        pool.starmap(train, runs(options.only).items(), chunksize=1)


if __name__ == "__main__":
    main()
