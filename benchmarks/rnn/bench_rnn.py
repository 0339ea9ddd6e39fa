"""SparseRNN against torch.nn.RNN with the same masked weights; every case is one contest."""
from __future__ import annotations

import pytest

from benchmarks.harness.contest import measure
from benchmarks.rnn.cases import CASES
from benchmarks.rnn.contest import RnnContest

# PyTorch warns that its own sparse products are in beta state.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rnn(case, benchmark, quick, save):
    contest = RnnContest(case.smaller() if quick else case)
    save("rnn", measure(contest, benchmark, contest.case.rounds(quick), warm_up=1))
