"""Which path a recurrent net takes: the masked op ("sparse") or the vendor's RNN over masked weights ("dense").

`choose` reads crossovers.json, so a net's results do not depend on timings of the moment. The table holds ratios
"time of the dense path over time of the sparse path", measured in alternation by benchmarks/tune_rnn.py for a layer
whose W_ih and W_hh are both hidden x hidden and masked to the same density, on a full grid of

    hidden, batch, steps, density, and training (forward and backward) or not,

and beside it `unmasked`, the same for a layer that has no mask at all. Rule: the ratio at a point is interpolated
linearly in the logarithms of ratio and coordinates, which are first moved onto the grid's nearest edge where they lie
beyond it; sparse where it is above `margin`. What counts as density is the kept share of the entries of both weights
together.

A float64 net takes the table of float32 where it has none of its own. No table for a device or dtype: dense.

`hidden_form` decides on the sparse path between two ops for a masked hidden weight on CUDA: by a prediction.
"""
from __future__ import annotations

import itertools
import json
import math
import pathlib
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

MARGIN = 1.2  # predicted ratio from which on the sparse path is taken: a wrong choice costs more than a missed gain
# There the dense path has to mask weights and gradients as well, which the table leaves out.
MARGIN_OF_MASKED_TRAINING = 1.0
FILE = pathlib.Path(__file__).with_name("crossovers.json")
AXES = ("hidden", "batch", "steps")

# Of the layout of a hidden weight: neurons along a block, and the kept entries that make it one, rather than strays: a
# block and so many entries one by one move the same bytes at a batch of 20 to 30.
SIDE, THRESHOLD = 32, 64
# Neurons up to which a step is bounded by other things than bytes, and up to which W stays on the chip
FEW, ON_CHIP = 1024, 2048


class Table(NamedTuple):
    """grid: the values of hidden, batch, steps, ascending; densities, ascending; ratios: (hidden, batch, steps,
    training) -> one number a density, and last that of the layer without a mask. source: where they come from."""

    grid: tuple[tuple[int, ...], ...]
    densities: tuple[float, ...]
    ratios: dict[tuple[int, int, int, bool], tuple[float, ...]]
    source: str


def parsed(written: dict[str, Any]) -> Table:
    """A table as the file holds it. Raises KeyError where a point of the grid is missing."""
    rows = {(*(row[axis] for axis in AXES), row["training"]): (*row["ratios"], row["unmasked"])
            for row in written["rows"]}
    grid = tuple(tuple(sorted({key[i] for key in rows})) for i in range(len(AXES)))
    return Table(grid, tuple(written["densities"]),
                 {key: rows[key] for key in itertools.product(*grid, (False, True))}, written["source"])


@cache
def tables() -> dict[tuple[str, str], Table]:
    """(device type, dtype without "torch.") -> the shipped table."""
    return {(each["device"], each["dtype"]): parsed(each) for each in json.loads(FILE.read_text())["tables"]}


def table_of(device_type: str, dtype: torch.dtype) -> Table | None:
    found = tables().get((device_type, str(dtype).removeprefix("torch.")))
    return tables().get((device_type, "float32")) if found is None and dtype == torch.float64 else found


def choose(device_type: str, dtype: torch.dtype, hidden: int, batch: int, density_ih: float | None,
           density_hh: float | None, training: bool, steps: int, *, inputs: int | None = None) -> str:
    """"sparse" or "dense", the faster by the table.

    device_type: "cpu", "cuda", ... dtype: of the weights, or what autocast makes of them. hidden: neurons. batch,
    steps: at least 0. density_ih, density_hh: kept share of W_ih and W_hh, None without a mask. training: whether a
    backward pass follows. inputs: columns of W_ih, None = hidden.
    """
    ratio = predicted(device_type, dtype, hidden, batch, density_ih, density_hh, training, steps, inputs=inputs)
    masked = density_ih is not None or density_hh is not None
    return "sparse" if ratio is not None and ratio > margin(masked, training) else "dense"


def margin(masked: bool, training: bool) -> float:
    """The predicted ratio from which on the sparse path is taken."""
    return MARGIN_OF_MASKED_TRAINING if masked and training else MARGIN


@lru_cache(maxsize=1024)  # a net asks the same at each call
def predicted(device_type: str, dtype: torch.dtype, hidden: int, batch: int, density_ih: float | None,
              density_hh: float | None, training: bool, steps: int, *, inputs: int | None = None) -> float | None:
    """Time of the dense path over time of the sparse one, by the table; None without a table. As `choose`."""
    table = table_of(device_type, dtype)
    if table is None:
        return None
    corners = [_between(values, at) for values, at in zip(table.grid, (hidden, batch, steps))]
    if density_ih is None and density_hh is None:
        columns = [(-1, 1.0)]
    else:
        density = joint_density(density_ih, density_hh, hidden if inputs is None else inputs, hidden)
        columns = [(table.densities.index(near), share) for near, share in _between(table.densities, density)]
    logarithm = 0.0
    for *key, (column, share) in itertools.product(*corners, columns):
        weight = share * math.prod(its_share for _, its_share in key)
        logarithm += weight * math.log(table.ratios[(*(value for value, _ in key), training)][column])  # pyright: ignore[reportArgumentType]
    return math.exp(logarithm)


def joint_density(density_ih: float | None, density_hh: float | None, inputs: int, hidden: int) -> float:
    """Kept share of the entries of W_ih (hidden, inputs) and W_hh (hidden, hidden) together."""
    ih, hh = (1.0 if density is None else density for density in (density_ih, density_hh))
    return (ih * inputs + hh * hidden) / max(1, inputs + hidden)


def _between(values: tuple[Any, ...], at: float) -> list[tuple[Any, float]]:
    """The neighbours of `at` among the ascending values, each with its share by the logarithm."""
    if at <= values[0]:
        return [(values[0], 1.0)]
    if at >= values[-1]:
        return [(values[-1], 1.0)]
    high = next(value for value in values if value >= at)
    low = max(value for value in values if value <= at)
    if low == high:
        return [(low, 1.0)]
    share = math.log(at / low) / math.log(high / low)
    return [(low, 1 - share), (high, share)]


def is_best_read_whole(density: float, batch: int, entries: int) -> bool:
    """Whether the CPU's kernel, forward alone, is faster with all of a weight as it lies in memory, 0 where masked,
    than with its kept entries, which it has to find at each call. density: kept share. entries: masked ones too.

    Rule: measured (benchmarks/NOTES.md). A batch of 1 reads a weight in the caches at 16 entries for one by itself;
    others multiply all of it from the kernel's own share on (csrc/cpu/rnn_matrix.h: dense_from).
    """
    if batch > 1:
        return density > 0.7
    return density > (0.1 if entries <= 2**22 else 0.2)


def told(ratio: float, least: float) -> str:
    """A ratio in words; least: the margin it is held against."""
    told = f"sparse takes about 1/{ratio:.3g} of the time of dense" if ratio > 1 else (
        f"dense takes about 1/{1 / ratio:.3g} of the time of sparse")
    return told + (f", too little to rely on (under 1/{least:g})" if 1 < ratio <= least else "")


# --- how a masked hidden weight is read on CUDA ----------------------------------------------------------------

def hidden_form(hidden: int, batch: int, density: float, blocks: float | None = None, strays: int = 0) -> str:
    """"masked" (masked_rnn: the whole weight and its mask) or "blocks" (blocked_rnn: its blocks and stray weights), the
    one that is predicted to be faster on CUDA. Nothing of this has been measured (benchmarks/NOTES.md, "RNN on CUDA").

    hidden: neurons. batch: elements. density: kept share. blocks, strays: how many its layout has, of SIDE x SIDE
    entries and of one. blocks None: there is no layout yet; "blocks" says then that one is worth making, for the best
    one of so many entries, all in full blocks, would be faster.

    Rule: masked up to FEW neurons, where a step takes as long as its barrier and W stays on the chip. Beyond, the one
    with fewer bytes a step through the second-level cache, all in float32. Masked: all states for each strip of 16 rows
    while W stays on the chip; else all states for each 64 rows, and W and its mask for each 128 elements of the batch.
    Blocks: each with the states of its columns; a stray weight, its column's number and the states of its column.
    """
    if hidden <= FEW:
        return "masked"
    states = 4 * (-(-batch // 8) * 8)  # bytes of a neuron's
    if blocks is None:
        blocks, strays = density * hidden**2 / SIDE**2, 0
    listed = blocks * SIDE * (4 * SIDE + states) + strays * (8 + states)
    if hidden <= ON_CHIP:
        whole = hidden**2 / 16 * states
    else:
        whole = hidden**2 / 64 * states + hidden**2 * 5 * -(-batch // 128)
    return "blocks" if listed < whole else "masked"
