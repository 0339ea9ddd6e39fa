"""Many processes: DistributedDataParallel and FSDP2 (fully_shard) on gloo and the CPU, started as torchrun does; what
the processes check stands in ddp.py, shards.py and fsdp.py. And that one process
imports nothing of it."""
from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()
         and importlib.util.find_spec("torch.distributed.fsdp")),
    reason="this build of torch has no torch.distributed with gloo",
)
DDP = ("rnn", "lstm", "sparse_rnn", "sparse_rnn_dense_path", "sparse_rnn_auto", "regularizer_inside",
       "gradients_without_exchange", "penalty_in_place")
FSDP = ("penalty_square_13", "penalty_square_16", "penalty_uneven_7_by_5", "penalty_two_rows", "penalty_one_row",
        "penalty_lstm_7", "penalty_gru_5_by_3", "penalty_convolution", "penalty_own_inhibitor", "penalty_float32",
        "penalty_masked", "penalty_replicated", "own_rows_only", "controls", "selection_float32", "selection_mixed",
        "selection_16_bit", "selection_at_random", "pruning_exchanges_counts", "nan_on_one_rank", "rnn",
        "rnn_root_only", "rnn_replicated", "lstm", "gru_root_only", "sparse_rnn", "sparse_rnn_root_only",
        "sparse_rnn_dense_path", "sparse_rnn_auto", "regularizer_inside", "regularizer_inside_root_only",
        "masks_from_before", "checkpoint", "whole_for_a_while", "left_plain", "lottery", "errors")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """kind, ranks -> what each rank's checks raised; one start for all checks of a kind."""
    @cache
    def started(kind: str, ranks: int) -> list[dict]:
        folder = tmp_path_factory.mktemp(kind)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
            [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
                   str(HERE / "worker.py"), kind, str(folder)]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return started


def held(results: list[dict], name: str) -> None:
    for rank, result in enumerate(results):
        assert result[name] is None, f"rank {rank}: {result[name]}"


@pytest.mark.parametrize("name", DDP)
def test_ddp(results, name):
    held(results("ddp", 2), name)


@pytest.mark.parametrize("name", FSDP)
def test_fsdp(results, name):
    held(results("fsdp", 3), name)


def test_the_lists_above_are_all_checks(results):
    assert [set(results("ddp", 2)[0]), set(results("fsdp", 3)[0])] == [set(DDP), set(FSDP)]


def test_one_process_imports_nothing_of_it():
    code = """
import sys, torch, moduli_kernels as mk
rnn = torch.nn.RNN(3, 8)
pruner = mk.MagnitudePruner([(rnn, "weight_hh_l0")])  # no optimizer: torch's own import it
(rnn(torch.ones(2, 1, 3))[0].sum() + mk.regularize(rnn)()).backward()
pruner.step_to(0.5)
late = "torch.distributed.tensor", "moduli_kernels.pruning.sharded"
imported = [name for name in sys.modules if name.startswith(late)]
assert not imported, imported
"""
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
