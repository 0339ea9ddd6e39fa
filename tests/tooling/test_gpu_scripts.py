"""`make gpu` without a GPU: its parts with fakes, its refusals and its record.

A tool of compute-sanitizer that misses its planted bug fails the run.
"""
from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.harness import records
from moduli_kernels import runtime
from scripts.gpu import benchmark, command, plants, sanitizer, suite, workload

ROOT = pathlib.Path(__file__).resolve().parents[2]

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")

# --- refusals ---------------------------------------------------------------------------------------------

@without_gpu
@pytest.mark.parametrize("cuda,words", [
    (None, "a torch with CUDA is needed, but"), ("13.0", "torch finds no CUDA GPU here; look at nvidia-smi")])
def test_refuses_without_a_gpu(monkeypatch, cuda, words):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    reason = command.refusal()
    assert words in reason and "`make test`" in reason and "\n" not in reason


def test_refuses_an_old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert command.refusal().startswith("torch >= 2.10 is needed, but")


@without_gpu
def test_the_command_refuses_in_one_sentence():
    done = subprocess.run([sys.executable, "-m", "scripts.gpu", "tests"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1


# --- the suite in shares ----------------------------------------------------------------------------------

def test_shares_fit_the_machine():
    assert [suite.shards(*machine) for machine in ((16, 79), (16, 7), (2, 79), (1, 1))] == [14, 3, 1, 1]


SUITE = """
import os, pytest, time
@pytest.mark.parametrize("k", range(5))
def test_passes(k):
    assert os.environ["MODULI_KERNELS_TEST_DEVICE"] == "cpu"
def test_fails():
    assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="has no device")
def test_skipped(): pass
"""
ON_GPU = "def test_alone(): pass\n"
SLEEPS, DIES = "import time\ndef test_sleeps(): time.sleep(60)\n", "import os\ndef test_dies(): os._exit(7)\n"


def suite_in(folder: pathlib.Path, **files: str) -> str:
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    return str(folder)


def test_all_shares_together(tmp_path):
    outcome = suite.run(3, 60, tmp_path / "log", suite_in(tmp_path, suite=SUITE, cuda_only=ON_GPU), "cpu")
    assert (outcome.passed, outcome.skipped, outcome.on_gpu) == (6, 1, 1) and not outcome.broken and not outcome.ok
    assert [*outcome.failed.values()] == ["AssertionError: one is not two"] and "test_fails" in [*outcome.failed][0]
    assert outcome.reasons == {"has no device": 1}
    assert outcome.summary() == "6 passed, 1 failed, 1 skipped"
    assert json.loads(json.dumps(outcome.details()))["passed"] == 6
    assert (tmp_path / "log").read_text().count("--- share") == 3


def test_green_is_only_what_ran_on_the_gpu(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    green = suite.run(1, 60, tmp_path / "log", suite_in(tmp_path / "a", cuda_only=ON_GPU), "cpu")
    assert green.ok and green.summary() == "1 passed, 0 failed, 0 skipped"
    elsewhere = suite.run(1, 60, tmp_path / "log", suite_in(tmp_path / "b", other=ON_GPU), "cpu")
    assert not elsewhere.ok and elsewhere.summary().endswith("none of them ran on the GPU")


def test_a_share_that_hangs_or_dies_is_reported(tmp_path):
    begun = time.monotonic()
    outcome = suite.run(2, 8, tmp_path / "log", suite_in(tmp_path, a=SLEEPS, b=DIES), "cpu")
    assert time.monotonic() - begun < 40 and not outcome.ok
    assert any("share 1 was ended after 8 s; it was at" in line and "test_sleeps" in line for line in outcome.broken)
    assert any("share 2 died with status 7 at" in line and "test_dies" in line for line in outcome.broken)


# --- compute-sanitizer ------------------------------------------------------------------------------------

FOUND = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at add_up+0x80
========= ERROR SUMMARY: 3 errors
"""
DONE = "workload: 11 cases agree with the reference\n"
RACE = "========= Error: Race reported\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
CLEAN = f"========= COMPUTE-SANITIZER\n{DONE}========= ERROR SUMMARY: 0 errors\n"
CLEAN_RACE = f"{DONE}========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"


def output(text: str, status: int | None = 0) -> sanitizer.Output:
    return sanitizer.Output(status, text)


def test_errors_are_counted():
    assert [sanitizer.errors(t) for t in (FOUND, RACE, CLEAN, CLEAN_RACE, DONE)] == [3, 1, 0, 0, None]


@pytest.mark.parametrize("planted,work,ok,words", [
    (FOUND, CLEAN, True, "found its planted bug and nothing in the kernels"),
    (RACE, CLEAN_RACE, True, "found its planted bug and nothing in the kernels"),
    (CLEAN, None, False, "did not report it: its silence proves nothing"),
    ("Segmentation fault\n", None, False, "ended without a summary: its silence proves nothing (Segmentation fault)"),
    (FOUND, FOUND, False, "found its planted bug and 3 in the kernels: Invalid __global__ read of size 4 bytes"),
    (FOUND, "========= ERROR SUMMARY: 0 errors\n", False, "the kernels did not run to their end"),
    (FOUND, DONE, False, "the kernels did not run to their end"),
])
def test_verdicts(planted, work, ok, words):
    verdict = sanitizer.judge("memcheck", output(planted), None if work is None else output(work))
    assert verdict.ok == ok and words in verdict.reason


def test_verdicts_on_what_took_too_long_or_failed():
    late, found = output("", None), output(FOUND)
    for planted, work in ((late, None), (found, late), (found, output(CLEAN, 1))):
        assert not sanitizer.judge("memcheck", planted, work).ok


@pytest.fixture
def toolkit(monkeypatch):
    monkeypatch.setattr(sanitizer, "find", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(plants, "build", lambda *a: None)


@pytest.mark.parametrize("blind", [None, *plants.TOOLS])
def test_each_tool_is_proved_before_it_is_believed(toolkit, tmp_path, blind):
    """A tool that misses its planted bug fails, and the kernels are not even run under it."""
    calls = []

    def execute(arguments: list[str], seconds: float) -> sanitizer.Output:
        tool = arguments[2] if arguments[0].endswith("compute-sanitizer") else None
        plant = sanitizer.PLANTS in arguments
        calls.append((tool, plant))
        assert tool is None or arguments[1] == "--tool" and (not plant or tool in arguments[3:])
        bug, clean = (RACE, CLEAN_RACE) if tool == "racecheck" else (FOUND, CLEAN)
        return output(DONE if tool is None else bug if plant and tool != blind else clean)

    verdicts = sanitizer.run("90", 60, tmp_path / "log", execute)
    assert calls[0] == (None, False) and {v.tool: v.ok for v in verdicts} == {t: t != blind for t in plants.TOOLS}
    assert ((blind, False) not in calls) if blind else len(calls) == 9
    assert "--- memcheck" in (tmp_path / "log").read_text()


def test_kernels_that_fail_without_a_tool_are_reported(toolkit, tmp_path):
    verdict, = sanitizer.run("90", 60, tmp_path / "log", lambda *a: output("torus is off by 1e+00\n", 1))
    assert not verdict.ok and verdict.reason == "failed without any tool: torus is off by 1e+00"


def test_missing_tools_are_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(sanitizer, "find", lambda program: None if program == "nvcc" else "/x")
    verdict, = sanitizer.run("90", 60, tmp_path / "log")
    assert (verdict.tool, verdict.ok) == ("nvcc", False) and "CUDA toolkit" in verdict.reason


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state", "ignore:.* has no compiled kernel")
@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_the_workload_checks_what_it_runs(monkeypatch, factor):
    """On CPU tensors, the workload passes, and refuses a value and gradients that are off by 1 %."""
    right = workload.mk.moduli_penalty
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self.clone())
    monkeypatch.setattr(workload.mk, "moduli_penalty", lambda *a, **k: right(*a, **k) * factor)

    def everything():
        for rows, columns, settings in workload.CASES:
            workload.run(rows, columns, **settings)
        workload.compressed()

    if factor == 1:
        everything()
    else:
        with pytest.raises(SystemExit, match="is off by"):
            everything()


@pytest.mark.skipif(not runtime.triton_installed, reason="Triton is not installed: pip install triton")
def test_the_planted_reads_compile():
    code = ("from scripts.gpu import plants_triton as p\n"
            "import triton\n"
            "from triton.backends.compiler import GPUTarget\n"
            "from triton.compiler import ASTSource\n"
            "source = ASTSource(p.add_up, {'numbers': '*fp32', 'out': '*fp32', 'COUNT': 'constexpr'}, {(2,): 1024})\n"
            "print(len(triton.compile(source, target=GPUTarget('cuda', 90, 32)).asm['cubin']))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) > 1000, done.stderr


# --- the benchmark's part, and the whole ------------------------------------------------------------------

def test_names_are_dealt():
    assert benchmark.dealt(list("abcde"), 2) == [["a", "c", "e"], ["b", "d"]]
    assert benchmark.dealt(["a"], 8) == [["a"]]


def test_what_the_benchmark_came_to(tmp_path):
    log, record = tmp_path / "log", tmp_path / "20260101-000000.json"
    log.write_text("E  RuntimeError\n1 error\n")
    assert benchmark.outcome(1, record, log).summary == "measured nothing: E  RuntimeError / 1 error"
    times = {"rounds": 60, "time": [1e-6] * 3, "gaps": 0}
    contestants = [{"name": "ours", "kind": "ours", "ratio": [1, 1, 1], **times},
                   {"name": "copy into a buffer", "kind": "floor", "ratio": [0.9, 0.9, 0.9], **times}]
    record.write_text(json.dumps({"quick": False, "memory": [], "penalty": [
        {"case": "torus-dog-8192-frozen", "contestants": contestants}]}))
    good = benchmark.outcome(0, record, log)
    assert good.ok and good.summary.startswith("1 goals reached, 0 not reached,") and len(good.rows) > 10
    assert not benchmark.outcome(None, record, log).ok
    log.write_text("FAILED benchmarks/penalty/bench_penalty_gpu.py::test_penalty[x] - boom\n")
    assert "status 1: FAILED benchmarks" in benchmark.outcome(1, record, log).summary


HEADER = {"driver": None, "quick": False,
          "environment": {"device": "NVIDIA H100 80GB HBM3", "commit": None, "dirty": None,
                          "versions": {"cuda": "13.0", "torch": "2.11", "triton": "3.6"}}}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretends that there is a GPU. Returns the results of the parts, which a test may change."""
    parts = {name: command.Part(True, f"{name} went well") for name in ("build", *command.PARTS)}
    for name in parts:
        monkeypatch.setattr(
            command, name, lambda *a, name=name: parts[name]() if callable(parts[name]) else parts[name])
    monkeypatch.setattr(command, "refusal", lambda: None)
    monkeypatch.setattr(command, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(benchmark, "prepare", lambda *a: None)
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(records, "gpu_header", lambda quick: HEADER)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    return parts


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    return command.main()


def test_all_parts_and_the_record(machine, monkeypatch, tmp_path, capsys):
    machine["bench"] = command.Part(True, "1 goals reached", [], [["n = 8192", ">= 85 %", "90 %", "reached"]])
    assert run(monkeypatch) == 0
    found, = (tmp_path / "results" / "nvidia-h100-80gb-hbm3").glob("*.json")
    content = json.loads(found.read_text())
    assert [*content["parts"]] == ["build", "tests", "sanitize", "bench"] and content["driver"] is None
    assert content["environment"] == HEADER["environment"] and records.NAME.fullmatch(found.name)
    copied, = (tmp_path / "out" / "nvidia-h100-80gb-hbm3").glob("*.json")
    assert copied.read_text() == found.read_text()
    shown = capsys.readouterr().out.splitlines()
    assert "NVIDIA H100 80GB HBM3, driver unknown, CUDA 13.0, torch 2.11, Triton 3.6, commit unknown" in shown
    assert any(line.startswith("n = 8192") and "reached" in line for line in shown)
    assert [line.split()[0] for line in shown[-5:]] == ["build", "tests", "sanitize", "bench", "record"]


def test_a_part_that_fails_stops_no_other(machine, monkeypatch, tmp_path, capsys):
    def broken():
        raise OSError("the disk is gone")

    def late():
        raise subprocess.TimeoutExpired("x", 5)

    machine["tests"], machine["build"] = broken, late
    machine["sanitize"] = command.Part(False, "3 of 4 tools", ["racecheck did not report it"])
    assert run(monkeypatch) == 1
    shown = capsys.readouterr().out
    assert "tests     FAILED" in shown and "broke: OSError: the disk is gone" in shown
    assert "was ended after 5 s" in shown
    assert "sanitize: racecheck did not report it" in shown and "bench     passed" in shown


@pytest.mark.parametrize("part", command.PARTS)
def test_one_part_alone(machine, monkeypatch, tmp_path, part):
    assert run(monkeypatch, part) == 0
    found, = (tmp_path / "results" / "nvidia-h100-80gb-hbm3").glob("*.json")
    assert [*json.loads(found.read_text())["parts"]] == ["build", part]
    assert bool(records.NAME.fullmatch(found.name)) == (part == "bench")
