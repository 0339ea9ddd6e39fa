"""Shows how few blocks hold the weights that pruned nets keep: tables and a picture of what training.py has trained.

    python -m benchmarks.masks.table [--folder benchmarks/masks]

It reads runs.json and *.npz in the folder, prints the tables and writes them there as TABLE.md, all numbers as
table.json, and masks.png, which shows each W_hh mask at 95 % in manifold order.

A kernel that skips empty blocks is as fast as the share of blocks that are not empty. That share depends on the order
of the neurons, which is the same for rows and columns of a recurrent matrix. Blocks of 16, 32 and 64 are counted in
these orders:

    manifold    `mk.manifold_order` of the neurons' points on the torus, in which block-pruned nets were cut as well
    own         the best order that was found from the mask alone, without the points (see blocks.py, own_orders). Where
                it beats manifold order, the mask has more structure than the points know
    random      a random mask that keeps as many weights, the mean of 5: it shows what blocks hold without any structure

The columns of the tables:

    filled      the share of blocks with at least one kept weight
    for 90 %    the share of blocks, fullest first, that hold 90 % of the kept weights. Dense blocks would store so much
                if the other weights went to a list of single ones
    near        the share of kept weights between neurons that are at most 2 apart on the torus; "by chance" is that
                share of all pairs of neurons
    idle        the share of neurons that keep no weight, in or out
    error       at the last epoch of each sparsity, when its mask was taken
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moduli_kernels as mk
from examples.training import files

from .blocks import OWN, SHARE, SIDES, block_counts, blocks_of
from .training import MASKS, runs

NEAR = 2.0  # distance on the torus
PICTURED = 95  # percent cut in the picture
Record = dict[str, Any]


def read(path: Path) -> tuple[dict[int, np.ndarray], torch.Tensor]:
    """Returns percent cut -> mask (n, n) bool, True = kept; and the points (n, 2) of the neurons."""
    with np.load(path) as stored:
        points = torch.from_numpy(stored["points"])
        packed = {int(key.removeprefix("mask_")): stored[key] for key in stored if key.startswith("mask_")}
    return {cut: np.unpackbits(bits, axis=1, count=len(points)).astype(bool) for cut, bits in packed.items()}, points


# --- runs ------------------------------------------------------------------------------------------------------

def measured(folder: Path) -> list[Record]:
    """Returns a record for every run and sparsity that has a mask, in the order in which nets are trained."""
    rows = []
    recorded = json.loads((folder / "runs.json").read_text())
    for name in runs(only="masks"):
        if name not in recorded:
            continue
        run = recorded[name]
        masks, points = read(folder / f"{name}.npz")
        near = (mk.manifold("torus").distance(points, points) <= NEAR).numpy()
        for cut, mask in sorted(masks.items()):
            rows.append({
                "run": name, "net": run["config"]["net"], "strength": run["config"]["strength"],
                "neurons": len(points), "block": run["config"]["block"], "cut": cut,
                "error": error_at(run, cut), "density": float(mask.mean()), "near": float(near[mask].mean()),
                "near_by_chance": float(near.mean()), "idle": float((~(mask | mask.T).any(0)).mean()),
                **blocks_of(mask, points),
            })
    return rows


def error_at(run: Record, cut: int) -> float:
    """Returns the error in cm at the last epoch of that sparsity (percent)."""
    return [entry["error"] for entry in run["history"] if round(100 * entry["sparsity"]) == cut][-1]


def quality(folder: Path) -> list[Record]:
    """Returns the quality runs' errors at the end, by seed, for each side of the blocks and each order."""
    rows: dict[tuple[int, str], Record] = {}
    for name, run in json.loads((folder / "runs.json").read_text()).items():
        if name.startswith("quality-"):
            block = run["config"]["block"]
            order = run["config"]["block_order"] if block > 1 else "-"
            row = rows.setdefault((block, order), {"block": block, "order": order, "errors": {}})
            row["errors"][run["config"]["seed"]] = run["history"][-1]["error"]
    return [rows[key] for key in sorted(rows)]


# --- tables and picture ----------------------------------------------------------------------------------------

def tables(rows: list[Record], by_block: list[Record]) -> str:
    """Writes everything as Markdown, with shares in percent."""
    lines = ["# Masks: blocks that hold what is kept", "",
             "Written by `python -m benchmarks.masks.table`, whose docstring says what is counted. Shares in percent."]
    lines += ["", "## Nets", "", "| run | cut | error, cm | W_hh density | near (by chance) | idle |",
              "| --- " * 6 + "|"]
    for row in rows:
        near, chance, idle = (f"{100 * row[key]:.0f}" for key in ("near", "near_by_chance", "idle"))
        lines.append(f"| {row['run']} | {row['cut']} | {row['error']:.1f} | {100 * row['density']:.2f} | "
                     f"{near} ({chance}) | {idle} |")
    for measure, title in (("filled", "Blocks filled"), ("holding", f"Blocks for {SHARE} % of the weights")):
        heads = [f"{side}: manifold | own | random" for side in SIDES]
        lines += ["", f"## {title}", "", f"| run | cut | {' | '.join(heads)} |", "| --- " * 11 + "|"]
        for row in rows:
            cells = [cell for side in SIDES for cell in _shares(row[measure][side])]
            lines.append(f"| {row['run']} | {row['cut']} | {' | '.join(cells)} |")
    if by_block:
        seeds = sorted({seed for row in by_block for seed in row["errors"]})
        lines += ["", "## What blocks cost: error in cm, torus 0.5, 512 neurons, W_hh cut to 90 %", "",
                  f"| block | order | mean | {' | '.join(f'seed {seed}' for seed in seeds)} |",
                  "| --- " * (3 + len(seeds)) + "|"]
        for row in by_block:
            errors = [f"{row['errors'][seed]:.1f}" if seed in row["errors"] else "" for seed in seeds]
            mean = np.mean(list(row["errors"].values()))
            lines.append(f"| {row['block']} | {row['order']} | {mean:.1f} | {' | '.join(errors)} |")
    return "\n".join(lines) + "\n"


def _shares(share: dict[str, float]) -> list[str]:
    best = min(OWN, key=share.__getitem__)
    return [f"{100 * share['manifold']:.1f}", f"{100 * share[best]:.1f} {best}", f"{100 * share['random']:.1f}"]


def picture(folder: Path, rows: list[Record], path: Path) -> None:
    """Draws masks in manifold order: a row for each penalty and size, cut weight by weight and in blocks."""
    from matplotlib.figure import Figure

    shown: dict[tuple, dict[bool, Record]] = {}
    for row in rows:
        if row["cut"] == PICTURED:
            shown.setdefault((row["net"], row["strength"], row["neurons"]), {})[row["block"] > 1] = row
    figure = Figure(figsize=(4.6, 0.4 + 2.2 * len(shown)), layout="constrained")
    for line, of_penalty in zip(figure.subplots(len(shown), 2, squeeze=False), shown.values()):
        for axis, in_blocks in zip(line, (False, True)):
            row = of_penalty.get(in_blocks)
            if row is None:
                axis.set_axis_off()
                continue
            masks, points = read(folder / f"{row['run']}.npz")
            order = mk.manifold_order(points, "torus").numpy()
            cell = max(1, len(points) // 192)  # a panel shows about so many cells a side
            shade = block_counts(masks[PICTURED][np.ix_(order, order)], cell) / cell**2
            axis.imshow(shade, cmap="Greys", vmin=0, vmax=0.5, interpolation="nearest")
            penalty = "no penalty" if row["net"] == "none" else f"{row['net']} {row['strength']:g}"
            how = f"blocks of {row['block']}" if in_blocks else "weight by weight"
            axis.set(xticks=[], yticks=[], ylabel=f"{penalty}, n = {row['neurons']}")
            axis.set_title(f"{how}: {row['error']:.1f} cm", fontsize=9)
    figure.suptitle(f"W_hh cut to {PICTURED} %, manifold order\nblack: half or more of a cell is kept", fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Writes tables and picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masks.table", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=MASKS, help="where training.py has put runs.json and *.npz")
    folder = parser.parse_args().folder
    if not (folder / "runs.json").exists():
        parser.error(f"there is no {folder / 'runs.json'}; train nets first with `python -m benchmarks.masks.training`")
    rows, by_block = measured(folder), quality(folder)
    text = tables(rows, by_block)
    print(text, end="")
    files.write_text(folder / "TABLE.md", text)
    files.write_text(folder / "table.json", json.dumps({"masks": rows, "quality": by_block}, indent=1) + "\n")
    picture(folder, rows, folder / "masks.png")


if __name__ == "__main__":
    main()
