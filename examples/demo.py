"""Trains several recurrent nets while pruning them and compares them in a table and pictures.

    python -m examples.demo [--task navigation|adding] [--quick] [--full] [--fresh]

Run it from the repository's root. After Ctrl-C or a kill, it goes on from its checkpoints next time.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .paper import demo_report
from .training.config import EXAMPLES, Config, Result, task_module
from .training.trainer import Run
from .training.workers import places, train_all

CONTROLS = ("torus", "l1_matched", "none")


@dataclass(frozen=True)
class Mode:
    """Which nets are trained, and how. README.md says how sizes and lengths were chosen."""

    what: str  # says above the table what the mode is
    settings: dict  # fields of Config
    wanted: tuple[float, ...]  # sparsities to report
    nets: tuple[str, ...] = CONTROLS
    seeds: tuple[int, ...] = (0,)


def modes(task: str) -> dict[str, Mode]:
    """Returns the modes "demo", "quick" and "full" of a task."""
    preset = task_module(task).PRESETS["quick"]
    if task == "navigation":
        # The sparsity stays at 0 until the task is learned, then rises by 5 %, so that it meets every one wanted.
        cut, wanted = 0.9, (0.0, 0.5, 0.75, 0.9)
        tiny = replace(preset, batches=40, before=6, hold=0, options={**preset.options, "hidden": 128, "steps": 10})
        size = "n = 512, 128 landmarks, 20 steps"
        quick = "n = 128, 10 steps"
        full = CONTROLS + ("shuffled",)
    else:
        cut, wanted = 0.95, (0.0, 0.5, 0.75, 0.9, 0.95)
        tiny = replace(preset, batches=60, options={**preset.options, "hidden": 64, "steps": 20})
        size = "n = 128, 50 steps"
        quick = "n = 64, 20 steps"
        full = CONTROLS + ("shuffled", "torus_trained")
    settings, tiny = preset.fields(cut), tiny.fields(cut)
    return {
        "demo": Mode(f"reduced size ({size})", settings, wanted),
        "quick": Mode(f"far too short to judge by, a check that all works ({quick})", tiny, wanted),
        "full": Mode(f"reduced size ({size})", settings, wanted, full, (0, 1, 2)),
    }


def run(
    task: str, name: str, mode: Mode, *, device: str, runs: Path, results: Path, fresh: bool = False
) -> Path:
    """Trains the nets, prints the table, writes pictures and the record, and returns their folder."""
    begun = time.perf_counter()
    configs = [
        Config(task=task, net=net, seed=seed, device=device, **mode.settings)
        for seed in mode.seeds for net in mode.nets
    ]
    if fresh:
        for config in configs:
            shutil.rmtree(config.folder(runs), ignore_errors=True)
    _announce(task, mode, configs, device, runs)
    done = train_all(configs, runs)
    seconds = time.perf_counter() - begun

    rows = demo_report.summarize(configs, done, mode.wanted)
    print("\n" + demo_report.table(task, rows, mode.what, done[0].references) + "\n")
    folder = results / (f"{task}-{name}" + ("" if device == "cpu" else "-cuda"))
    folder.mkdir(parents=True, exist_ok=True)
    demo_report.write_record(folder / "record.json", name, configs, done, rows, seconds)
    print(f"{seconds / 60:.1f} minutes in all. Record: {_short(folder / 'record.json')}")
    for picture in _pictures(folder, configs, done, mode, runs):
        print(f"Picture: {_short(picture)}")
    return folder


def _announce(task: str, mode: Mode, configs: list[Config], device: str, runs: Path) -> None:
    at_once = min(len(configs), len(places(device)))
    print(f"{task}: {len(configs)} nets, {at_once} at once, on {device}, {mode.what}")
    kept = [c for c in configs if c.folder(runs).exists()]
    if kept:
        names = ", ".join(f"{c.net} seed {c.seed}" for c in kept)
        print(f"Going on from, or reusing, what {_short(runs)} holds of: {names}. --fresh trains afresh.")


def _pictures(folder: Path, configs: list[Config], done: list[Result], mode: Mode, runs: Path) -> list[Path]:
    first = [(c, r) for c, r in zip(configs, done, strict=True) if c.seed == mode.seeds[0]]
    whole = [c for c, r in first if not r.collapsed]
    if not whole:
        print("No pictures: every net collapsed.")
        return []
    from .paper import demo_figures

    nets = [Run(config, config.folder(runs)) for config in whole]
    try:
        return demo_figures.draw_all(folder, configs, done, nets, mode.wanted)
    except ImportError as error:
        print(f"No pictures: {error}. Install matplotlib and run this again: what is trained is kept.")
        return []


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("navigation", "adding"), default="navigation")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="under a minute: a check that all works")
    length.add_argument("--full", action="store_true", help="3 seeds and more controls")
    parser.add_argument("--fresh", action="store_true", help="train afresh, also where checkpoints are kept")
    parser.add_argument("--out", type=Path, default=EXAMPLES, help="folder for runs/ (checkpoints) and results/")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=best, help=f"here {best}")
    options = parser.parse_args(arguments)
    name = "quick" if options.quick else "full" if options.full else "demo"
    try:
        run(
            options.task, name, modes(options.task)[name], device=options.device, runs=options.out / "runs",
            results=options.out / "results", fresh=options.fresh,
        )
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from the last checkpoints.")
        return 130
    except RuntimeError as error:
        print(f"\nFailed: {error}. What was saved stays; the same command goes on from it.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
