"""A case of the penalty on a GPU, timed by the device's own clock.

A turn takes what the device takes, see stopwatch.py. What a step takes in a loop, launching included, is recorded as
"loop".
"""
from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from ..harness import stopwatch
from ..harness.measuring import quartiles
from .cases_gpu import GpuCase
from .contest import PenaltyContest
from .peers import Contestant
from .peers_gpu import GpuPeers

CACHES = 3  # the copies of W that a contestant goes through hold at least so many times the second-level cache
MOST_COPIES = 16
LOOP = 20  # steps


class GpuContest(PenaltyContest):
    """As PenaltyContest. Each contestant goes through copies of W, so that none finds its weight in the cache."""

    peers = GpuPeers
    case: GpuCase

    def __init__(self, case: GpuCase) -> None:
        super().__init__(case)
        self.stopwatch = stopwatch.Stopwatch()
        self.loop: dict[str, float] = {}  # name -> seconds a step in a loop
        self.rotations: dict[str, list[Tensor]] = {}  # name -> the weights that it goes through

    def verify(self) -> None:
        super().verify()
        copies = self._copies()
        self.rotations = {one.name: [one.weight, *(_leaf(one, copy) for copy in copies)] for one in self.contestants}

    def _copies(self) -> list[Tensor]:
        """Makes so many copies of W that together with W they exceed the second-level cache CACHES times."""
        cache = torch.cuda.get_device_properties(self.weight.device).L2_cache_size
        count = min(MOST_COPIES, max(2, math.ceil(CACHES * cache / self.weight.nbytes)))
        return [self.weight.clone() for _ in range(count - 1)]

    def take_turn(self, name: str) -> None:
        one, rotation = self.contestant(name), self.rotations[name]
        one.weight = rotation[self.round % len(rotation)]
        self.times[name][self.round] = self.stopwatch.seconds(name, one.step, one.release)

    def forget(self) -> None:
        super().forget()
        self.stopwatch.gaps.clear()
        self.stopwatch.host.clear()

    def loops(self) -> None:
        """Measures each contestant in a loop, as a training step meets it: seconds a step, launching included."""
        for one in self.contestants:
            if statistics.median(self.times[one.name].values()) >= self.SLOW:
                continue
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for step in range(LOOP):
                one.weight = self.rotations[one.name][step % len(self.rotations[one.name])]
                one.step()
                one.release()
            torch.cuda.synchronize()
            self.loop[one.name] = (time.perf_counter() - begun) / LOOP

    def record(self) -> dict[str, Any]:
        return super().record() | {"dtype": str(self.case.dtype).removeprefix("torch."), "kept": self.case.kept,
                                   "others_cpu": None}

    def summary(self, name: str) -> dict[str, Any]:
        return super().summary(name) | {"host": quartiles(self.stopwatch.host[name]),
                                        "gaps": self.stopwatch.gaps[name], "loop": self.loop.get(name)}


def _leaf(one: Contestant, copy: Tensor) -> Tensor:
    """Makes another weight for a contestant, with the numbers of its first one."""
    if one.weight.layout != torch.strided:
        copy = one.weight.detach().clone()
    leaf = copy.detach().requires_grad_(one.weight.requires_grad)
    if one.keeps_grad:
        leaf.grad = torch.zeros_like(leaf)
    return leaf


def measure(case: GpuCase, rounds: int) -> dict[str, Any]:
    """Returns the record of a case; raises AssertionError where ours is wrong."""
    contest = GpuContest(case)
    contest.verify()
    contest.warm_up(contest.SLOW_ROUNDS)
    for _ in range(rounds):
        contest.others()
        contest.ours()
    contest.loops()
    return contest.record()
