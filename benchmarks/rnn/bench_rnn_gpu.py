"""The masked RNN on a GPU against torch.nn.RNN and the vendor's products. `make gpu PART=bench` runs it.

    pytest benchmarks/bench_rnn_gpu.py [--quick] [-k CASE]
"""
from __future__ import annotations

import pytest
import torch

from .cases_rnn_gpu import RNN_GPU_CASES, RnnContest, tf32
from .contest_gpu import measure_calls

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
              pytest.mark.usefixtures("in_time")]
ROUNDS = 60


@pytest.mark.parametrize("case", RNN_GPU_CASES, ids=lambda case: case.name)
def test_rnn(case, quick, save_gpu):
    with tf32():
        calls = RnnContest(case.smaller() if quick else case).calls()
        save_gpu("rnn", measure_calls(case.name, calls, 3 if quick else ROUNDS, 1))
