"""Predicts which path of a recurrent net is faster: the masked op ("sparse") or the vendor's RNN ("dense").

The dense path multiplies the whole weights, with 0 where they are masked. The choice reads a shipped table,
crossovers.json, so that the results of a net do not depend on timings of the moment. The table holds ratios "time of
the dense path over time of the sparse path", which benchmarks/tuning measured in alternation for a layer whose W_ih and
W_hh are both (hidden, hidden) and masked to the same density. It covers a full grid of

    hidden, batch, steps, density, and training (forward and backward) or not,

and beside it `unmasked`, the same ratio for a layer without any mask. The ratio at a point is interpolated linearly in
the logarithms of ratio and coordinates; coordinates beyond the grid are moved onto its nearest edge first. The sparse
path is taken where the ratio exceeds `margin`. Density means the kept share of the entries of both weights together.

A float64 net uses the table of float32 where there is none of its own. Without a table for a device or dtype the dense
path is taken.

`hidden_form` chooses, on the sparse path on CUDA, between two ops for a masked hidden weight. It predicts from bytes.
"""
from __future__ import annotations

import itertools
import json
import math
import pathlib
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

# The predicted ratio from which on the sparse path is taken: a wrong choice costs more than a missed gain.
MARGIN = 1.2
# In training the dense path also has to mask weights and gradients, which the table leaves out.
MARGIN_OF_MASKED_TRAINING = 1.0
FILE = pathlib.Path(__file__).with_name("crossovers.json")
AXES = ("hidden", "batch", "steps")

# The layout of a hidden weight on CUDA: SIDE neurons along a block, and THRESHOLD kept entries that make it worth a
# block rather than strays. At a batch of 20 to 30, a block and that many single entries move the same bytes.
SIDE, THRESHOLD = 32, 64
# Up to FEW neurons a step is bounded by other things than bytes; up to ON_CHIP neurons W stays on the chip.
FEW, ON_CHIP = 1024, 2048


class Table(NamedTuple):
    """The measured ratios for one device and dtype.

    grid: the measured values of hidden, batch and steps, each ascending.
    densities: the measured densities, ascending.
    ratios: (hidden, batch, steps, training) -> one ratio a density, and last the ratio of the layer without a mask.
    source: where the numbers come from.
    """

    grid: tuple[tuple[int, ...], ...]
    densities: tuple[float, ...]
    ratios: dict[tuple[int, int, int, bool], tuple[float, ...]]
    source: str


def parsed(written: dict[str, Any]) -> Table:
    """Reads a table as the file holds it. Raises KeyError where a point of the grid is missing."""
    rows = {(*(row[axis] for axis in AXES), row["training"]): (*row["ratios"], row["unmasked"])
            for row in written["rows"]}
    grid = tuple(tuple(sorted({key[i] for key in rows})) for i in range(len(AXES)))
    return Table(grid, tuple(written["densities"]),
                 {key: rows[key] for key in itertools.product(*grid, (False, True))}, written["source"])


@cache
def tables() -> dict[tuple[str, str], Table]:
    """The shipped tables, by device type and dtype (written without "torch.")."""
    return {(each["device"], each["dtype"]): parsed(each) for each in json.loads(FILE.read_text())["tables"]}


def table_of(device_type: str, dtype: torch.dtype) -> Table | None:
    """The table for a device and dtype, float32's for float64 without one of its own, or None."""
    found = tables().get((device_type, str(dtype).removeprefix("torch.")))
    return tables().get((device_type, "float32")) if found is None and dtype == torch.float64 else found


def choose(device_type: str, dtype: torch.dtype, hidden: int, batch: int, density_ih: float | None,
           density_hh: float | None, training: bool, steps: int, *, inputs: int | None = None) -> str:
    """Returns "sparse" or "dense", whichever the table predicts to be faster.

    Args:
        device_type: "cpu", "cuda", ...
        dtype: of the weights, or what autocast makes of them.
        hidden: number of neurons.
        batch: number of sequences, at least 0.
        density_ih: kept share of W_ih, None without a mask.
        density_hh: kept share of W_hh, None without a mask.
        training: whether a backward pass follows.
        steps: length of the sequence, at least 0.
        inputs: columns of W_ih, None = hidden.
    """
    ratio = predicted(device_type, dtype, hidden, batch, density_ih, density_hh, training, steps, inputs=inputs)
    masked = density_ih is not None or density_hh is not None
    return "sparse" if ratio is not None and ratio > margin(masked, training) else "dense"


def margin(masked: bool, training: bool) -> float:
    """The predicted ratio from which on the sparse path is taken."""
    return MARGIN_OF_MASKED_TRAINING if masked and training else MARGIN


@lru_cache(maxsize=1024)  # a net asks the same question at each call
def predicted(device_type: str, dtype: torch.dtype, hidden: int, batch: int, density_ih: float | None,
              density_hh: float | None, training: bool, steps: int, *, inputs: int | None = None) -> float | None:
    """The time of the dense path over the time of the sparse path by the table, None without a table.

    The arguments are those of `choose`.
    """
    table = table_of(device_type, dtype)
    if table is None:
        return None
    corners = [neighbours(values, at) for values, at in zip(table.grid, (hidden, batch, steps))]
    if density_ih is None and density_hh is None:
        columns = [(-1, 1.0)]
    else:
        density = joint_density(density_ih, density_hh, hidden if inputs is None else inputs, hidden)
        columns = [(table.densities.index(near), share) for near, share in neighbours(table.densities, density)]
    logarithm = 0.0
    for *key, (column, share) in itertools.product(*corners, columns):
        weight = share * math.prod(its_share for _, its_share in key)
        logarithm += weight * math.log(table.ratios[(*(value for value, _ in key), training)][column])  # pyright: ignore[reportArgumentType]
    return math.exp(logarithm)


def joint_density(density_ih: float | None, density_hh: float | None, inputs: int, hidden: int) -> float:
    """The kept share of the entries of W_ih (hidden, inputs) and W_hh (hidden, hidden) together."""
    ih, hh = (1.0 if density is None else density for density in (density_ih, density_hh))
    return (ih * inputs + hh * hidden) / max(1, inputs + hidden)


def neighbours(values: tuple[Any, ...], at: float) -> list[tuple[Any, float]]:
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


def is_dense_product_best(density: float, batch: int, entries: int) -> bool:
    """Whether the CPU's kernel, forward alone, should multiply all of a weight that is 0 where it is masked.

    The alternative is to find the kept entries first, which costs a pass over the mask at each call.

    Args:
        density: kept share.
        batch: number of sequences.
        entries: number of entries, masked ones included.

    The thresholds are measured (benchmarks/NOTES.md). At a batch of 1 a dense row in the caches is read 16 entries at a
    time; larger batches multiply the whole weight from the share on at which the kernel does so anyway
    (csrc/cpu/rnn: dense_from).
    """
    if batch > 1:
        return density > 0.7
    return density > (0.1 if entries <= 2**22 else 0.2)


def in_words(ratio: float, least: float) -> str:
    """Describes a predicted ratio; `least` is the margin that it has to exceed."""
    words = f"sparse takes about 1/{ratio:.3g} of the time of dense" if ratio > 1 else (
        f"dense takes about 1/{1 / ratio:.3g} of the time of sparse")
    return words + (f", too little to rely on (under 1/{least:g})" if 1 < ratio <= least else "")


# --- how a masked hidden weight is read on CUDA ----------------------------------------------------------------

def hidden_form(hidden: int, batch: int, density: float, blocks: float | None = None, strays: int = 0) -> str:
    """Predicts which op is faster on CUDA for a masked hidden weight. No prediction has been measured on a GPU yet
    (benchmarks/NOTES.md, "RNN on CUDA").

    Args:
        hidden: number of neurons.
        batch: number of sequences.
        density: kept share.
        blocks: blocks of SIDE x SIDE entries that the layout has. None: there is no layout yet; the answer "blocks"
            then says that making one is worthwhile, since the best possible layout would be faster.
        strays: kept entries beside the blocks.

    Returns:
        "masked" (the op masked_rnn: the whole weight and its mask) or "blocks" (the op blocked_rnn).

    Up to FEW neurons the answer is "masked": a step takes as long as its barrier and W stays on the chip. Beyond, the
    op wins that moves fewer bytes a step through the second-level cache, all in float32. The op masked_rnn reads all
    states for each strip of 16 rows while W stays on the chip, else all states for each 64 rows, and W and its mask for
    each 128 elements of the batch. The op blocked_rnn reads each block with the states of its columns, and each stray
    weight with its column's number and the states of that column.
    """
    if hidden <= FEW:
        return "masked"
    states = 4 * (-(-batch // 8) * 8)  # bytes of one neuron's states
    if blocks is None:
        blocks, strays = density * hidden**2 / SIDE**2, 0
    listed = blocks * SIDE * (4 * SIDE + states) + strays * (8 + states)
    if hidden <= ON_CHIP:
        whole = hidden**2 / 16 * states
    else:
        whole = hidden**2 / 64 * states + hidden**2 * 5 * -(-batch // 128)
    return "blocks" if listed < whole else "masked"
