"""Numbers that every benchmark takes: errors, quartiles, and how much of the machine others used."""
from __future__ import annotations

import os
import pathlib
import statistics

from torch import Tensor

CpuSeconds = tuple[float, float, float]
"""Seconds since the machine or the process started, over all cores: in all, busy, and this process's own."""


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Returns |got - expected| / |expected| in the 2-norm, in float64; the absolute error where expected is 0."""
    got = got.double()
    error, size = (got - expected).norm().item(), expected.norm().item()
    return error / size if size else error


def quartiles(values: list[float]) -> list[float]:
    """Returns [first quartile, median, third quartile]."""
    if len(values) < 2:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def cpu_seconds() -> CpuSeconds | None:
    """Reads the machine's counters; None where there is no /proc/stat."""
    try:
        fields = pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    # The fields are user, nice, system, idle, iowait, irq, softirq and steal.
    ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
    own = os.times()
    return sum(ticks), sum(ticks) - ticks[3] - ticks[4], own.user + own.system


def share_of_others(before: CpuSeconds | None) -> float | None:
    """Returns the share of the machine that other processes used since `before`, which says how quiet it was."""
    now = cpu_seconds()
    if now is None or before is None or now[0] == before[0]:
        return None
    machine, busy, own = (after - earlier for after, earlier in zip(now, before))
    return round(max(0.0, busy - own) / machine, 3)
