"""The penalty on a GPU against its peers, the copy of W and its goals; peak memory. `make gpu PART=bench` runs it.

    pytest benchmarks/penalty/bench_penalty_gpu.py [--quick] [-k CASE]
    python -m benchmarks.penalty.bench_penalty_gpu CASE ...

The second command only compiles what the cases need, into torch's and Triton's caches. Several of these at once save
the run the time of its compilers.
"""
from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.harness.stopwatch import measure_calls
from benchmarks.penalty import memory
from benchmarks.penalty.cases_gpu import GPU_CASES, MEMORY_CASES
from benchmarks.penalty.contest_gpu import GpuContest, measure
from benchmarks.penalty.peers_gpu import small_net

# The peers' compiler gives warnings, which pytest would turn into errors.
pytestmark = [pytest.mark.filterwarnings("default"),
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
              pytest.mark.usefixtures("in_time")]
REPLAYS = 20  # of the small net's CUDA graph in a turn


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
    """Compiles what these cases need."""
    for case in GPU_CASES:
        if case.name in names:
            GpuContest(case).verify()


if __name__ == "__main__":
    prepare(sys.argv[1:])
