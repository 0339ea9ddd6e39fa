"""One case on a GPU: the contest of contest.py, timed by CUDA events.

What a turn takes is the device's time: before it, the device is told to wait until the host has queued the whole step,
so that the kernels of all contestants run without gaps, be their launching slow or quick. What a step takes in a loop,
launching included, is recorded beside it ("loop").
"""
from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases_gpu import GpuCase
from .contest import SLOW, SLOW_ROUNDS, Contest, quartiles
from .peers import Contestant
from .peers_gpu import GpuPeers

CACHES = 3  # the copies of W that a contestant goes through hold at least so many times the second-level cache
MOST_COPIES = 16
MARGIN = 1.5  # the device waits that much longer than the host took to queue the step the last time
ATTEMPTS = 4
LOOP = 20  # steps


class Stopwatch:
    """Device time of calls that only queue work."""

    def __init__(self):
        self._cycles = self._cycles_per_second()
        self._lead: dict[str, float] = defaultdict(lambda: 1e-3)  # name -> seconds that the device waits
        self.gaps: dict[str, int] = defaultdict(int)  # name -> turns in which the host was too slow all the same
        self.host: dict[str, list[float]] = defaultdict(list)

    @staticmethod
    def _cycles_per_second(cycles: int = 20_000_000) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        return cycles / (start.elapsed_time(end) * 1e-3)

    def seconds(self, name: str, call: Callable[[], None], after: Callable[[], None] = lambda: None) -> float:
        """Of one call; `after` runs outside. Taken again where the device had to wait for the host."""
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


class GpuContest(Contest):
    peers = GpuPeers
    case: GpuCase

    def __init__(self, case: GpuCase):
        super().__init__(case)
        self.stopwatch = Stopwatch()
        self.loop: dict[str, float] = {}
        self._rotations: dict[str, list[Tensor]] = {}

    def verify(self) -> None:
        super().verify()
        copies = self._copies()
        self._rotations = {one.name: [one.weight, *(_leaf(one, copy) for copy in copies)] for one in self.contestants}

    def _copies(self) -> list[Tensor]:
        """Of W, so many that together with it they exceed the second-level cache CACHES times."""
        cache = torch.cuda.get_device_properties(self._weight.device).L2_cache_size
        count = min(MOST_COPIES, max(2, math.ceil(CACHES * cache / self._weight.nbytes)))
        return [self._weight.clone() for _ in range(count - 1)]

    def _time(self, one: Contestant) -> None:
        self.times[one.name][self.round] = self._turn(one, one.step)

    def _turn(self, one: Contestant, call: Callable[[], None]) -> float:
        rotation = self._rotations[one.name]
        one.weight = rotation[self.round % len(rotation)]
        return self.stopwatch.seconds(one.name, call, one.release)

    def warm_up(self, rounds: int) -> None:
        super().warm_up(rounds)
        self.stopwatch.gaps.clear()
        self.stopwatch.host.clear()

    def loops(self) -> None:
        """Seconds a step of each contestant in a loop, as a training step would meet it: launching included."""
        for one in self.contestants:
            if statistics.median(self.times[one.name].values()) >= SLOW:
                continue
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for step in range(LOOP):
                one.weight = self._rotations[one.name][step % len(self._rotations[one.name])]
                one.step()
                one.release()
            torch.cuda.synchronize()
            self.loop[one.name] = (time.perf_counter() - begun) / LOOP

    def record(self) -> dict[str, Any]:
        """That of contest.py; beside it the dtype, and for each contestant what the host took to queue a step."""
        return super().record() | {"dtype": str(self.case.dtype).removeprefix("torch."), "kept": self.case.kept,
                                   "others_cpu": None}

    def _summary(self, one: Contestant, ours: dict[int, float]) -> dict[str, Any]:
        taken = self.times[one.name]
        return {
            "name": one.name, "kind": one.kind, "rounds": len(taken), "time": quartiles(list(taken.values())),
            "ratio": quartiles([seconds / ours[r] for r, seconds in taken.items()]), "fastest": min(taken.values()),
            "host": quartiles(self.stopwatch.host[one.name]), "gaps": self.stopwatch.gaps[one.name],
            "loop": self.loop.get(one.name), "first_call": self.first_call[one.name],
            "errors": self.errors.get(one.name),
        }


def _leaf(one: Contestant, copy: Tensor) -> Tensor:
    """Another weight for a contestant, with the numbers of its first one."""
    if one.weight.layout != torch.strided:
        copy = one.weight.detach().clone()
    leaf = copy.detach().requires_grad_(one.weight.requires_grad)
    if one.keeps_grad:
        leaf.grad = torch.zeros_like(leaf)
    return leaf


def measure(case: GpuCase, rounds: int) -> dict[str, Any]:
    """The record of a case; raises AssertionError where ours is wrong."""
    contest = GpuContest(case)
    contest.verify()
    contest.warm_up(SLOW_ROUNDS)
    for _ in range(rounds):
        contest.others()
        contest.ours()
    contest.loops()
    return contest.record()


def measure_calls(name: str, calls: dict[str, Callable[[], None]], rounds: int, repeats: int) -> dict[str, Any]:
    """A record of calls that are no contest of weights, ours first: each `repeats` times in a row, seconds a call."""
    stopwatch = Stopwatch()
    times: dict[str, list[float]] = defaultdict(list)
    for round in range(-SLOW_ROUNDS, rounds):
        for who, call in calls.items():
            seconds = stopwatch.seconds(who, lambda call=call: [call() for _ in range(repeats)]) / repeats
            if round >= 0:
                times[who].append(seconds)
    ours = next(iter(times.values()))
    return {"case": name, "rounds": rounds, "refused": {}, "contestants": [
        {"name": who, "kind": "ours" if who == next(iter(times)) else "other", "rounds": rounds,
         "time": quartiles(taken), "ratio": quartiles([a / b for a, b in zip(taken, ours)]),
         "gaps": stopwatch.gaps[who], "errors": None} for who, taken in times.items()]}
