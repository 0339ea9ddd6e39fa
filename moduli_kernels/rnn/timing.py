"""Measures how long one pass of a recurrent net takes on each of its paths, in alternation."""
from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

RUNS = 7  # timed passes of each path


def alternating(passes: dict[str, Callable[[], object]], device: torch.device, runs: int = RUNS) -> dict[str, float]:
    """Times each pass `runs` times and returns the median seconds by name.

    Every pass runs once beforehand to warm up. Then the passes take turns, in reverse order every other round, so that
    whatever else the machine does meanwhile slows all of them alike.
    """
    taken: dict[str, list[float]] = {name: [] for name in passes}
    for run in passes.values():
        run()
    for turn in range(runs):
        for name in list(passes)[::-1 if turn % 2 else 1]:
            _wait(device)
            begin = time.perf_counter()
            passes[name]()
            _wait(device)
            taken[name].append(time.perf_counter() - begin)
    return {name: median(times) for name, times in taken.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
