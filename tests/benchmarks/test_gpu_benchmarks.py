"""The GPU's benchmarks and the tuning script without a GPU: the contest on CPU tensors with a fake stopwatch, goals and
report from its records, the search with a fake timer."""
from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import report, report_gpu
from benchmarks.harness import records, stopwatch
from benchmarks.penalty import contest_gpu, memory, peers, peers_gpu
from benchmarks.penalty.cases_gpu import GPU_CASES, GPU_GOALS, MASKED, MEMORY_CASES
from benchmarks.tuning import penalty as tuning_penalty
from moduli_kernels import runtime

ROOT = pathlib.Path(__file__).parents[2]
HEADER = {"device": "cuda", "driver": "580.1", "l2": 50 * 2**20, "multiprocessors": 132, "quick": False,
          "started": "2026-01-01 00:00:00 +0000",
          "environment": {"commit": "0123456789abcdef", "dirty": False, "device": "NVIDIA H100", "cpu": "a CPU",
                          "cores": 16, "isa": [], "versions": {"cuda": "13.0", "torch": "2.11", "triton": "3.6"}}}


class Clock:
    """In the place of stopwatch.Stopwatch: the host's time of the call."""

    def __init__(self):
        self.gaps, self.host = {}, {}

    def seconds(self, name, call, after=lambda: None) -> float:
        begun = time.perf_counter()
        call()
        taken = time.perf_counter() - begun
        after()
        self.gaps.setdefault(name, 0)
        self.host.setdefault(name, []).append(taken)
        return taken


@pytest.fixture
def on_cpu(monkeypatch):
    """What asks for a GPU asks the CPU, and nothing is compiled."""
    monkeypatch.setattr(stopwatch, "Stopwatch", Clock)
    monkeypatch.setattr(peers, "compiled", lambda function, mode="default": function)
    monkeypatch.setattr(stopwatch, "captured", lambda step: step)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=10_000))
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)


def small(case):
    return dataclasses.replace(case, n=130 if case.kept else 65, device="cpu")


# --- the contest ------------------------------------------------------------------------------------------

@pytest.fixture
def run(on_cpu, monkeypatch) -> dict:
    """The record of every case, few rounds each."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(contest_gpu, "LOOP", 2)
    penalty = [stopwatch.measure_calls("three-layers", peers_gpu.small_net("cpu"), 3, 2)]
    penalty += [contest_gpu.measure(small(case), 2) | {"n": case.n} for case in GPU_CASES]
    measured = [memory.on_gpu(case.name, contest_gpu.GpuContest(small(case)).contestants[0]) for case in MEMORY_CASES]
    return json.loads(json.dumps(HEADER | {"penalty": penalty, "memory": measured}))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_every_goal_is_measured_by_some_case(run, tmp_path):
    rows = report_gpu.rows(run)
    assert len(rows) == len(GPU_GOALS)
    for label, _, value, verdict in rows:
        assert verdict in ("reached", "NOT reached") and value != "-", label
    for one in run["penalty"]:
        assert not one["refused"], one["case"]
    text = "\n".join(report_gpu.report_lines(run))
    assert "NVIDIA H100, driver 580.1, CUDA 13.0" in text and "0123456789ab" in text
    assert text.count("-scaled") >= 2 and "bfloat16" in text
    assert "**Fewer than 50 rounds:**" in text
    masked = next(one for one in run["penalty"] if one["case"] == MASKED.name)
    assert [one["name"] for one in masked["contestants"]] == [
        "ours", "copy into a buffer", "clone", "masked, into .grad", "masked, compressed values"]
    from benchmarks.penalty.picture import draw

    assert draw(run, tmp_path / "penalty.png").exists()


def test_weights_rotate_through_more_than_the_cache(on_cpu):
    contest = contest_gpu.GpuContest(small(GPU_CASES[1]))
    contest.verify()
    ours = contest.contestants[0]
    addresses = set()
    for _ in range(6):
        contest.others()
        contest.ours()
        addresses.add(ours.weight.data_ptr())
        assert ours.weight.grad is None
    size = ours.weight.nbytes
    assert len(addresses) * size > contest_gpu.CACHES * 10_000 - size and len(addresses) >= 2
    # all contestants go through the same copies
    assert {leaf.data_ptr() for leaf in contest.rotations["clone"]} == addresses


def test_a_wrong_kernel_is_not_timed(on_cpu, monkeypatch):
    right = peers.moduli_penalty
    monkeypatch.setattr(peers, "moduli_penalty", lambda *a, **k: right(*a, **k) * 1.001)
    with pytest.raises(AssertionError, match="nothing is timed"):
        contest_gpu.measure(small(GPU_CASES[0]), 3)


def goal_run(case: str, **ratios: float) -> dict:
    """ours, and contestants with these ratios to it; times are ratios in us."""
    kinds = {"copy into a buffer": "floor", "cached": "cached", "masked, into .grad": "masked"}
    made = [{"name": name, "kind": kinds.get(name, "compiled"), "ratio": [ratio] * 3, "time": [ratio * 1e-6] * 3,
             "gaps": 0} for name, ratio in ratios.items()]
    ours = {"name": "ours", "kind": "ours", "ratio": [1.0] * 3, "time": [1e-6] * 3, "gaps": 0}
    return HEADER | {"memory": [], "penalty": [{"case": case, "rounds": 60, "contestants": [ours, *made]}]}


def verdicts(run: dict) -> dict[str, tuple[str, str]]:
    return {label: (value, verdict) for label, _, value, verdict in report_gpu.rows(run) if value != "-"}


@pytest.mark.parametrize("copy,verdict", [(0.86, "reached"), (0.84, "NOT reached")])
def test_the_share_of_the_copy(copy, verdict):
    found = verdicts(goal_run("torus-dog-8192-frozen", **{"copy into a buffer": copy}))
    assert found == {"n = 8192 torus, frozen: bandwidth": (f"{100 * copy:.1f} % [{100 * copy:.1f}, {100 * copy:.1f}]",
                                                           verdict)}


def test_the_fastest_compiled_form_counts():
    found = verdicts(goal_run("sphere-dog-4096-trained", slow=9.0, quick=3.9))
    label = "n = 4096 sphere, trained: fastest torch.compile form"
    assert found[label] == ("3.90 x [3.90, 3.90] (quick)", "NOT reached")


def test_a_masked_weight_is_held_against_the_dense_kernel():
    found = verdicts(goal_run(MASKED.name, **{"masked, into .grad": 0.25}))
    assert found["n = 4096, 98 % masked, trained: into .grad, than dense"] == ("4.00 x [4.00, 4.00]", "reached")


def test_memory_counts_columns():
    run = HEADER | {"penalty": [], "memory": [
        {"case": "torus6-dog-4096-trained", "columns": 6, "beyond": 0.05, "weight": 1.0}]}
    assert verdicts(run)["n = 4096 6-torus, trained: peak memory beyond W and dW"] == ("5.00 % of W", "reached")


@pytest.mark.parametrize("part", ["tests", "sanitize"])
def test_no_report_of_a_run_that_was_red(tmp_path, monkeypatch, capsys, part):
    path = tmp_path / "20260101-000000.json"
    red = {"ok": False, "seconds": 1.0, "summary": "", "lines": []}
    path.write_text(json.dumps(goal_run(MASKED.name) | {"parts": {part: red}}))
    monkeypatch.setattr("sys.argv", ["report", "--run", str(path)])
    assert report.main() == 1
    assert f"{part} failed in that very run" in capsys.readouterr().err


def test_the_newest_run_is_one_that_was_timed(tmp_path):
    for name in ("20260101-000000.json", "20260102-000000-tests.json", "20260103-000000-quick.json", "quick.json"):
        (tmp_path / "gpu").mkdir(exist_ok=True)
        (tmp_path / "gpu" / name).write_text("{}")
    assert records.latest(tmp_path).name == "20260101-000000.json"


def test_the_commit_of_a_tree_without_git(monkeypatch):
    monkeypatch.setattr(records, "environment", lambda: {"commit": None, "dirty": None})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda index: SimpleNamespace(L2_cache_size=1, multi_processor_count=1))
    monkeypatch.setenv(records.COMMIT, "abc-dirty")
    assert records.gpu_header(False)["environment"] == {"commit": "abc", "dirty": True}
    monkeypatch.setenv(records.COMMIT, "abc")
    assert records.gpu_header(False)["environment"] == {"commit": "abc", "dirty": False}
    monkeypatch.delenv(records.COMMIT)
    assert records.gpu_header(False)["environment"] == {"commit": None, "dirty": None}
    assert records.gpu_machine("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# --- tuning -----------------------------------------------------------------------------------------------

tuning = pytest.mark.skipif(not runtime.triton_installed, reason="Triton is not installed: pip install triton")


def present(kind: str):
    from moduli_kernels.triton.penalty.tiles import TABLE

    return TABLE[9][kind]


def cost(tile) -> float:
    """Least at 16 warps, 2 vectors, prefetch, 168 registers, 1024 programs."""
    return (1 + abs(math.log2(tile.warps / 16)) + abs(math.log2(tile.repeat / 2)) + (not tile.prefetch)
            + (tile.registers != 168) + 0.1 * abs(math.log2(tile.programs / 1024)))


@tuning
def test_the_table_and_the_search_know_the_same_kinds():
    from moduli_kernels.triton.penalty.tiles import TABLE, Tile

    for kinds in TABLE.values():
        assert set(kinds) == set(tuning_penalty.WORK)
        for kind, tile in kinds.items():
            assert eval("{" + tuning_penalty.row(kind, tile) + "}", {"Tile": Tile}) == {kind: tile}


@tuning
@pytest.mark.parametrize("kind", tuning_penalty.WORK)
def test_the_search_finds_the_best(kind):
    calls = []

    def timer(kind, tile, n):
        calls.append((tile, n))
        return [cost(tile) * n * (1 + k) for k in range(len(tuning_penalty.WORK[kind][0]))]

    found = tuning_penalty.tune(kind, present(kind), timer)
    assert found.tile == present(kind)._replace(warps=16, repeat=2, prefetch=True, registers=168, programs=1024)
    assert len(calls) == len(set(calls)), "something was timed twice"
    assert found.scores[found.tile] == 1
    text = tuning_penalty.report([found], 9)
    assert f'"{kind}": Tile(16, 2, 1024, True, 168),' in text and "% faster than" in text


@tuning
def test_tiles_that_do_not_run_are_out():
    def timer(kind, tile, n):
        return [math.inf if tile.warps == 16 and n == 8192 else cost(tile)]

    assert tuning_penalty.tune("flat", present("flat"), timer).tile.warps == 8
    with pytest.raises(RuntimeError, match="does not run here; run the tests first"):
        tuning_penalty.tune("flat", present("flat"), lambda kind, tile, n: [math.inf])


@tuning
def test_the_present_tile_stays_within_the_noise():
    before = present("flat")
    found = tuning_penalty.tune("flat", before, lambda kind, tile, n: [1.0 if tile == before else 0.99])
    assert found.tile == before and "stays" in found.in_words()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("arguments,status,words", [
    ([], 2, "tune: launch parameters are measured on a CUDA GPU, and torch finds none here."),
    (["square"], 2, "'square' is no kind of work; there are frozen, flat, curved, some, many")])
def test_tuning_refuses_in_words(arguments, status, words):
    done = subprocess.run([sys.executable, "-m", "benchmarks.tuning.penalty", *arguments], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == status and done.stderr.strip().splitlines()[-1].endswith(words)
