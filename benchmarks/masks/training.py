"""Trains nets for their masks: which patterns do penalties and pruning modes leave, and at what error?

    python -m benchmarks.masks.training [--jobs 1] [--only quality|masks]

The runs "masks" are navigation nets of which W_hh alone is cut to 90, 95 and 98 %, for each penalty and pruning mode.
Their masks go to benchmarks/masks/<run>.npz with the neurons' points. The runs "quality" show what blocks cost at 90 %,
over 3 seeds. All errors go to benchmarks/masks/runs.json. A run that is in that file is not trained again; one that was
killed goes on from its last epoch. `python -m benchmarks.masks.table` counts the blocks that the masks fill.
"""
from __future__ import annotations

import argparse
import json
import multiprocessing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from examples.training import files
from examples.training.config import EXAMPLES, Config
from examples.training.trainer import Run
from moduli_kernels import linear_schedule

MASKS = Path(__file__).resolve().parent
RUNS = MASKS / "runs.json"
CHECKPOINTS = EXAMPLES / "runs"  # ignored by git

SPARSITIES = (0.9, 0.95, 0.98)
EPOCHS_AT_EACH = 4  # masks and errors are those after the last of them
BEFORE = [0.0] * 12 + linear_schedule(0.9, 13)
WORLD = {"landmarks": 128, "width_cm": 24, "batch": 50, "steps": 20}
PENALTIES = {"torus-0.1": ("torus", 0.1), "torus-0.5": ("torus", 0.5), "torus-2": ("torus", 2.0),
             "l1_matched-0.5": ("l1_matched", 0.5), "shuffled-0.5": ("shuffled", 0.5), "none": ("none", 0.0)}
BLOCK = 16  # side of the blocks of the pruning mode "block"


def config(penalty: str, hidden: int, sparsities: tuple[float, ...], seed: int = 0, **settings) -> Config:
    """Returns the configuration of one run."""
    net, strength = PENALTIES[penalty]
    schedule = BEFORE + [sparsity for sparsity in sparsities for _ in range(EPOCHS_AT_EACH)]
    return Config(task="navigation", net=net, seed=seed, options={**WORLD, "hidden": hidden}, schedule=schedule,
                  batches=85, lr=2e-3, strength=strength, cut="recurrent", **settings)


def runs(only: str | None) -> dict[str, Config]:
    """Returns name -> configuration, in the order in which nets are trained."""
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
    """Trains one run to its end and records it."""
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
        """Keeps the mask at the last epoch of each sparsity."""
        if epoch < len(BEFORE) or epoch < len(its.schedule) and its.schedule[epoch] == its.schedule[epoch - 1]:
            return
        ((_, mask),) = run.task.recurrent()
        masks[f"mask_{round(100 * its.schedule[epoch - 1])}"] = np.packbits(mask.cpu().numpy(), axis=1)
        write_arrays(partial, masks)

    result = run.train(after_epoch=keep)
    _, regularizer = next(iter(run.geometry.items()))
    if not name.startswith("quality"):
        write_arrays(MASKS / f"{name}.npz", masks | {"points": regularizer.rows.points.cpu().numpy()})
    _record(name, {"config": asdict(its), "history": result.history, "seconds": result.seconds,
                   "collapsed": result.collapsed, "references": result.references, "environment": result.environment})
    print(f"{name}: error {result.history[-1]['error']:.1f} cm, {result.seconds / 60:.1f} minutes", flush=True)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz file, whole or not at all."""
    with files.whole_file(path) as file:
        np.savez_compressed(file, **arrays)


def recorded() -> dict[str, Any]:
    """Returns name -> record of the runs that have ended."""
    return json.loads(RUNS.read_text()) if RUNS.exists() else {}


def _record(name: str, entry: dict[str, Any]) -> None:
    with files.locked(RUNS.with_suffix(".lock")):
        files.write_text(RUNS, json.dumps(recorded() | {name: entry}, indent=1) + "\n")


def main() -> None:
    """Trains the runs that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="nets trained at once, one core each")
    parser.add_argument("--only", choices=("quality", "masks"))
    options = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        pool.starmap(train, runs(options.only).items(), chunksize=1)


if __name__ == "__main__":
    main()
