"""The paper's claims, each as pairs of cells of which the first should have the smaller error, and our verdicts."""

from __future__ import annotations

from dataclasses import dataclass

from scipy import stats

from ..training.config import task_class
from ..training.ledger import Ledger
from .tables import Table, all_tables

SEEDS = 5  # so many, at least, both cells must have
LEVEL = 0.05  # of the test
HELD, NOT_HELD, UNDECIDED, NOT_RUN = "held", "not held", "undecided", "not yet run"


@dataclass(frozen=True)
class Claim:
    """A claim: in each of the rows, each net of `better` has a smaller error than each of `worse`."""

    words: str  # the paper's
    table: str
    rows: tuple[str, ...]
    better: tuple[str, ...]  # columns
    worse: tuple[str, ...]

    def pairs(self) -> list[tuple[tuple[str, str], tuple[str, str]]]:
        """Returns pairs of cells (row, column), the one that is claimed to be better first."""
        return [((row, a), (row, b)) for row in self.rows for a in self.better for b in self.worse]


@dataclass(frozen=True)
class LotteryClaim(Claim):
    """A claim that lottery nets, in the first row, are better than their antecedents, in the second."""

    def pairs(self) -> list[tuple[tuple[str, str], tuple[str, str]]]:
        lottery, sparse = self.rows
        return [((lottery, net), (sparse, net)) for net in self.better]


PLAIN = ("l1", "l1_matched", "none")  # l1_matched is our own, the fair control beside the paper's L1
CLAIMS = (
    Claim("navigation at 90 %: the torus holds, L1 and none fail; shuffled is twice as bad", "1", ("90% sparse",),
          ("torus",), (*PLAIN, "shuffled")),
    Claim("navigation at 90 %: torus, Klein bottle and circle hold, the 6-torus fails", "3", ("90% sparse",),
          ("torus", "klein", "circle"), ("torus6",)),
    Claim("navigation: the sphere fails", "3", ("90% sparse",), ("torus",), ("sphere",)),
    Claim("navigation: fixed points in R^3 fail where trained ones work", "2", ("75% sparse", "90% sparse"),
          ("r3 trained",), ("r3 fixed",)),
    LotteryClaim("navigation: some lottery nets beat their antecedents", "3", ("75% lottery", "75% sparse"),
                 ("sphere",), ()),
    Claim("language model at 90 %: the torus beats L1 and none", "4", ("90% sparse",), ("torus",), PLAIN),
    Claim("language model at 98 %: the shuffled control beats the torus", "4", ("98% sparse",), ("shuffled",),
          ("torus",)),
    Claim("adding at 95 %: the torus beats L1, none and shuffled", "8", ("95% sparse",), ("torus",),
          (*PLAIN, "shuffled")),
    Claim("adding at 95 %: trained points beat fixed ones", "9", ("95% sparse",), ("torus trained",), ("torus fixed",)),
    Claim("adding at 95 %: trained points beat fixed ones", "9", ("95% sparse",), ("r3 trained",), ("r3 fixed",)),
)
POINTS = {"error": "at the end", "pruned_error": "as pruning ends"}  # a record's field -> when


@dataclass(frozen=True)
class Verdict:
    """What our trials say about one pair of a claim, at one measuring point."""

    words: str
    pair: str
    verdict: str
    p: float | None  # of Welch's test, two-sided; None where it could not be made
    means: tuple[float, float] | None
    counts: tuple[int, int]  # trials


def errors(table: Table, row: str, column: str, preset: str, ledger: Ledger, seeds: list[int], point: str = "error",
           **changes) -> tuple[list[float], int]:
    """Returns (the errors of a cell's recorded trials, how many more collapsed).

    Args:
        point: "error" (at the end), "pruned_error" (as pruning ends), or "paper" (at the end, in the paper's measure).
    """
    trials = ledger.trials()
    found = [trials.get(table.config(row, column, seed, preset, **changes).key) for seed in seeds]
    recorded = [trial for trial in found if trial is not None]
    whole = [trial for trial in recorded if trial["error"] is not None]
    if point == "paper":
        found = [trial["last"][task_class(table.task).PAPERS_MEASURE] for trial in whole]
    else:
        found = [trial[point] for trial in whole]
    return found, len(recorded) - len(whole)


def judged(words: str, pair: str, better: list[float], worse: list[float]) -> Verdict:
    """Tests the claim that `better` has the smaller mean, by Welch's test."""
    counts = (len(better), len(worse))
    if min(counts) < SEEDS:
        return Verdict(words, pair, NOT_RUN, None, None, counts)
    means = (sum(better) / len(better), sum(worse) / len(worse))
    if len(set(better)) == len(set(worse)) == 1:  # the test needs some spread
        p = float(means[0] == means[1])
    else:
        p = float(stats.ttest_ind(better, worse, equal_var=False).pvalue)
    verdict = UNDECIDED if p >= LEVEL else HELD if means[0] < means[1] else NOT_HELD
    return Verdict(words, pair, verdict, p, means, counts)


def verdicts(names: list[str], preset: str, ledger: Ledger, seeds: list[int], **changes) -> list[Verdict]:
    """Returns the verdicts on all claims of these tables."""
    found = []
    for claim in CLAIMS:
        if claim.table not in names:
            continue
        table = all_tables()[claim.table]
        for (row, a), (other, b) in claim.pairs():
            seen = []
            for point, when in POINTS.items():
                better, _ = errors(table, row, a, preset, ledger, seeds, point, **changes)
                worse, _ = errors(table, other, b, preset, ledger, seeds, point, **changes)
                if (better, worse) in seen:
                    continue  # this protocol has no epochs after pruning, so both points are one
                seen.append((better, worse))
                first = a if row == other else f"{a} {row}"
                pair = f"{first} < {b}{'' if row == other else ' ' + other}, {row.split()[0]}, {when}"
                found.append(judged(claim.words, pair, better, worse))
    return found
