"""The masked RNN on a GPU against torch.nn.RNN and the vendor's products. `make gpu PART=bench` runs it.

    pytest benchmarks/rnn/bench_rnn_gpu.py [--quick] [-k CASE]
"""
from __future__ import annotations

import pytest
import torch

from benchmarks.harness.stopwatch import measure_calls
from benchmarks.rnn.cases_gpu import RNN_GPU_CASES
from benchmarks.rnn.contest_gpu import RnnGpuContest, tf32

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
              pytest.mark.usefixtures("in_time")]
ROUNDS = 60


@pytest.mark.parametrize("case", RNN_GPU_CASES, ids=lambda case: case.name)
def test_rnn(case, quick, save_gpu):
    with tf32():
        calls = RnnGpuContest(case.smaller() if quick else case).calls()
        save_gpu("rnn", measure_calls(case.name, calls, 3 if quick else ROUNDS, 1))
