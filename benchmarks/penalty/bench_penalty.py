"""The penalty against its peers and the copy of W, in time and memory.

Every case is one contest: in each round all contestants take one turn, and ratios are taken within a round.
pytest-benchmark's table shows ours; the record holds everybody.
"""
from __future__ import annotations

import pytest

from benchmarks.harness.contest import measure
from benchmarks.penalty import memory
from benchmarks.penalty.cases import CASES, MANIFOLDS
from benchmarks.penalty.contest import PenaltyContest

# The peers' compiler gives warnings, which pytest would turn into errors.
pytestmark = pytest.mark.filterwarnings("default")

TRAINED, FROZEN = (case for case in CASES if case.headline and case.n == 4096)
MEMORY = [(TRAINED, "ours"), (TRAINED, "per coordinate"), (TRAINED, "hand-derived, symmetric"), (FROZEN, "ours"),
          (FROZEN, "cached, hand-derived")]
MEMORY += [(case, "ours") for case in CASES if case.n == 2048 and case.manifold_name in MANIFOLDS
           and case.inhibitor_name == "dog"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_penalty(case, benchmark, quick, save):
    contest = PenaltyContest(case.smaller() if quick else case)
    save("penalty", measure(contest, benchmark, contest.case.rounds(quick), warm_up=2))


@pytest.mark.skipif(not memory.available(), reason="peak memory is read from /proc (Linux)")
@pytest.mark.parametrize("case, peer", MEMORY, ids=lambda value: value if isinstance(value, str) else value.name)
def test_memory(case, peer, quick, save, threads):
    if quick and peer != "ours":
        pytest.skip("peers compile for long; a quick run only shows that measuring works")
    save("memory", memory.run(case.name, peer, quick, threads))
