"""`make sanitize-cpu` fails if a sanitizer misses its planted bug or if a test fails.

The run itself takes minutes, so it is a command and not a test.
"""
from __future__ import annotations

import pathlib
import sys

import pytest

from build_support import toolchain
from scripts import sanitize_cpu, sanitize_plants
from scripts.sanitize_cpu import Run

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOUND = "==1==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x1\nREAD of size 4\n"
UNDEFINED = "tile.h:7:3: runtime error: signed integer overflow: 2 * 2147483647 cannot be represented\n"
needs_sanitizers = pytest.mark.skipif(sanitize_cpu.missing() is not None, reason=str(sanitize_cpu.missing()))


@pytest.mark.parametrize(("done", "finding"), [
    (Run(0, "5 passed in 1 s\n", ""), None),
    (Run(1, "FAILED test_a\n1 failed in 1 s\n", ""), "1 failed in 1 s"),
    (Run(0, "5 passed in 1 s\n", UNDEFINED), UNDEFINED.strip()),
    (Run(1, "", "====\n" + FOUND), FOUND.splitlines()[0]),
    (Run(-6, "", ""), "no output"),
])
def test_verdicts(done, finding):
    assert sanitize_cpu.verdict(done) == finding


@pytest.mark.parametrize(("text", "reports", "failure"), [
    ("plant: address\n", FOUND, None),
    ("plant: address\n", "", "the bug planted for address was not reported: silence proves nothing (plant: address)"),
    ("plant: address\n", UNDEFINED,
     "the bug planted for address was not reported: silence proves nothing (plant: address)"),
    ("no module named torch\n", FOUND, "the plant for address did not start: no module named torch"),
])
def test_a_silent_sanitizer_proves_nothing(monkeypatch, tmp_path, text, reports, failure):
    monkeypatch.setattr(sanitize_cpu, "execute", lambda *_: Run(1, text, reports))
    assert sanitize_cpu.plant(tmp_path, tmp_path / "plants.so", "address") == failure


def test_nothing_is_tested_after_a_missed_plant(monkeypatch, tmp_path, capsys):
    names = []

    def execute(tree, name, command, **more):
        names.append(name)
        return Run(0, sanitize_plants.STARTED, "")

    monkeypatch.setattr(sanitize_cpu, "missing", lambda: None)
    monkeypatch.setattr(sanitize_cpu, "build", lambda folder: folder / "tree")
    monkeypatch.setattr(sanitize_plants, "build", lambda *_: None)
    monkeypatch.setattr(sanitize_cpu, "execute", execute)
    assert sanitize_cpu.main(tmp_path) == 1
    assert names == [f"plant-{kind}" for kind in sanitize_plants.PLANTS]
    assert "silence proves nothing" in capsys.readouterr().err


def test_what_is_missing_in_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(toolchain, "obstacle", lambda: None)
    monkeypatch.setattr(sanitize_cpu, "runtime", lambda cxx, name: None)
    monkeypatch.setattr(toolchain, "compiler", lambda: ["clang++"])
    monkeypatch.setattr(sys, "platform", "linux")
    assert sanitize_cpu.main(tmp_path) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("sanitize-cpu: clang++ has come without libasan.so; take GCC") and shown.count("\n") == 1
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "this needs Linux" in sanitize_cpu.missing()


def test_the_tests_it_runs_exist():
    for path in {*sanitize_cpu.TESTS, *sanitize_cpu.FEWER_TESTS}:
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("quick", [True, False])
def test_quick_runs_the_newest_instruction_set_alone(monkeypatch, tmp_path, quick):
    runs = {}

    def execute(tree, name, command, **more):
        runs[name] = more
        return Run(0, "5 passed in 1 s\n", "")

    (tmp_path / "reports").mkdir()
    monkeypatch.setattr(sanitize_cpu, "missing", lambda: None)
    monkeypatch.setattr(sanitize_cpu, "build", lambda folder: folder / "tree")
    monkeypatch.setattr(sanitize_plants, "build", lambda *_: None)
    monkeypatch.setattr(sanitize_cpu, "plant", lambda *_: None)
    monkeypatch.setattr(sanitize_cpu, "execute", execute)
    assert sanitize_cpu.main(tmp_path, quick) == 0
    others = {} if quick else {f"tests-{isa}": {"MODULI_KERNELS_ISA": isa} for isa in ("avx2", "portable")}
    assert runs == {"tests-newest": {}, **others}


@needs_sanitizers
@pytest.mark.parametrize("flags", [sanitize_cpu.SANITIZE, []], ids=["instrumented", "plain"])
def test_a_planted_bug_is_found_in_an_instrumented_library_only(tmp_path, flags):
    (tmp_path / "tree").symlink_to(ROOT)
    library = tmp_path / "plants.so"
    sanitize_plants.build(library, toolchain.compiler(), flags)
    failure = sanitize_cpu.plant(tmp_path / "tree", library, "address")
    if flags:
        assert failure is None
    else:
        assert "silence proves nothing" in failure
