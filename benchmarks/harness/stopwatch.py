"""The GPU's own time of calls that only queue work, by CUDA events.

Before a call, the device is made to wait until the host has queued all of it. The kernels of every contestant then run
without gaps, whether launching them is slow or quick.
"""
from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from .contest import Contest
from .measuring import quartiles

MARGIN = 1.5  # the device waits so many times as long as the host took to queue the call the last time
ATTEMPTS = 4


class Stopwatch:
    """Measures device time.

    Attributes:
        gaps: name -> calls in which the host was too slow in every attempt.
        host: name -> seconds that the host took to queue each call.
    """

    def __init__(self) -> None:
        self._cycles = _cycles_per_second()
        self._lead: dict[str, float] = defaultdict(lambda: 1e-3)  # name -> seconds that the device waits
        self.gaps: dict[str, int] = defaultdict(int)
        self.host: dict[str, list[float]] = defaultdict(list)

    def seconds(self, name: str, call: Callable[[], None], after: Callable[[], None] = lambda: None) -> float:
        """Returns the device's time of one call. A call in which the device had to wait for the host is repeated.

        Args:
            after: called after every attempt, outside of the time.
        """
        for _attempt in range(ATTEMPTS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begun = time.perf_counter()
            torch.cuda._sleep(int(self._lead[name] * self._cycles))
            start.record()
            call()
            end.record()
            late = start.query()
            queued = time.perf_counter() - begun
            end.synchronize()
            after()
            self._lead[name] = max(5e-5, MARGIN * queued) if not late else 2 * max(queued, self._lead[name])
            if not late:
                break
        else:
            self.gaps[name] += 1
        self.host[name].append(queued)
        return start.elapsed_time(end) * 1e-3


def _cycles_per_second(cycles: int = 20_000_000) -> float:
    """Measures how many cycles of torch.cuda._sleep make a second."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return cycles / (start.elapsed_time(end) * 1e-3)


def measure_calls(name: str, calls: dict[str, Callable[[], None]], rounds: int, repeats: int) -> dict[str, Any]:
    """Returns the record of a case whose contestants are plain calls, ours first.

    A turn makes `repeats` calls in a row and counts as seconds a call.
    """
    stopwatch = Stopwatch()
    times: dict[str, list[float]] = defaultdict(list)
    for round in range(-Contest.SLOW_ROUNDS, rounds):  # negative rounds warm up
        for who, call in calls.items():
            seconds = stopwatch.seconds(who, lambda call=call: [call() for _ in range(repeats)]) / repeats
            if round >= 0:
                times[who].append(seconds)
    ours = next(iter(times.values()))
    return {"case": name, "rounds": rounds, "refused": {}, "contestants": [
        {"name": who, "kind": "ours" if who == next(iter(times)) else "other", "rounds": rounds,
         "time": quartiles(taken), "ratio": quartiles([a / b for a, b in zip(taken, ours)]),
         "gaps": stopwatch.gaps[who], "errors": None} for who, taken in times.items()]}


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Captures step() in a CUDA graph and returns the graph's replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
