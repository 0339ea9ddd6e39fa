"""The penalty against its peers and the copy of W, in time and memory.

Every case is one contest: in each round all contestants take one turn, so that what else the machine does hits all
alike, and ratios are taken within a round. pytest-benchmark times ours (its table); the record holds everybody.
"""
from __future__ import annotations

import gc

import pytest

from . import memory
from .cases import CASES, MANIFOLDS
from .contest import Contest

# the compiler of the peers warns of what is no concern here (the suite turns warnings into errors)
pytestmark = pytest.mark.filterwarnings("default")

TRAINED, FROZEN = (case for case in CASES if case.headline and case.n == 4096)
MEMORY = [(TRAINED, "ours"), (TRAINED, "per coordinate"), (TRAINED, "hand-derived, symmetric"), (FROZEN, "ours"),
          (FROZEN, "cached, hand-derived")]
MEMORY += [(case, "ours") for case in CASES if case.n == 2048 and case.manifold_name in MANIFOLDS
           and case.inhibitor_name == "dog"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_penalty(case, benchmark, quick, save):
    contest = Contest(case.smaller() if quick else case)
    contest.verify()
    contest.warm_up(2)
    gc.collect()
    gc.disable()  # a collection would fall into somebody's turn
    try:
        # setup is everybody else's turn, outside of pytest-benchmark's clock
        benchmark.pedantic(contest.ours, setup=contest.others, rounds=contest.case.rounds(quick))
    finally:
        gc.enable()
    record = contest.record()
    for one in record["contestants"][1:]:
        benchmark.extra_info[one["name"]] = f"{one['ratio'][1]:.2f} x our time"
    save("penalty", record)


@pytest.mark.skipif(not memory.available(), reason="peak memory is read from /proc (Linux)")
@pytest.mark.parametrize("case, peer", MEMORY, ids=lambda value: value if isinstance(value, str) else value.name)
def test_memory(case, peer, quick, save, threads):
    if quick and peer != "ours":
        pytest.skip("peers compile for long; a quick run only shows that measuring works")
    save("memory", memory.run(case.name, peer, quick, threads))
