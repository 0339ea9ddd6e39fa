"""One case, measured: every contestant is checked against the float64 reference, then all take turns."""
from __future__ import annotations

import os
import pathlib
import random
import resource
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from moduli_kernels import reference

from .cases import Case
from .peers import Contestant, Peers

PEER_TOLERANCE = {"value": 1e-5, "weight": 1e-4, "points": 1e-4}  # wrong formulas miss by far more
SLOW = 0.25  # s; a contestant slower than this sits out after SLOW_ROUNDS rounds
SLOW_ROUNDS = 5


class Contest:
    """Use: `verify()`, then per round `others()` and `ours()`, then `record()`."""

    peers = Peers

    def __init__(self, case: Case):
        torch._dynamo.reset()  # each case is a fresh start for the compiler's per-function limits
        self.case = case
        weight, points = case.inputs()
        self.contestants = self.peers(case, weight, points).all()
        self.times: dict[str, dict[int, float]] = defaultdict(dict)  # name -> round -> seconds
        self.faults: dict[str, list[int]] = defaultdict(list)
        self.errors: dict[str, dict[str, float]] = {}
        self.first_call: dict[str, float] = {}
        self.refused: dict[str, str] = {}
        self.round = 0
        self._cpu = cpu_seconds()
        self._shuffle = random.Random(case.seed)
        self._weight, self._points = weight, points

    # --- correctness -------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Relative errors of all contestants; a peer beyond PEER_TOLERANCE is put out, ours raises AssertionError."""
        truth = self._truth()
        for one in list(self.contestants):
            start = time.perf_counter()
            one.step()
            self.first_call[one.name] = time.perf_counter() - start
            if one.kind == "floor":
                one.release()
                continue
            errors = {name: relative_error(got, truth[name]) for name, got in self._found(one).items()}
            one.release()
            self.errors[one.name] = errors
            limits = dict(self.case.accuracy)
            if one.kind != "ours":
                limits = {name: max(limit, PEER_TOLERANCE[name]) for name, limit in limits.items()}
            wrong = {name: error for name, error in errors.items() if not error <= limits[name]}
            if not wrong:
                continue
            told = ", ".join(f"{name} is off by {error:.1e}" for name, error in wrong.items())
            if one.kind == "ours":
                raise AssertionError(f"{self.case.name}: {told}, relative to the float64 reference; nothing is timed.")
            self.refused[one.name] = told
            self.contestants.remove(one)

    def _truth(self) -> dict[str, Tensor]:
        case = self.case
        what = reference.Penalty(case.manifold, case.formula, 1.0, 1, case.scale)
        value, grads = reference.penalty_with_grads(
            self._weight.double(), self._points.double(), None, None, what, case.gradients,
            case.gradients and case.trained)
        truth = {"value": value}
        if case.gradients:
            truth["weight"] = grads.weight * case.grad_output
            if case.trained:
                truth["points"] = grads.rows * case.grad_output
        return truth

    def _found(self, one: Contestant) -> dict[str, Tensor]:
        found = {"value": one.value}
        if self.case.gradients:
            found["weight"] = one.weight.grad if one.weight.layout == torch.strided else one.weight.grad.to_dense()
            if self.case.trained:
                found["points"] = one.points.grad
        return found

    # --- time --------------------------------------------------------------------------------------------------

    def others(self) -> None:
        """One turn of all but ours, in an order drawn anew, so that nobody always follows the same one."""
        self.round += 1
        turn = self.contestants[1:]
        self._shuffle.shuffle(turn)
        for one in turn:
            taken = self.times[one.name]
            if len(taken) < SLOW_ROUNDS or statistics.median(taken.values()) < SLOW:
                self._time(one)

    def ours(self) -> None:
        self._time(self.contestants[0])

    def _time(self, one: Contestant) -> None:
        release = self.case.release
        if release and not self.times[one.name]:
            one.step()  # so that the first timed step has a gradient to drop
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        if release:
            one.release()
        one.step()
        self.times[one.name][self.round] = time.perf_counter() - start
        self.faults[one.name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
        if not release:
            one.release()

    def warm_up(self, rounds: int) -> None:
        for _ in range(rounds):
            self.others()
            self.ours()
        self.times.clear()
        self.faults.clear()
        self.round = 0
        self._cpu = cpu_seconds()

    # --- result ------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What the report reads. Times in seconds. ratio: this contestant's time over ours, both of one round."""
        case, ours = self.case, self.times["ours"]
        return {
            "case": case.name, "manifold": repr(case.manifold), "inhibitor": repr(case.inhibitor), "n": case.n,
            "trained": case.trained, "gradients": case.gradients, "grad_output": case.grad_output,
            "release": case.release, "dtype": "float32", "rounds": self.round, "refused": self.refused,
            "others_cpu": self._others_cpu(),
            "contestants": [self._summary(one, ours) for one in self.contestants],
        }

    def _others_cpu(self) -> float | None:
        """The share of the machine that others used since the warm-up: how quiet it was."""
        now = cpu_seconds()
        if now is None or self._cpu is None or now[0] == self._cpu[0]:
            return None
        machine, busy, own = (after - before for after, before in zip(now, self._cpu))
        return round(max(0.0, busy - own) / machine, 3)

    def _summary(self, one: Contestant, ours: dict[int, float]) -> dict[str, Any]:
        taken = self.times[one.name]
        return {
            "name": one.name, "kind": one.kind, "rounds": len(taken), "time": quartiles(list(taken.values())),
            "ratio": quartiles([seconds / ours[r] for r, seconds in taken.items()]), "fastest": min(taken.values()),
            "page_faults": statistics.median(self.faults[one.name]), "first_call": self.first_call[one.name],
            "errors": self.errors.get(one.name),
        }


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected| in the 2-norm, in float64; the absolute error where expected is 0."""
    got = got.double()
    error, size = (got - expected).norm().item(), expected.norm().item()
    return error / size if size else error


def cpu_seconds() -> tuple[float, float, float] | None:
    """Since the machine or the process started, over all cores: seconds in all, busy ones, this process's own."""
    try:
        fields = pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    # user nice system idle iowait irq softirq steal
    ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
    own = os.times()
    return sum(ticks), sum(ticks) - ticks[3] - ticks[4], own.user + own.system


def quartiles(values: list[float]) -> list[float]:
    """[first quartile, median, third quartile]."""
    if len(values) < 2:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")
