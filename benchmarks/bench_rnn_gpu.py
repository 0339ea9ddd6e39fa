"""The masked RNN on a GPU against torch.nn.RNN and the vendor's products. `make gpu PART=bench` runs it.

    pytest benchmarks/bench_rnn_gpu.py [--quick] [-k CASE]
"""
from __future__ import annotations

import os
import time

import pytest
import torch

from .bench_penalty_gpu import DEADLINE
from .cases_rnn_gpu import RNN_GPU_CASES, RnnContest, tf32
from .contest_gpu import measure_calls

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ROUNDS = 60


@pytest.fixture(autouse=True)
def in_time():
    if time.time() > float(os.environ.get(DEADLINE, "inf")):
        pytest.skip("the run's time is up; PART=bench alone has more")
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("case", RNN_GPU_CASES, ids=lambda case: case.name)
def test_rnn(case, quick, save_gpu):
    with tf32():
        calls = RnnContest(case.smaller() if quick else case).calls()
        save_gpu("rnn", measure_calls(case.name, calls, 3 if quick else ROUNDS, 1))
