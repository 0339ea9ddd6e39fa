"""How few blocks hold the weights that pruned nets keep: tables and a picture of what train_masks.py has trained.

    python -m benchmarks.mask_table [--folder benchmarks/masks]

Reads runs.json and *.npz in the folder, prints the tables and writes them there as TABLE.md, all figures as
table.json, and masks.png: each W_hh mask at 95 % in manifold order.

A kernel that skips empty blocks is as fast as the share of blocks that are not empty. That share depends on the
order of the neurons, which rows and columns of a recurrent matrix have in common. Counted are blocks of 16, 32 and 64:

manifold    in `mk.manifold_order` of the neurons' points on the torus, which block-pruned nets were cut in as well
own         in the best order found for this very mask, points unseen: by how many weights a neuron keeps ("degree":
            good where few neurons hold most), reverse Cuthill-McKee ("rcm"), or the first eigenvectors of the
            normalized adjacency after the trivial one, sorted by ("fiedler") or walked by bisection in 2 and in 4
            dimensions ("spectral2", "spectral4": a flat torus lies in 4), all of the pattern made symmetric; neurons
            without a weight come last. Where it beats manifold order, there is more structure than the points know
random      of a random mask that keeps as many weights, the mean of 5: what blocks a net fills that knows of none

"filled" is the share of blocks with at least one kept weight. "for 90 %" is the share of blocks, fullest first, that
hold 90 % of the kept weights: what dense blocks would store if the other weights went to a list of single ones.
Near: the share of kept weights between neurons at most 2 apart on the torus; by chance, of all pairs of neurons.
Idle: neurons with no kept weight, in or out. Errors are at the last epoch of each sparsity, when its mask was taken.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.sparse import csr_array
from scipy.sparse.csgraph import reverse_cuthill_mckee

import moduli_kernels as mk

from .train_masks import MASKS, runs

SIDES = (16, 32, 64)
DRAWS = 5
NEAR = 2.0
SHARE = 90  # percent of the kept weights, for "for 90 %"
PICTURED = 95
OWN = ("degree", "rcm", "fiedler", "spectral2", "spectral4")
Record = dict[str, Any]


# --- masks and orders ------------------------------------------------------------------------------------------

def read(path: Path) -> tuple[dict[int, np.ndarray], torch.Tensor]:
    """Percent cut -> mask (n, n) bool, True = kept; and the points (n, 2) of the neurons."""
    with np.load(path) as stored:
        points = torch.from_numpy(stored["points"])
        packed = {int(key.removeprefix("mask_")): stored[key] for key in stored if key.startswith("mask_")}
    return {cut: np.unpackbits(bits, axis=1, count=len(points)).astype(bool) for cut, bits in packed.items()}, points


def own_orders(mask: np.ndarray) -> dict[str, np.ndarray]:
    """Orders of the neurons found from the mask (n, n) alone, by name: (n,) permutations."""
    linked = mask | mask.T
    alone = np.flatnonzero(~linked.any(0))
    some = np.flatnonzero(linked.any(0))
    graph = linked[np.ix_(some, some)].astype(float)
    # All eigenvectors that are asked for, several of one eigenvalue too, which sparse solvers may miss.
    root = np.sqrt(graph.sum(0))
    last = len(some) - 1
    _, vectors = eigh(graph / np.outer(root, root), subset_by_index=(max(last - 4, 0), last))
    coordinates = torch.from_numpy(vectors[:, -2::-1] / root[:, None])
    orders = {"degree": np.argsort(-graph.sum(0), kind="stable"),
              "rcm": reverse_cuthill_mckee(csr_array(graph), symmetric_mode=True)}
    for name, dimensions in (("fiedler", 1), ("spectral2", 2), ("spectral4", 4)):
        orders[name] = mk.manifold_order(coordinates[:, :dimensions], mk.Euclidean(dimensions)).numpy()
    return {name: np.concatenate([some[order], alone]) for name, order in orders.items()}


def block_counts(mask: np.ndarray, side: int) -> np.ndarray:
    """How many weights each block keeps, (blocks down, blocks across); the last ones may be smaller."""
    starts = [np.arange(0, size, side) for size in mask.shape]
    return np.add.reduceat(np.add.reduceat(mask, starts[0], axis=0, dtype=np.int64), starts[1], axis=1)


def filled(counts: np.ndarray) -> float:
    """The share of blocks that keep a weight."""
    return float((counts > 0).mean())


def holding(counts: np.ndarray, percent: int = SHARE) -> float:
    """The smallest share of blocks that together keep so many percent of the weights."""
    held = np.sort(counts, axis=None)[::-1].cumsum()
    wanted = -(-percent * int(counts.sum()) // 100)  # rounded up
    return float((held < wanted).sum() + (wanted > 0)) / counts.size


def random_mask(n: int, kept: int, seed: int) -> np.ndarray:
    mask = np.zeros(n * n, dtype=bool)
    mask[np.random.default_rng(seed).choice(n * n, kept, replace=False)] = True
    return mask.reshape(n, n)


MEASURES: dict[str, Callable[[np.ndarray], float]] = {"filled": filled, "holding": holding}


def blocks_of(mask: np.ndarray, points: torch.Tensor) -> Record:
    """{measure: {side: {order: share}}}, of `manifold`, each of OWN, and `random`."""
    orders = {"manifold": mk.manifold_order(points, "torus").numpy(), **own_orders(mask)}
    ordered = {name: [mask[np.ix_(order, order)]] for name, order in orders.items()}
    ordered["random"] = [random_mask(len(mask), int(mask.sum()), seed) for seed in range(DRAWS)]
    counts = {(name, side): [block_counts(one, side) for one in masks]
              for name, masks in ordered.items() for side in SIDES}
    return {measure: {side: {name: float(np.mean([share(c) for c in counts[name, side]])) for name in ordered}
                      for side in SIDES}
            for measure, share in MEASURES.items()}


# --- runs ------------------------------------------------------------------------------------------------------

def measured(folder: Path) -> list[Record]:
    """One record for every run and sparsity of which there is a mask, in the order in which nets are trained."""
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
    """In cm, at the last epoch of that sparsity (percent)."""
    return [entry["error"] for entry in run["history"] if round(100 * entry["sparsity"]) == cut][-1]


def quality(folder: Path) -> list[Record]:
    """Of the quality runs: the error at the end, by seed, for each side of the blocks and order."""
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
    """Everything as Markdown; shares in percent."""
    lines = ["# Masks: blocks that hold what is kept", "",
             "Written by `python -m benchmarks.mask_table`, whose docstring says what is counted. Shares in percent."]
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
    """Masks in manifold order, a row for each penalty and number of neurons: pruned weight by weight, and in blocks."""
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mask_table", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=MASKS, help="where train_masks.py has put runs.json and *.npz")
    folder = parser.parse_args().folder
    if not (folder / "runs.json").exists():
        parser.error(f"there is no {folder / 'runs.json'}; train nets first with `python -m benchmarks.train_masks`")
    rows, by_block = measured(folder), quality(folder)
    text = tables(rows, by_block)
    print(text, end="")
    (folder / "TABLE.md").write_text(text)
    (folder / "table.json").write_text(json.dumps({"masks": rows, "quality": by_block}, indent=1) + "\n")
    picture(folder, rows, folder / "masks.png")


if __name__ == "__main__":
    main()
