"""SparseRNN against torch.nn.RNN with the same masked weights; as bench_penalty.py, one contest a case."""
from __future__ import annotations

import gc

import pytest

from .cases_rnn import CASES
from .contest_rnn import RnnContest

# PyTorch warns that its own sparse products are young
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rnn(case, benchmark, quick, save):
    contest = RnnContest(case.smaller() if quick else case)
    contest.verify()
    contest.warm_up()
    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(contest.ours, setup=contest.others, rounds=contest.case.rounds(quick))
    finally:
        gc.enable()
    record = contest.record()
    for one in record["contestants"]:
        if one["name"] != "ours":
            benchmark.extra_info[one["name"]] = f"{one['ratio'][1]:.2f} x our time"
    save("rnn", record)
