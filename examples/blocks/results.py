"""What the records of the study say: curves of error against speed, paired differences, intervals, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..training.ledger import Ledger
from .plan import CUTS, STARTS, Trial, families, picked, protocol_of
from .speed import latest

DRAWS = 10_000  # of the bootstrap
ENOUGH = 5  # seeds; with fewer an interval says little
NEAR_DENSE = 1.5  # "a given error" of nets that are sparse from the start: so many times the dense net's
Curve = tuple[str, str]  # family and cut
OURS: Curve = ("manifold", "blocks")


@dataclass
class Point:
    """A net at one stop of its cut. Speeds are times as fast as torch.nn.RNN; NaN where nobody has measured them."""

    sparsity: float
    density: float
    filled: float
    error: float
    steps: int
    seconds: float
    training: float
    inference: float
    training_ms: float
    inference_ms: float


@dataclass
class Results:
    """All that is recorded of one task.

    strengths: (family, cut) -> the strength that was picked; None while the search is not complete.
    dense: (family, cut) -> seed -> the record of the dense net that was cut.
    curves: (family, cut) -> seed -> the points of its stops.
    uncut: seed -> errors of the net that was trained on without a cut, at the same steps.
    starts: (family, density) -> seed -> record of the net that was sparse from the start.
    collapsed: nets whose training ended early, in words; they are in none of the above.
    """

    strengths: dict[Curve, float] | None
    dense: dict[Curve, dict[int, dict[str, Any]]] = field(default_factory=dict)
    curves: dict[Curve, dict[int, list[Point]]] = field(default_factory=dict)
    uncut: dict[int, list[float]] = field(default_factory=dict)
    starts: dict[tuple[str, float], dict[int, dict[str, Any]]] = field(default_factory=dict)
    collapsed: list[str] = field(default_factory=list)

    def seeds(self) -> list[int]:
        """Returns the seeds of which every curve is there."""
        each = [set(self.curves.get((family, cut), {})) for cut in CUTS for family in families(cut)]
        return sorted(set.intersection(*each))


def read(task: str, quick: bool, seeds: int, ledger: Ledger) -> Results:
    """Reads what the ledger has of a task's seeds 0, 1, ..., `seeds` - 1."""
    known, measured = ledger.trials(), latest(ledger)
    protocol = protocol_of(task, quick)
    found = Results(picked(task, quick, known))
    if found.strengths is None:
        return found
    for seed in range(seeds):
        for cut in CUTS:
            for family in families(cut):
                trial = Trial(task, cut, family, seed, found.strengths[family, cut], quick=quick)
                dense, record = known.get(trial.dense().key), known.get(trial.key)
                if dense is None or record is None:
                    continue
                if record["collapsed"]:
                    found.collapsed.append(f"{trial.in_words()}: {record['collapsed']}")
                    continue
                found.dense.setdefault((family, cut), {})[seed] = dense
                found.curves.setdefault((family, cut), {})[seed] = [
                    _point(stop, measured.get((trial.key, stop["sparsity"]))) for stop in record["stops"]]
        uncut = known.get(Trial(task, "uncut", "none", seed, quick=quick).key)
        if uncut is not None and not uncut["collapsed"]:
            found.uncut[seed] = [stop["error"] for stop in uncut["stops"]]
        for density in protocol.starts:
            for family in STARTS:
                record = known.get(Trial(task, "start", family, seed, density=density, quick=quick).key)
                if record is not None and not record["collapsed"]:
                    found.starts.setdefault((family, density), {})[seed] = record
    return found


def _point(stop: dict[str, float], speed: dict[str, Any] | None) -> Point:
    nan = float("nan")
    speed = speed or {}
    return Point(**{name: stop[name] for name in ("sparsity", "density", "filled", "error", "steps", "seconds")},
                 training=speed.get("training_ratio", nan), inference=speed.get("inference_ratio", nan),
                 training_ms=1000 * speed.get("training", nan), inference_ms=1000 * speed.get("inference", nan))


# --- statistics ------------------------------------------------------------------------------------------------

def interval(values: Sequence[float] | np.ndarray,
             statistic: Callable[[np.ndarray], np.ndarray] = lambda drawn: drawn.mean(1)) -> tuple[float, float]:
    """Returns the bootstrap's 95 % interval (percentiles) of a statistic.

    Args:
        values: one a seed, (seeds,) or (seeds, ...).
        statistic: gives (draws,) of what was drawn, (draws, seeds) or (draws, seeds, ...); by default the mean.
    """
    values = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.percentile(statistic(values[drawn]), [2.5, 97.5])
    return float(low), float(high)


def speed_at(error: float, speeds: Sequence[float], errors: Sequence[float]) -> float:
    """Returns the highest speed at which a curve has at most this error.

    Points are joined by straight lines in the logarithms of speed and error. A curve whose last point is better than
    the error ends there, so it counts with the highest speed that was measured; one without such a point counts as 1,
    the speed of the dense net.

    Args:
        speeds: of the points, in the order of the cut.
        errors: of the same points, positive.
    """
    s, e, level = np.log(speeds), np.log(errors), np.log(error)
    best = -np.inf
    for i in range(len(s)):
        if e[i] <= level:
            best = max(best, s[i])
    for i in range(len(s) - 1):
        if (e[i] - level) * (e[i + 1] - level) < 0:
            best = max(best, s[i] + (s[i + 1] - s[i]) * (level - e[i]) / (e[i + 1] - e[i]))
    return float(np.exp(best)) if np.isfinite(best) else 1.0


def advantages(results: Results, speed: str) -> tuple[list[Curve], np.ndarray]:
    """Compares the speed of geometric blocks with every rival's at equal error.

    At each stop of the geometric blocks' net, its speed is divided by the rival's highest speed at the same error, with
    the same seed; the logarithms of the ratios are averaged over the stops.

    Args:
        speed: "training" or "inference".

    Returns:
        The rivals, all other curves; and their averages, (rivals, seeds), natural logarithms.
    """
    seeds = results.seeds()
    rivals = [curve for curve in results.curves if curve != OURS]
    found = np.empty((len(rivals), len(seeds)))
    for column, seed in enumerate(seeds):
        ours = results.curves[OURS][seed]
        for row, rival in enumerate(rivals):
            points = results.curves[rival][seed]
            speeds = [1.0, *(getattr(point, speed) for point in points)]
            errors = [results.dense[rival][seed]["error"], *(point.error for point in points)]
            found[row, column] = np.mean([np.log(getattr(point, speed) / speed_at(point.error, speeds, errors))
                                          for point in ours])
    return rivals, found


def verdict(results: Results, speed: str) -> str:
    """Says in one sentence how geometric blocks compare with the best of their rivals at equal error.

    The best rival is the one against which they do worst in the mean over seeds; it is found anew in every draw of the
    bootstrap, so that the interval knows that it was chosen.
    """
    seeds = results.seeds()
    if not seeds:
        return "There is no verdict yet: no seed has all its nets."
    measured = [getattr(point, speed) for by_seed in results.curves.values() for seed in seeds
                for point in by_seed[seed]]
    if not np.isfinite(measured).all():
        return "There is no verdict yet: run `python -m examples.blocks speed` first."
    rivals, ratios = advantages(results, speed)
    worst = int(ratios.mean(1).argmin())
    times = float(np.exp(ratios[worst].mean()))
    low, high = (float(np.exp(end)) for end in interval(ratios.T, lambda drawn: drawn.mean(1).min(1)))
    family, cut = rivals[worst]
    step = "a training step" if speed == "training" else "an inference step"
    said = (f"At equal error, {step} of geometric blocks is {times:.2f} times as fast as that of the best of the "
            f"rivals ({family}, {cut}) [{low:.2f}, {high:.2f}], {len(seeds)} seeds")
    if len(seeds) < ENOUGH:
        return f"{said}: too few seeds for a verdict."
    if low > 1:
        return f"{said}: geometry pays."
    return f"{said}: geometry does not pay." if high < 1 else f"{said}: no difference can be told."


def reached(record: dict[str, Any], error: float) -> tuple[float, float] | None:
    """Returns (steps, seconds) at the first measurement at most this error; None if there is none."""
    return next(((steps, seconds) for steps, seconds, each in record["history"] if each <= error), None)
