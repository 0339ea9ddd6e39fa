"""The command line of one task: python -m examples.adding|language_model|navigation|speech."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import checkpoint
from .config import EXAMPLES, PRECISIONS, REDUCTIONS, TASKS, Config, Result, task_class, task_module
from .ledger import Ledger
from .nets import INHIBITORS, NETS, R3
from .timing import shares
from .workers import train_all

COMMON = ("epoch", "sparsity", "density", "loss", "penalty", "lr", "error")  # in every history entry, for any task


def parser(task: str) -> argparse.ArgumentParser:
    """Returns the parser of a task's command: what the paper varies, where paper and code differ, its own options."""
    module = task_module(task)
    made = argparse.ArgumentParser(
        prog=f"python -m examples.{task}", description=module.__doc__.splitlines()[0],
        epilog="Defaults are the preset's. Stopped or killed, the same command goes on from the last epoch. The result "
               "is a line in the ledger, results/<task>.jsonl.")
    presets = "; ".join(f"{name}: {preset.what}" for name, preset in module.PRESETS.items()).replace("%", "%%")
    made.add_argument("--preset", choices=tuple(module.PRESETS), default="quick", help=f"{presets} (default quick)")
    made.add_argument("--net", choices=tuple(NETS), default="torus", metavar="NET",
                      help=f"points and penalty: {', '.join(NETS)} (default torus)")
    made.add_argument("--cut", type=float, default=0.0, metavar="SHARE",
                      help="share of the weights to prune, e.g. 0.9 (default 0)")
    made.add_argument("--lottery", action="store_true",
                      help="fresh weights on the final mask of the same run without --lottery, which is trained first")
    made.add_argument("--seed", type=int, default=0, help="seed of weights, data and points (default 0)")

    its = made.add_argument_group("the penalty")
    its.add_argument("--strength", type=float, help="lambda")
    its.add_argument("--inhibitor", choices=tuple(INHIBITORS),
                     help="f(distance) (default dog). The language model's code has `distance` where the paper says "
                          "sinusoid, and its batch script inverts: distance_inverted, diffusion_inverted")
    its.add_argument("--reduction", choices=REDUCTIONS,
                     help="lambda multiplies the mean over the entries of W_hh (the authors' code, default) or their "
                          "sum (the paper's equation: n * n times as strong)")
    its.add_argument("--r3", choices=R3,
                     help="R^3 as in the paper (default) or in the authors' code: fixed points there cost nothing, "
                          "trained ones start normal instead of uniform in a cube")
    its.add_argument("--point-damping", type=float, metavar="FACTOR",
                     help="trained points' gradients shrink by this factor an epoch (the adding code has 0.99)")

    its = made.add_argument_group("training")
    its.add_argument("--epochs", type=int, help="epochs in which the sparsity rises to the cut")
    its.add_argument("--before", type=int, help="epochs at sparsity 0 ahead of them")
    its.add_argument("--hold", type=int,
                     help="epochs on the final mask after them, in which trained points rest (adding: 10 in the "
                          "authors' latest code, 3 in an earlier one)")
    its.add_argument("--batches", type=int,
                     help="batches an epoch (adding: the paper says 500,000 in all, the code has 313 an epoch)")
    its.add_argument("--lr", type=float, help="learning rate")
    its.add_argument("--clip", type=float, help="norm the gradient is clipped to")
    its.add_argument("--precision", choices=PRECISIONS, help="tf32 for CUDA; bfloat16: autocast (default float32)")

    its = made.add_argument_group("the task")
    texts, choices = module.OPTIONS, getattr(module, "CHOICES", {})
    for name, default in task_options(task).items():
        kind = type(default)
        shown = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if name in choices:
            shown = {"choices": choices[name]}
        its.add_argument(f"--{name.replace('_', '-')}", **shown, default=None, help=texts[name].replace("%", "%%"))

    its = made.add_argument_group("where")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    its.add_argument("--device", choices=("cpu", "cuda"), default=best, help=f"here {best}")
    its.add_argument("--graph", action="store_true", default=None, help="steps as CUDA graphs (adding, navigation)")
    its.add_argument("--out", type=Path, default=EXAMPLES, help="folder for runs/ (checkpoints) and results/")
    its.add_argument("--logs", action="store_true", help="TensorBoard logs in the run's folder under runs/")
    return made


def task_options(task: str) -> dict[str, Any]:
    """Returns keyword -> default of the task's __init__."""
    found = inspect.signature(task_class(task).__init__).parameters
    return {name: p.default for name, p in found.items() if name not in ("self", "seed", "device")}


def config_of(task: str, options: argparse.Namespace) -> Config:
    """Returns the run that the command line asks for."""
    given = {name: value for name, value in vars(options).items() if value is not None}

    def chosen(*names: str) -> dict[str, Any]:
        return {name: given[name] for name in names if name in given}

    preset = task_module(task).PRESETS[options.preset]
    preset = replace(preset, **chosen("epochs", "before", "hold", "batches", "lr", "strength", "clip"),
                     options={**preset.options, **chosen(*task_options(task))})
    settings = chosen("inhibitor", "reduction", "r3", "point_damping", "precision", "device", "graph")
    return preset.config(task, options.net, options.seed, options.cut, lottery=options.lottery, **settings)


def in_words(config: Config, result: Result) -> str:
    """Puts the result into some lines."""
    if result.collapsed:
        return f"COLLAPSED: {result.collapsed}. The last good checkpoint stays."
    first, with_unit = config.pruned_at(), task_class(config.task).with_unit
    lines = []
    if 0 < first < len(result.history) - 1:
        lines.append(f"error as pruning ends: {with_unit(result.history[first]['error'])}")
    last = result.history[-1]
    kept = f"{100 * last['density']:.2f} % of W_hh kept"
    lines.append(f"error at the end: {with_unit(last['error'])}, {kept}")
    lines += [f"{name}: {value:.4g}" for name, value in last.items() if name not in COMMON]
    lines += [f"for comparison, {name}: {with_unit(value)}" for name, value in result.references.items()]
    lines.append(f"{result.seconds / 60:.1f} minutes; of the training steps: {shares(result.parts)}")
    return "\n".join(lines)


def resumable(work: Callable[[], object]) -> int:
    """Does work that goes on where it stopped if it is asked for again, and returns the exit status of the command."""
    try:
        work()
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from the last checkpoints.")
        return 130
    except (RuntimeError, OSError) as error:
        print(f"\nFailed: {error}. What is recorded stays; the same command goes on.", file=sys.stderr)
        return 1
    return 0


def main(task: str, arguments: list[str] | None = None) -> int:
    """Does what `python -m examples.<task>` is for, and returns its exit status."""
    assert task in TASKS
    options = parser(task).parse_args(arguments)
    try:
        config = config_of(task, options)
        folder, ledger = config.folder(options.out / "runs"), Ledger(options.out / "results" / f"{task}.jsonl")
        (result,) = train_all([config], options.out / "runs", logs=options.logs)
        if config.key not in ledger.trials():
            ledger.append(config, result)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from the last epoch.")
        return 130
    except (RuntimeError, ValueError, OSError) as error:
        print(f"\nFailed: {error}", file=sys.stderr)
        return 1
    print(in_words(config, result))
    print(f"Checkpoint: {folder / checkpoint.NAME}\nLedger: {ledger.path}")
    return 1 if result.collapsed else 0
