"""Runs the tests on one wheel in an environment for each pair of Python and torch that the project names.

    make environments    or    python -m scripts.environments [--quick] [--python 3.12] [--torch 2.14] [--discard]

The wheel is built once, by this Python and its torch. For each pair, uv makes an environment and installs the wheel
with its extras, that torch, and the Triton that was released for it. Then the tests run on a copy of this tree in which
`moduli_kernels` is the installed wheel. A table of the results ends the run, and stays in FOLDER/results.md.

A pair cannot be had where this machine has no such Python and uv cannot fetch one, where no package fits, or where the
disk is too full. The table says which and why. A run that was interrupted, or followed by a mended fault, goes on where
it stopped: a pair that has passed these tests on this wheel is not run again (--again runs it).

An environment takes up to 6 GB, because torch for Linux brings its CUDA libraries; uv keeps one copy of each file for
all environments on one disk. UV_TORCH_BACKEND=cpu takes torch's builds without CUDA, which are smaller by gigabytes.

The exit status is 0 if all pairs that could be had have passed, 1 if one has not or none could be had, and 2 after a
sentence about what is missing.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn
from xml.etree import ElementTree

from scripts import wheels

ROOT = Path(__file__).resolve().parent.parent

# What the package supports. tests/tooling/test_environments.py holds pyproject.toml and the workflows to it.
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TORCHES = {"2.10.0": "3.6.0", "2.11.0": "3.6.0", "2.12.1": "3.7.1", "2.13.0": "3.7.1", "2.14.1": "3.8.0",
           "2.15.0": "3.9.0"}  # the last release of each minor version -> the Triton that it was released with
NOT_RELEASED = {("3.10", "2.15.0")}  # torch has no build for these pairs

EXTRAS = ("test", "examples", "lightning")  # the wheel's own, which bring what the tests import
BUILD_TOOLS = ("pip", "setuptools>=77")  # some tests build this project
# The tests run in a copy of these. Their files find each other by their places in the tree.
COPIED = (".ci", ".github", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md",
          "LICENSE", "MANIFEST.in", "Makefile", "README.md", "benchmarks", "build_support", "csrc", "docs", "examples",
          "pyproject.toml", "pyrightconfig.json", "ruff.toml", "scripts", "setup.py", "tests")
# The tests of --quick: what torch's and Python's versions have changed so far is the compiler, ops, pickles, hooks and
# warnings.
QUICK = ("tests/ops", "tests/rnn/test_sparse_rnn_compile.py", "tests/test_compile_training.py",
         "tests/test_pickles.py", "tests/test_release_files.py", "tests/test_errors.py", "tests/test_backends.py",
         "tests/rnn/test_sparse_rnn.py", "tests/penalty/test_autograd.py", "tests/penalty/test_regularize.py",
         "tests/pruning/test_hooks.py", "tests/geometry/test_inhibitors.py")
NEEDED_GB = 8  # for one environment and what uv unpacks on the way


@dataclass
class Result:
    """What became of one pair. `wheel` and `tests` are hashes of what was put together, `reason` is for a pair that
    could not be had, and `failures` holds the names of tests."""

    python: str
    torch: str
    wheel: str
    tests: str
    passed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    reason: str | None = None

    def good(self) -> bool:
        return self.reason is None and not self.failures and self.passed > 0


def fail(sentence: str) -> NoReturn:
    print(f"environments: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def chosen_pairs(pythons: list[str], torches: list[str]) -> list[tuple[str, str]]:
    """Returns the pairs of the lists above that were asked for, all if nothing was; "2.14" stands for 2.14.1."""
    for asked in pythons:
        if asked not in PYTHONS:
            fail(f"--python must be one of {', '.join(PYTHONS)}, got {asked}")
    for asked in torches:
        if not any(matches(asked, version) for version in TORCHES):
            fail(f"--torch must be one of {', '.join(TORCHES)}, got {asked}")
    return [(python, torch) for torch in TORCHES for python in PYTHONS
            if (not pythons or python in pythons) and (not torches or any(matches(t, torch) for t in torches))]


def matches(asked: str, version: str) -> bool:
    return f"{version}.".startswith(f"{asked}.")


def find_uv() -> str:
    """Returns the path of uv, which stands beside this Python or on PATH."""
    found = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return found or fail("uv is missing; pip install uv")


def variables() -> dict[str, str]:
    """Returns the variables of every process here: those of this one, less what would lead Python back to this tree.

    At the end of PATH stand all Pythons of pyenv, since its own commands run only those that it was told to use.
    """
    dropped = ("PYTHON", "MODULI", "VIRTUAL_ENV", "TRITON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    installed = sorted(map(str, pyenv.glob("versions/3.*/bin")))
    return kept | {"PATH": os.pathsep.join([os.environ["PATH"], *installed])}


def words_of(message: str) -> str:
    """Returns the last error of uv in a log as one line of up to 200 letters, without its hints."""
    lines = message.split("\nhint:")[0].splitlines()
    first = max((i for i, line in enumerate(lines) if line.startswith("error:")), default=0)
    text = " ".join(line.strip().removeprefix("error:").removeprefix("cause:").strip() for line in lines[first:])
    return text.strip()[:200] or "uv said nothing"


# ---- The wheel and the tests --------------------------------------------------------------------------

def build_wheel(folder: Path) -> Path:
    """Builds the wheel with the C++ kernels into `folder`, or fails with the compiler's words."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wheel = wheels.build("cpu", folder)
    wheels.contents(wheel, wheels.KINDS["cpu"])
    return wheel


def hash_of_wheel(wheel: Path) -> str:
    """Returns a hash of what the wheel holds. It does not depend on when the wheel was built."""
    with zipfile.ZipFile(wheel) as opened:
        held = sorted((entry.filename, entry.CRC) for entry in opened.infolist() if "RECORD" not in entry.filename)
    return hashlib.sha256(repr(held).encode()).hexdigest()[:12]


def copy_tree(tree: Path) -> None:
    """Copies what the tests need, without the package itself."""
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.py[cod]", "*.lock")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=ignore)
        elif source.exists():  # a source archive has no workflows
            shutil.copy(source, tree / name)


def hash_of_tests(tree: Path, arguments: list[str]) -> str:
    """Returns a hash of the copied tree and of what pytest is told to run."""
    state = hashlib.sha256(repr(arguments).encode())
    for path in sorted(path for path in tree.rglob("*") if path.is_file()):
        state.update(f"{path.relative_to(tree)}\n".encode() + path.read_bytes())
    return state.hexdigest()[:12]


# ---- One pair -----------------------------------------------------------------------------------------

def make(uv: str, python: str, torch: str, wheel: Path, place: Path) -> str | None:
    """Makes the environment of a pair, or completes it. Returns why it cannot be had, or None."""
    if (python, torch) in NOT_RELEASED:
        return f"torch {torch} was not released for Python {python}"
    free = shutil.disk_usage(place.parent).free / 2**30
    if free < NEEDED_GB:
        return f"about {NEEDED_GB} GB of free disk are needed, but {place.parent} has {free:.0f} GB; see --discard"
    log = log_of(place)
    log.unlink(missing_ok=True)
    venv = [uv, "venv", "--clear", "--python", python, place]
    if not (place / "complete").exists() and run(venv, place.parent, log):
        return f"Python {python} is not on this machine, and uv cannot fetch it ({words_of(log.read_text())})"
    # torch comes first and alone, since UV_TORCH_BACKEND would have uv look for Triton beside torch's builds.
    install = [uv, "pip", "install", "--python", place / "bin" / "python"]
    others = ["--reinstall-package", "moduli-kernels", f"{wheel}[{','.join(EXTRAS)}]", *BUILD_TOOLS,
              f"triton=={TORCHES[torch]}; sys_platform == 'linux'"]
    if (run([*install, f"torch=={torch}"], place.parent, log)
            or run([*install, f"torch=={torch}", *others], place.parent, log, without="UV_TORCH_BACKEND")):
        return words_of(log.read_text())
    (place / "complete").touch()
    return None


def log_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.log")


def run(command: list[str | Path], folder: Path, log: Path, without: str = "") -> int:
    """Runs a command in a folder and without a variable, adds what it prints to a log, and returns its exit status."""
    settings = {name: value for name, value in variables().items() if name != without}
    with log.open("a") as opened:
        return subprocess.run(list(map(str, command)), cwd=folder, env=settings, stdin=subprocess.DEVNULL,
                              stdout=opened, stderr=subprocess.STDOUT).returncode


def run_tests(place: Path, tree: Path, arguments: list[str], result: Result) -> None:
    """Checks that the wheel's kernels run in the environment, runs the tests there, and writes down what came out."""
    python, log, report = place / "bin" / "python", log_of(place), place / "report.xml"
    report.unlink(missing_ok=True)
    copy_tree(tree)
    [package] = place.glob("lib/python*/site-packages/moduli_kernels")
    (tree / "moduli_kernels").symlink_to(package)
    if run([python, "-m", "moduli_kernels.env_report", "--check"], tree, log):
        result.failures.append("python -m moduli_kernels.env_report --check")
    status = run([python, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}",
                  *arguments], tree, log)
    if not report.exists():
        result.failures.append(f"pytest ended with {status} and without a report")
        return
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            result.failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in kinds:
            result.skipped += 1
        else:
            result.passed += 1
    if status and not result.failures:
        result.failures.append(f"pytest ended with {status}")


# ---- All pairs ----------------------------------------------------------------------------------------

def table(results: list[Result]) -> str:
    """Returns the results as a Markdown table, and below it the names of failed tests."""
    lines = ["| Python | torch | result | passed | failed | skipped | minutes |", "| --- " * 7 + "|"]
    for r in results:
        if r.reason:
            lines.append(f"| {r.python} | {r.torch} | not to be had: {r.reason} | | | | |")
        else:
            lines.append(f"| {r.python} | {r.torch} | {'passed' if r.good() else 'failed'} | {r.passed} | "
                         f"{len(r.failures)} | {r.skipped} | {r.seconds / 60:.1f} |")
    for r in results:
        lines += [f"{r.python}, {r.torch}: {name}" for name in r.failures]
    return "\n".join(lines)


def main(pairs: list[tuple[str, str]], folder: Path, wheel: Path | None, arguments: list[str], again: bool,
         discard: bool) -> int:
    uv = find_uv()
    folder.mkdir(parents=True, exist_ok=True)
    wheel = wheel or build_wheel(folder / "wheel")
    tree = folder / "tree"
    copy_tree(tree)
    hashes = hash_of_wheel(wheel), hash_of_tests(tree, arguments)
    record = folder / "results.json"
    known = [Result(**each) for each in json.loads(record.read_text())] if record.exists() else []
    results: dict[tuple[str, str], Result] = {(each.python, each.torch): each for each in known}
    for number, (python, torch) in enumerate(pairs, 1):
        before = results.get((python, torch))
        if before and before.good() and (before.wheel, before.tests) == hashes and not again:
            print(f"{number}/{len(pairs)}  Python {python}, torch {torch}: has passed before", flush=True)
            continue
        place, start = folder / f"py{python}-torch{torch}", time.monotonic()
        result = results[python, torch] = Result(python, torch, *hashes)
        print(f"{number}/{len(pairs)}  Python {python}, torch {torch} ...", flush=True)
        result.reason = make(uv, python, torch, wheel, place)
        if result.reason is None:
            run_tests(place, tree, arguments, result)
        result.seconds = time.monotonic() - start
        if discard:
            shutil.rmtree(place, ignore_errors=True)
        record.write_text(json.dumps([asdict(each) for each in results.values()], indent=1))
        print(f"      {result.reason or ('passed' if result.good() else 'failed')}", flush=True)
    chosen = [results[pair] for pair in pairs]
    (folder / "results.md").write_text(table(chosen) + "\n")
    print(table(chosen))
    had = [result for result in chosen if result.reason is None]
    return int(not had or not all(result.good() for result in had))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], help=f"one of {', '.join(PYTHONS)}; may be repeated")
    parser.add_argument("--torch", action="append", default=[], help=f"one of {', '.join(TORCHES)}; may be repeated")
    parser.add_argument("--quick", action="store_true", help="run only the tests that versions have broken so far")
    parser.add_argument("--wheel", type=Path, help="a wheel to use, instead of building one")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "environments")
    parser.add_argument("--jobs", type=int, default=0, help="the number of processes that share the tests")
    parser.add_argument("--again", action="store_true", help="run pairs that have passed, too")
    parser.add_argument("--discard", action="store_true", help="remove each environment after its tests")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    asked = parser.parse_args()
    told = [*(["-n", str(asked.jobs), "--dist", "worksteal"] if asked.jobs else []), *(QUICK if asked.quick else []),
            *asked.pytest]
    if asked.wheel and not asked.wheel.is_file():
        fail(f"--wheel must be a file, got {asked.wheel}")
    sys.exit(main(chosen_pairs(asked.python, asked.torch), asked.folder.resolve(),
                  asked.wheel and asked.wheel.resolve(), told, asked.again, asked.discard))
