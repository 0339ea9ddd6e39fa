"""The penalty on a GPU against its peers, the copy of W and its goals; peak memory. `make gpu PART=bench` runs it.

    pytest benchmarks/bench_penalty_gpu.py [--quick] [-k CASE]
    python -m benchmarks.bench_penalty_gpu CASE ...      only compiles what the cases need, into torch's and Triton's
                                                         caches: several of these at once spare the run its compilers
"""
from __future__ import annotations

import sys

import pytest
import torch

from . import memory
from .cases_gpu import GPU_CASES, MEMORY_CASES
from .contest_gpu import GpuContest, measure, measure_calls
from .peers_gpu import small_net

# the compiler of the peers warns of what is no concern here (the suite turns warnings into errors)
pytestmark = [pytest.mark.filterwarnings("default"),
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
              pytest.mark.usefixtures("in_time")]
REPLAYS = 20


def test_three_layers(quick, save_gpu):
    save_gpu("penalty", measure_calls("three-layers", small_net(), 3 if quick else 60, REPLAYS))


@pytest.mark.parametrize("case", MEMORY_CASES, ids=lambda case: case.name)
def test_memory(case, quick, save_gpu):
    contest = GpuContest(case.smaller() if quick else case)
    ours = contest.contestants[0]
    ours.step()
    save_gpu("memory", memory.on_gpu(case.name, ours))


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_penalty(case, quick, save_gpu):
    case = case.smaller() if quick else case
    save_gpu("penalty", measure(case, case.rounds(quick)))


def prepare(names: list[str]) -> None:
    for case in GPU_CASES:
        if case.name in names:
            GpuContest(case).verify()


if __name__ == "__main__":
    prepare(sys.argv[1:])
