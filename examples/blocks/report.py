"""The table and the pictures of the study, from what the ledger has and, for the masks, what lies in runs/."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..training import checkpoint, files
from ..training.ledger import Ledger
from .penalties import learned_order
from .plan import CUTS, FAMILIES, PENALTY_OF, SIDE, Protocol, Trial, families, protocol_of
from .results import ENOUGH, NEAR_DENSE, OURS, Curve, Results, interval, reached, read, verdict
from .training import WEIGHT, masks_of

PICTURED = 0.95  # the sparsity in the picture of masks
COLOURS = dict(zip(FAMILIES, ("tab:red", "black", "tab:blue", "tab:green", "tab:orange", "tab:purple")))


def write(task: str, options: argparse.Namespace, ledger: Ledger) -> str:
    """Writes the table, and the pictures as far as there is something to draw; returns the table."""
    protocol = protocol_of(task, options.quick)
    results = read(task, options.quick, options.seeds, ledger)
    text = table(task, protocol, results, command(task, options))
    quick = "-quick" if options.quick else ""
    folder = options.out / "results"
    files.write_text(folder / "blocks" / f"{task}{quick}.md", text)
    if results.curves:
        speed_picture(protocol, results, folder / "blocks" / f"{task}{quick}-speed.png")
        masks_picture(task, results, options, folder / "blocks" / f"{task}{quick}-masks.png")
    return text


def command(task: str, options: argparse.Namespace) -> str:
    """Returns the command whose records the report shows."""
    return f"python -m examples.blocks --tasks {task} --seeds {options.seeds}{' --quick' if options.quick else ''}"


# --- the table -------------------------------------------------------------------------------------------------

def table(task: str, protocol: Protocol, results: Results, source: str) -> str:
    """Writes everything as Markdown."""
    kind = protocol.task
    lines = [f"# Blocks: {task}", "", f"Records of `{source}`. Error: {kind.METRIC}, {kind.UNIT}. Brackets: bootstrap "
             "95 % intervals of the mean over seeds.", ""]
    if results.strengths is None:
        return "\n".join([*lines, "The search for strengths is not complete yet; there is nothing to report."]) + "\n"
    seeds = results.seeds()
    if len(seeds) < ENOUGH:
        lines += [f"Only {len(seeds)} seeds have all their nets so far: too few to judge by.", ""]
    lines += [verdict(results, "training"), verdict(results, "inference"), ""]
    lines += ["## Nets before they are cut", "", "| penalty | for | strength | error | steps | converged |",
              "| --- " * 6 + "|"]
    for (family, cut), by_seed in results.dense.items():
        records = [record for record in by_seed.values() if not record["collapsed"]]
        errors = _mean([record["error"] for record in records])
        steps = _mean([record["steps"] for record in records], digits=0)
        converged = sum(bool(record["converged"]) for record in records)
        lines.append(f"| {PENALTY_OF.get(family, family)} | {family}, {cut} | {results.strengths[family, cut]:g} | "
                     f"{errors} | {steps} | {converged} of {len(records)} |")
    if results.uncut:
        trained_on = ", ".join(_mean(errors) for errors in zip(*results.uncut.values()))
        lines += ["", f"The net without a penalty, trained on as long as to each stop and not cut: {trained_on}."]
    for number, stop in enumerate(protocol.stops):
        lines += ["", f"## W_hh cut to {100 * stop:g} %", "",
                  "| family | cut | kept, % | blocks filled, % | error | minus geometric blocks | training, ms (times "
                  "nn.RNN) | inference, ms (times nn.RNN) | steps | seconds |", "| --- " * 10 + "|"]
        for curve, by_seed in results.curves.items():
            lines.append(_row(curve, number, by_seed, results))
    lines += _starts(results)
    if results.collapsed:
        lines += ["", "Collapsed: " + "; ".join(results.collapsed)]
    return "\n".join(lines) + "\n"


def _row(curve: Curve, number: int, by_seed: dict[int, Any], results: Results) -> str:
    points = [points[number] for points in by_seed.values()]
    ours = results.curves.get(OURS, {})
    common = sorted(set(by_seed) & set(ours))
    differences = [by_seed[seed][number].error - ours[seed][number].error for seed in common]
    difference = _mean(differences, signed=True) if curve != OURS and differences else "-"
    mean = {name: float(np.mean([getattr(point, name) for point in points])) for name in vars(points[0])}
    speed = [f"{mean[f'{name}_ms']:.2f} ({mean[name]:.1f})" if math.isfinite(mean[name]) else "not measured"
             for name in ("training", "inference")]
    return (f"| {curve[0]} | {curve[1]} | {100 * mean['density']:.2f} | {100 * mean['filled']:.1f} | "
            f"{_mean([point.error for point in points])} | {difference} | {speed[0]} | {speed[1]} | "
            f"{mean['steps']:.0f} | {mean['seconds']:.0f} |")


def _starts(results: Results) -> list[str]:
    """Returns the table of nets that are sparse from the start, each beside the dense net of its seed."""
    dense = results.dense.get(("none", "blocks"), {})
    if not results.starts or not dense:
        return []
    lines = ["", "## Sparse from the start", "", f"Steps and CPU seconds of training until the error is {NEAR_DENSE:g} "
             "times that of the dense net without a penalty at its end, means over the seeds that reach it.", "",
             "| mask | kept, % | error at the end | steps in all | steps to reach | seconds to reach | seeds |",
             "| --- " * 7 + "|"]
    rows = [("none", 1.0, dense), *((family, density, its) for (family, density), its in results.starts.items())]
    for family, density, by_seed in rows:
        its = {seed: record for seed, record in by_seed.items() if seed in dense}
        there = [found for seed, record in its.items()
                 if (found := reached(record, NEAR_DENSE * dense[seed]["error"])) is not None]
        steps, seconds = np.mean(there, axis=0) if there else (float("nan"),) * 2
        lines.append(f"| {family} | {100 * density:g} | {_mean([record['error'] for record in its.values()])} | "
                     f"{np.mean([record['steps'] for record in its.values()]):.0f} | {steps:.0f} | {seconds:.1f} | "
                     f"{len(there)} of {len(its)} |")
    return lines


def _mean(values: Sequence[float], *, signed: bool = False, digits: int = 2) -> str:
    """Writes a mean with its interval, or without one for a single value."""
    sign = "+" if signed else ""
    form = f"{sign}.{digits}f"
    if len(values) < 2:
        return f"{np.mean(values):{form}}"
    low, high = interval(values)
    return f"{np.mean(values):{form}} [{low:{form}}, {high:{form}}]"


# --- pictures --------------------------------------------------------------------------------------------------

def speed_picture(protocol: Protocol, results: Results, path: Path) -> None:
    """Draws error against speed: each net a point, families as colours, the means of a family's stops as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    for axis, speed in zip(figure.subplots(1, 2, sharey=True), ("training", "inference")):
        for (family, cut), by_seed in results.curves.items():
            points = np.array([[(getattr(point, speed), point.error) for point in each] for each in by_seed.values()])
            if not np.isfinite(points).all():
                continue
            filled = {"facecolors": COLOURS[family] if cut == "blocks" else "none", "edgecolors": COLOURS[family]}
            axis.scatter(points[..., 0], points[..., 1], s=16, marker="s" if cut == "blocks" else "o", **filled)
            means = np.exp(np.log(points).mean(0))
            axis.plot(means[:, 0], means[:, 1], color=COLOURS[family], linestyle="-" if cut == "blocks" else ":",
                      label=f"{family}, {cut}")
        dense = [record["error"] for record in results.dense.get(("none", "blocks"), {}).values()]
        axis.scatter([1.0] * len(dense), dense, marker="*", color="grey", label="dense, no penalty")
        axis.set(xscale="log", yscale="log", xlabel=f"speed of a{'n' if speed[0] == 'i' else ''} {speed} step, times "
                                                    "torch.nn.RNN")
    figure.axes[0].set_ylabel(f"{protocol.task.METRIC}, {protocol.task.UNIT}")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=7)
    stops = ", ".join(f"{100 * stop:g}" for stop in protocol.stops)
    figure.suptitle(f"W_hh cut to {stops} %: squares, lines: in blocks; circles, dots: weight by weight", fontsize=9)
    with files.whole_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def masks_picture(task: str, results: Results, options: argparse.Namespace, path: Path) -> None:
    """Draws the masks of seed 0, each in the order of its family: a row weight by weight and a row in blocks."""
    from matplotlib.figure import Figure

    assert results.strengths is not None
    root = options.out / "runs"
    protocol = protocol_of(task, options.quick)
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    for line, cut in zip(figure.subplots(2, len(FAMILIES)), reversed(CUTS)):
        for axis, family in zip(line, FAMILIES):
            axis.set(xticks=[], yticks=[])
            # A family that has blocks only borrows the scattered mask of the family whose dense nets it shares.
            drawn = family if family in families(cut) else PENALTY_OF[family]
            trial = Trial(task, cut, drawn, 0, results.strengths[drawn, cut], quick=options.quick)
            kept = masks_of(trial.folder(root))
            points = results.curves.get((drawn, cut), {}).get(0)
            if kept is None or PICTURED not in kept[1] or points is None:
                axis.set_axis_off()
                continue
            order = kept[0] if drawn == family else _order_learned(trial, root)
            axis.imshow(kept[1][PICTURED][np.ix_(order, order)], cmap="Greys", interpolation="nearest")
            error = points[protocol.stops.index(PICTURED)].error
            axis.set_title(f"{family}\n{error:.{protocol.task.DIGITS}f} {protocol.task.UNIT}", fontsize=8)
        line[0].set_ylabel("weight by weight" if cut == "scattered" else f"blocks of {SIDE}")
    figure.suptitle(f"W_hh cut to {100 * PICTURED:g} %, neurons in manifold order (learned_order: in its own), seed 0",
                    fontsize=9)
    with files.whole_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _order_learned(trial: Trial, root: Path) -> np.ndarray:
    found = checkpoint.load(trial.dense().folder(root))
    if found is None:
        return np.arange(trial.protocol.options["hidden"])
    return learned_order(torch.as_tensor(found[0][f"model.rnn.{WEIGHT}"])).numpy()
