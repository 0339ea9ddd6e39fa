"""A case of the penalty on the CPU: contestants are checked against the float64 reference, then take turns."""
from __future__ import annotations

import resource
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from moduli_kernels import reference

from ..harness.contest import Contest
from ..harness.measuring import relative_error
from .cases import Case
from .peers import Contestant, Peers

PEER_TOLERANCE = {"value": 1e-5, "weight": 1e-4, "points": 1e-4}  # wrong formulas miss by far more


class PenaltyContest(Contest):
    """Contestants are `contestants`, ours first.

    Attributes:
        errors: name -> relative errors.
        first_call: name -> seconds of the first call, compiling included.
        refused: name -> why a wrong peer was put out.
        faults: name -> page faults of each turn.
        weight, points: the case's inputs, which all contestants share.
    """

    peers = Peers

    def __init__(self, case: Case) -> None:
        torch._dynamo.reset()  # so that each case starts afresh with the compiler's limits per function
        super().__init__(case.seed)
        self.case = case
        weight, points = case.inputs()
        self.contestants = self.peers(case, weight, points).all()
        self.faults: dict[str, list[int]] = defaultdict(list)
        self.errors: dict[str, dict[str, float]] = {}
        self.first_call: dict[str, float] = {}
        self.refused: dict[str, str] = {}
        self.weight, self.points = weight, points

    def names(self) -> list[str]:
        return [one.name for one in self.contestants]

    # --- correctness -------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Checks all contestants. A peer beyond PEER_TOLERANCE is put out; ours raises AssertionError."""
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
            reason = ", ".join(f"{name} is off by {error:.1e}" for name, error in wrong.items())
            if one.kind == "ours":
                raise AssertionError(
                    f"{self.case.name}: {reason}, relative to the float64 reference; nothing is timed.")
            self.refused[one.name] = reason
            self.contestants.remove(one)

    def _truth(self) -> dict[str, Tensor]:
        """Computes value and gradients in float64."""
        case = self.case
        what = reference.Penalty(case.manifold, case.formula, 1.0, 1, case.scale)
        value, grads = reference.penalty_with_grads(
            self.weight.double(), self.points.double(), None, None, what, case.gradients,
            case.gradients and case.trained)
        truth = {"value": value}
        if case.gradients:
            truth["weight"] = grads.weight * case.grad_output
            if case.trained:
                truth["points"] = grads.rows * case.grad_output
        return truth

    def _found(self, one: Contestant) -> dict[str, Tensor]:
        """Returns what a contestant has computed."""
        found = {"value": one.value}
        if self.case.gradients:
            found["weight"] = one.weight.grad if one.weight.layout == torch.strided else one.weight.grad.to_dense()
            if self.case.trained:
                found["points"] = one.points.grad
        return found

    # --- time --------------------------------------------------------------------------------------------------

    def take_turn(self, name: str) -> None:
        one, release = self.contestant(name), self.case.release
        if release and not self.times[name]:
            one.step()  # so that the first timed step has a gradient to drop
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        if release:
            one.release()
        one.step()
        self.times[name][self.round] = time.perf_counter() - start
        self.faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
        if not release:
            one.release()

    def contestant(self, name: str) -> Contestant:
        """Returns the contestant with this name."""
        return next(one for one in self.contestants if one.name == name)

    def forget(self) -> None:
        super().forget()
        self.faults.clear()

    # --- result ------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        case = self.case
        return {
            "case": case.name, "manifold": repr(case.manifold), "inhibitor": repr(case.inhibitor), "n": case.n,
            "trained": case.trained, "gradients": case.gradients, "grad_output": case.grad_output,
            "release": case.release, "dtype": "float32", "rounds": self.round, "refused": self.refused,
            "others_cpu": self.others_cpu(), "contestants": [self.summary(name) for name in self.names()],
        }

    def summary(self, name: str) -> dict[str, Any]:
        taken = self.times[name]
        found = super().summary(name) | {
            "kind": self.contestant(name).kind, "rounds": len(taken), "fastest": min(taken.values()),
            "first_call": self.first_call[name], "errors": self.errors.get(name),
        }
        if name in self.faults:
            found["page_faults"] = statistics.median(self.faults[name])
        return found
