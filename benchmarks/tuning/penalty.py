"""Measures launch parameters of the Triton kernels on this machine's GPU and prints rows for their table.

    python -m benchmarks.tuning.penalty [KIND ...] [--output FILE]

KIND is frozen, flat, curved, some or many (default: all). The rows belong in moduli_kernels/triton/penalty/tiles.py,
under this GPU's generation.

Each kind of work is measured on the manifolds that stand for it, in float32 with a difference of Gaussians, at three
sizes. First come all shapes of tiles at the middle size, then the best of them at all sizes, then the number of
programs. A tile's score is the geometric mean, over manifolds and sizes, of its time over the best tile's. The table's
present tile stays unless another is better by more than the noise. A tile that does not compile or gives another value
is out.
"""
from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

import moduli_kernels as mk

SIZES = (1024, 4096, 8192)
MIDDLE = 4096
WARPS, REPEATS, PREFETCH, REGISTERS = (4, 8, 16), (1, 2, 4), (False, True), (None, 128, 168)
PROGRAMS = (256, 512, 1024, 2048)
FINALISTS = 8  # so many tiles are measured at all sizes
CHAMPIONS = 3  # so many tiles are measured with other numbers of programs
NOISE = 0.02
REPEATS_TIMED = 30
# kind of work -> manifolds, and whether points are trained
WORK: dict[str, tuple[tuple[mk.Manifold, ...], bool]] = {
    "frozen": ((mk.manifold("torus"), mk.manifold("sphere")), False),
    "flat": ((mk.manifold("torus"),), True),
    "curved": ((mk.manifold("sphere"), mk.manifold("klein")), True),
    "some": ((mk.manifold("torus6"), mk.manifold("mixed")), True),
    "many": ((mk.FlatTorus((10.0,) * 8),), True),
}

Timer = Callable[[str, Any, int], list[float]]
"""Maps kind, tile and n to the seconds on each manifold of the kind, infinite where the tile cannot be used."""


@dataclass
class Found:
    """What was found for a kind of work."""

    kind: str
    tile: Any
    before: Any  # the table's present tile
    scores: dict[Any, float]  # of the tiles that were measured at all sizes

    def in_words(self) -> str:
        """Says whether the present tile stays, or by how much another is faster."""
        if self.tile == self.before:
            return f"{self.kind}: {row(self.kind, self.before).strip()} stays"
        gain = self.scores[self.before] / self.scores[self.tile] - 1
        return f"{self.kind}: {100 * gain:.1f} % faster than {row(self.kind, self.before).strip()}"


def shapes(before: Any) -> list[Any]:
    """Returns every tile with the present number of programs, the present tile first."""
    made = [before._replace(warps=warps, repeat=repeat, prefetch=prefetch, registers=registers)
            for warps, repeat, prefetch, registers in itertools.product(WARPS, REPEATS, PREFETCH, REGISTERS)]
    return list(dict.fromkeys([before, *made]))


def scored(tiles: Iterable[Any], seconds: Callable[[Any, int], list[float]],
           sizes: tuple[int, ...]) -> dict[Any, float]:
    """Returns tile -> score over these sizes, best first. A tile that cannot be used at some size is left out."""
    taken = {tile: [s for n in sizes for s in seconds(tile, n)] for tile in tiles}
    taken = {tile: times for tile, times in taken.items() if all(map(math.isfinite, times))}
    if not taken:
        return {}
    best = [min(times) for times in zip(*taken.values())]
    scores = {tile: math.exp(sum(math.log(t / b) for t, b in zip(times, best)) / len(best))
              for tile, times in taken.items()}
    return dict(sorted(scores.items(), key=lambda item: item[1]))


def tune(kind: str, before: Any, timer: Timer) -> Found:
    """Searches the best tile. Raises RuntimeError where the present one cannot be used, a sign of another fault."""
    memory: dict[tuple[Any, int], list[float]] = {}

    def seconds(tile: Any, n: int) -> list[float]:
        if (tile, n) not in memory:
            memory[tile, n] = timer(kind, tile, n)
        return memory[tile, n]

    if not all(math.isfinite(s) for n in SIZES for s in seconds(before, n)):
        raise RuntimeError(f"the table's own tile for {kind!r}, {before}, does not run here; run the tests first.")
    finalists = [*list(scored(shapes(before), seconds, (MIDDLE,)))[:FINALISTS], before]
    champions = [*list(scored(finalists, seconds, SIZES))[:CHAMPIONS], before]
    candidates = [tile._replace(programs=programs) for tile in champions for programs in PROGRAMS]
    scores = scored(dict.fromkeys([*champions, *candidates]), seconds, SIZES)
    best = next(iter(scores))
    return Found(kind, best if scores[before] > (1 + NOISE) * scores[best] else before, before, scores)


def row(kind: str, tile: Any) -> str:
    """Writes a tile as a row of tiles.py."""
    arguments = [str(tile.warps), str(tile.repeat), str(tile.programs)]
    if tile.prefetch:
        arguments.append("True")
    if tile.registers is not None:
        arguments.append(f"{tile.registers}" if tile.prefetch else f"registers={tile.registers}")
    return f'    "{kind}": Tile({", ".join(arguments)}),'


def report(found: list[Found], capability: int) -> str:
    """Writes what belongs in the table, as Python, with what it gains."""
    return "\n".join([f"# generation {capability}, moduli_kernels/triton/penalty/tiles.py",
                      *(f"# {each.in_words()}" for each in found),
                      "{", *(row(each.kind, each.tile) for each in found), "}"])


# --- on the GPU ------------------------------------------------------------------------------------------------

class GpuTimer:
    """Measures medians of the device's time for value and gradients, with weights that rotate through more memory than
    the cache holds."""

    def __init__(self) -> None:
        from moduli_kernels.triton.penalty import tiles

        from ..harness.stopwatch import Stopwatch

        self.table, self.stopwatch = tiles, Stopwatch()
        self._values: dict[tuple[mk.Manifold, int], float] = {}

    def __call__(self, kind: str, tile: Any, n: int) -> list[float]:
        manifolds, trained = WORK[kind]
        self.table.OVERRIDES[kind] = tile
        try:
            return [self._seconds(manifold, trained, n) for manifold in manifolds]
        except Exception as error:  # noqa: BLE001 - too many registers, too much shared memory, no such instruction
            print(f"tune: {kind} {tile} at n = {n} is out: {str(error).splitlines()[0][:120]}", file=sys.stderr)
            return [math.inf] * len(manifolds)
        finally:
            del self.table.OVERRIDES[kind]

    def _seconds(self, manifold: mk.Manifold, trained: bool, n: int) -> float:
        generator = torch.Generator().manual_seed(1)
        points = manifold.sample(n, generator=generator).cuda().requires_grad_(trained)
        base = torch.randn(n, n, generator=torch.Generator("cuda").manual_seed(1), device="cuda") / n**0.5
        cache = torch.cuda.get_device_properties(base.device).L2_cache_size
        weights = [base.clone().requires_grad_() for _ in range(min(16, max(2, math.ceil(3 * cache / base.nbytes))))]
        value = float(mk.moduli_penalty(weights[0], points, manifold=manifold).detach())
        if abs(value / self._values.setdefault((manifold, n), value) - 1) > 1e-5:
            raise ValueError(f"another value: {value}")
        turn = itertools.cycle(weights)
        step = lambda: mk.moduli_penalty(next(turn), points, manifold=manifold)  # noqa: E731
        taken = [self.stopwatch.seconds(f"{manifold} {n}", step) for _ in range(REPEATS_TIMED)]
        return sorted(taken)[len(taken) // 2]


def compile_share(kind: str, before: Any, index: int, count: int) -> None:
    """Runs every count-th shape once, so that Triton's cache holds it when it is timed."""
    timer = GpuTimer()
    for tile in shapes(before)[index::count]:
        timer(kind, tile, MIDDLE)


def main() -> int:
    """Measures the kinds that were asked for, prints their rows, and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning.penalty", description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(WORK))
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file for the rows and all scores")
    parser.add_argument("--compile", metavar="I/COUNT", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if unknown := [kind for kind in asked.kinds if kind not in WORK]:
        parser.error(f"{unknown[0]!r} is no kind of work; there are {', '.join(WORK)}")
    if not torch.cuda.is_available():
        print("tune: launch parameters are measured on a CUDA GPU, and torch finds none here.", file=sys.stderr)
        return 2
    from examples.training import files
    from moduli_kernels.triton.penalty import tiles

    from ..harness import records

    major = torch.cuda.get_device_capability()[0]
    generation = max([g for g in tiles.TABLE if g <= major], default=min(tiles.TABLE))
    kinds = asked.kinds or list(WORK)
    if asked.compile:
        index, count = map(int, asked.compile.split("/"))
        compile_share(kinds[0], tiles.TABLE[generation][kinds[0]], index, count)
        return 0
    found = []
    for kind in kinds:
        count = max(1, min(12, (os.cpu_count() or 2) - 2))
        for process in [subprocess.Popen([sys.executable, "-m", "benchmarks.tuning.penalty", kind, "--compile",
                                          f"{k}/{count}"], stderr=subprocess.DEVNULL) for k in range(count)]:
            process.wait()
        found.append(tune(kind, tiles.TABLE[generation][kind], GpuTimer()))
        print(f"tune: {found[-1].in_words()}", file=sys.stderr, flush=True)
    print(report(found, major))
    if asked.output:
        files.write_text(asked.output, json.dumps(records.gpu_header(False) | {"rows": [
            {"kind": each.kind, "tile": each.tile._asdict(), "before": each.before._asdict(),
             "scores": [[tile._asdict(), score] for tile, score in each.scores.items()]} for each in found]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
