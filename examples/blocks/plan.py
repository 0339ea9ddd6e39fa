"""The trials of the study.

A trial is a net in training. Its kinds:

    dense      all of W_hh, with the family's penalty, until the error has stopped falling
    blocks     goes on from a dense trial; W_hh is cut in blocks to one sparsity after the other, on the way
    scattered  the same, weight by weight
    uncut      goes on for as many steps and cuts nothing: what the steps alone are worth
    start      W_hh has its final mask from the first step, trained like a dense trial without a penalty

The families of the first four say which penalty acts and in which order the neurons are cut, see penalties.py. Those of
"start" say where the mask comes from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..navigation import QUICK as NAVIGATION, NavigationTask
from ..training.task import Task
from .ring import RingTask

SIDE = 16  # of a block
SEARCH_SEED = 1000  # the strengths are picked on it; it is not reported

FAMILIES = {
    "manifold": "difference of Gaussians of the distance on the task's manifold",
    "none": "no penalty",
    "l1_matched": "the same constant for every weight",
    "shuffled": "the manifold's coefficients, permuted at random over all weights",
    "group_lasso": "L2 norms of the blocks",
    "learned_order": "the same constant, blocks in an order found from the dense net's weights",
}
PENALTY_OF = {"learned_order": "l1_matched"}  # the dense trials that a family shares with another
ONLY_BLOCKS = ("learned_order",)  # these differ from another family in the order of the blocks alone
STARTS = {
    "geometric": "mk.geometric_mask in blocks",
    "random": "as many blocks, drawn at random",
}
CUTS = ("blocks", "scattered")


@dataclass(frozen=True)
class Protocol:
    """How the nets of a task are trained, and what they are.

    The error is measured every `every` steps. Training goes on at the rate `lr` until the error has not fallen below
    its best by more than `tolerance` in `patience` measurements in a row; then the rate is halved, and the count begins
    anew. A net has converged when this has happened `halvings` + 1 times. One that has not after `most` steps is cut
    all the same, and recorded as not converged. At the end the rate falls to 0 in `settle` steps.

    A cut goes to one of `stops` after the other. The sparsity rises there in `events` equal parts of `between` steps
    each, at the rate `cut_lr`. Then the net is trained on with this mask for `settle` steps, in which the rate falls to
    0 and the penalty rests, so that no family's error holds what its penalty takes from the weights that are kept. Then
    the error is measured.
    """

    task: type[Task]
    options: dict[str, Any]  # the task's keyword arguments
    manifold: str  # a preset, on which the penalty's distances are measured
    lr: float
    cut_lr: float
    clip: float = 1.0  # the norm that gradients are clipped to
    every: int = 100
    tolerance: float = 0.02
    patience: int = 3
    halvings: int = 2
    most: int = 3000
    settle: int = 250
    stops: tuple[float, ...] = (0.90, 0.95, 0.98, 0.99)
    events: tuple[int, ...] = (16, 6, 6, 6)
    between: int = 25
    starts: tuple[float, ...] = (0.05, 0.02)  # densities of the nets that are sparse from the start
    strengths: tuple[float, ...] = (3.0, 10.0, 30.0, 100.0, 300.0)  # see penalties.py

    def described(self) -> dict[str, Any]:
        """Returns, as JSON, the fields that matter to a trial: not which other trials there are."""
        fields = {**asdict(self), "task": self.task.__name__}
        return {name: value for name, value in fields.items() if name not in ("starts", "strengths")}


FULL = {
    "ring": Protocol(RingTask, {"hidden": 512, "landmarks": 64, "width": 10.0, "steps": 20, "batch": 32,
                                "spread": 30.0}, manifold="circle", lr=2e-3, cut_lr=1e-3),
    "navigation": Protocol(NavigationTask, {**NAVIGATION, "hidden": 512}, manifold="torus", lr=2e-3, cut_lr=1e-3,
                           most=6000),
}
_SHORT = {"every": 10, "patience": 1, "halvings": 1, "most": 40, "settle": 10, "events": (3, 1, 1, 1), "between": 3,
          "strengths": (1.0, 10.0)}
QUICK = {
    "ring": Protocol(RingTask, {"hidden": 128, "landmarks": 16, "width": 20.0, "steps": 5, "batch": 8,
                                "spread": 10.0}, manifold="circle", lr=2e-3, cut_lr=1e-3, **_SHORT),
    "navigation": Protocol(NavigationTask, {**NAVIGATION, "hidden": 128, "landmarks": 32, "steps": 5, "batch": 8},
                           manifold="torus", lr=2e-3, cut_lr=1e-3, **_SHORT),
}


def protocol_of(task: str, quick: bool) -> Protocol:
    """Returns how the nets of a task are trained."""
    return (QUICK if quick else FULL)[task]


@dataclass(frozen=True)
class Trial:
    """One net. `strength` is that of the family's penalty, `density` the share that a "start" mask keeps."""

    task: str
    kind: str
    family: str
    seed: int
    strength: float = 0.0
    density: float = 1.0
    quick: bool = field(default=False)

    @property
    def protocol(self) -> Protocol:
        """How it is trained."""
        return protocol_of(self.task, self.quick)

    @property
    def key(self) -> str:
        """Names the trial and its protocol."""
        return hashlib.sha256(json.dumps(self.described(), sort_keys=True).encode()).hexdigest()[:12]

    def described(self) -> dict[str, Any]:
        """Returns the trial and its protocol as JSON."""
        return {**asdict(self), "protocol": json.loads(json.dumps(self.protocol.described()))}

    def folder(self, root: Path) -> Path:
        """Returns the folder of its checkpoint and masks below `root`."""
        return root / f"blocks-{self.task}-{self.kind}-{self.family}-seed{self.seed}-{self.key}"

    def dense(self) -> Trial:
        """Returns the dense trial that a cut goes on from."""
        family = PENALTY_OF.get(self.family, self.family)
        return Trial(self.task, "dense", family, self.seed, self.strength, quick=self.quick)

    def in_words(self) -> str:
        """Names the trial for a person."""
        strength = f" {self.strength:g}" if self.strength else ""
        density = f" {100 * self.density:g} %" if self.kind == "start" else ""
        return f"{self.task}, {self.family}{strength}, {self.kind}{density}, seed {self.seed}"


def cut_trials(task: str, family: str, cut: str, seed: int, strengths: Iterable[float], quick: bool) -> list[Trial]:
    """Returns a trial of one family and cut for each strength."""
    return [Trial(task, cut, family, seed, strength, quick=quick) for strength in strengths]


def families(cut: str) -> list[str]:
    """Returns the families that are compared in a cut."""
    return [family for family in FAMILIES if cut == "blocks" or family not in ONLY_BLOCKS]


def search(task: str, quick: bool) -> list[Trial]:
    """Returns the trials from which strengths are picked: the same strengths for every family that has one."""
    strengths = protocol_of(task, quick).strengths
    return [trial for cut in CUTS for family in families(cut) if family != "none"
            for trial in cut_trials(task, family, cut, SEARCH_SEED, strengths, quick)]


def score(record: dict[str, Any]) -> float:
    """Returns by what a strength is picked: the geometric mean of the errors at all stops; infinite if it collapsed."""
    errors = [stop["error"] for stop in record.get("stops", [])]
    return float(np.exp(np.mean(np.log(errors)))) if errors and not record["collapsed"] else float("inf")


def picked(task: str, quick: bool, known: dict[str, dict[str, Any]]) -> dict[tuple[str, str], float] | None:
    """Returns (family, cut) -> the strength of the lowest score; None while a trial of the search is missing."""
    trials = search(task, quick)
    if any(trial.key not in known for trial in trials):
        return None
    best: dict[tuple[str, str], Trial] = {}
    for trial in trials:
        before = best.setdefault((trial.family, trial.kind), trial)
        if score(known[trial.key]) < score(known[before.key]):
            best[trial.family, trial.kind] = trial
    return {**{("none", cut): 0.0 for cut in CUTS}, **{name: trial.strength for name, trial in best.items()}}


def reported(task: str, seed: int, strengths: dict[tuple[str, str], float], quick: bool) -> list[Trial]:
    """Returns the trials of one seed that are reported, other than the dense ones."""
    trials = [Trial(task, "uncut", "none", seed, quick=quick)]
    trials += [trial for cut in CUTS for family in families(cut)
               for trial in cut_trials(task, family, cut, seed, [strengths[family, cut]], quick)]
    trials += [Trial(task, "start", family, seed, density=density, quick=quick)
               for density in protocol_of(task, quick).starts for family in STARTS]
    return trials


def chains(trials: list[Trial]) -> list[list[Trial]]:
    """Groups trials into chains that may be trained at the same time: each dense trial, then those that go on from it.

    The order of the first trials of each chain is kept.
    """
    made: dict[Trial, list[Trial]] = {}
    for trial in trials:
        if trial.kind == "start":
            made[trial] = [trial]
        else:
            made.setdefault(trial.dense(), [trial.dense()]).append(trial)
    return list(made.values())
