"""env_report() and environment() give the right facts, and work where anything optional is missing."""
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys

import pytest
import torch

import moduli_kernels as mk
from moduli_kernels import backends
from moduli_kernels.env_report import comparison, env_report, environment

ROOT = pathlib.Path(__file__).resolve().parents[2]


def git(folder, *command):
    return subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@localhost", *command],
        check=True, capture_output=True, text=True).stdout.strip()


def test_environment_is_json_with_the_facts_of_this_process():
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["moduli_kernels"] == mk.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["threads"] == torch.get_num_threads() and 1 <= facts["cores"] <= os.cpu_count()
    assert facts["device"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    assert facts["backends"] == {name: list(state) for name, state in backends.availability().items()}
    assert facts["backends"]["reference"][0] and facts["backend"] in facts["backends"]


def test_vector_units_agree_with_torch():
    isa = environment()["isa"]
    capability = torch.backends.cpu.get_cpu_capability()
    if "AVX2" in capability or "AVX512" in capability:
        assert "avx2" in isa and "fma" in isa
    if "AVX512" in capability:
        assert {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(isa)


def test_report_names_every_backend_and_why(monkeypatch):
    monkeypatch.setattr(backends, "availability", lambda: {
        "reference": (True, "plain PyTorch"), "cpp": (False, "the extension is not built"),
        "triton": (False, "no GPU"), "cuda": (False, "no GPU")})
    lines = [line.split(None, 2) for line in env_report().splitlines()]
    assert ["cpp", "no", "the extension is not built"] in lines
    assert ["reference", "yes", "plain PyTorch"] in lines


def test_report_says_which_backend_is_active():
    with mk.backend("reference"):
        assert "active          reference for cpu tensors" in env_report().splitlines()
        assert environment()["backend"] == "reference" or torch.cuda.is_available()


def test_a_backend_that_cannot_be_had_is_reported_not_raised(monkeypatch):
    monkeypatch.setattr(backends, "forced", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [active] = [line for line in env_report().splitlines() if line.startswith("active")]
    assert "none (backend 'cuda'" in active


def test_gpus_are_listed(monkeypatch):
    from types import SimpleNamespace

    gpu = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    facts, report = environment(), env_report()
    assert facts["device"] == "NVIDIA H100"
    assert facts["gpus"] == [{"name": "NVIDIA H100", "memory_gib": 80.0, "capability": "9.0"}] * 2
    assert "GPU 1           NVIDIA H100, 80.0 GiB, capability 9.0" in report and "for cuda tensors" in report


def test_module_runs_alone_without_compiler_git_or_triton(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib")
    shutil.copytree(ROOT / "moduli_kernels", tmp_path / "moduli_kernels", ignore=ignore)
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "moduli_kernels.env_report"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PATH": str(tmp_path / "empty"), "CXX": "no-such-cxx"})
    assert (done.returncode, done.stderr) == (0, "")
    assert f"moduli_kernels  {mk.__version__}\n" in done.stdout  # no commit: this copy is in no checkout
    assert "compiler        none found" in done.stdout
    assert "\nactive          reference for cpu tensors\n" in done.stdout


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_commit_and_uncommitted_changes(tmp_path, monkeypatch):
    def state():
        facts = environment()
        return facts["commit"], facts["dirty"]

    source = tmp_path / "moduli_kernels" / "source.py"
    source.parent.mkdir()
    source.write_text("one = 1\n")
    ledger = tmp_path / "examples" / "results" / "adding.jsonl"
    ledger.parent.mkdir(parents=True)
    ledger.write_text("{}\n")
    monkeypatch.setattr(sys.modules[environment.__module__], "_package_folder", lambda: source.parent)
    assert state() == (None, None)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "results.json").touch()
    assert state() == (commit, False)  # new files, results for instance, do not count
    ledger.write_text("{}\n{}\n")
    assert state() == (commit, False)  # a run that appends to a tracked record
    source.write_text("one = 2\n")
    assert state() == (commit, True)


def test_check_passes_on_every_backend_and_fails_where_one_is_wrong(monkeypatch):
    said = []
    assert comparison.self_test(said.append)
    assert all(line.startswith("ok  ") for line in said) or said[0].startswith("nothing to check")
    present = [name for name, (there, _) in backends.availability().items() if there and name == "cpp"]
    if not present:
        return
    assert len(said) == 7
    said.clear()
    monkeypatch.setattr(comparison, "TOLERANCE", 1e-12)
    assert not comparison.self_test(said.append)
    assert all(line.startswith("FAIL") and "from the reference" in line for line in said)
    said.clear()

    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(comparison, "rnn_results", broken)
    assert not comparison.self_test(said.append)
    assert sum("RuntimeError: no such kernel" in line for line in said) == 2 and len(said) == 7


def test_check_counts_nan_as_wrong():
    nan, ones = torch.full((2,), float("nan")), torch.ones(2)
    assert comparison.relative_difference(nan, ones) == float("inf") and comparison.relative_difference(ones, ones) == 0
    assert comparison.relative_difference(torch.zeros(2), torch.zeros(2)) == 0
    assert comparison.relative_difference(ones * 1.01, ones) == pytest.approx(0.01, rel=1e-5)


def test_check_without_any_kernel_says_so(monkeypatch):
    monkeypatch.setattr(comparison, "availability", lambda: {"reference": (True, ""), "cpp": (False, "not built")})
    said = []
    assert comparison.self_test(said.append) and "only the reference" in said[0]
