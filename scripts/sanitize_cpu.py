"""Runs the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

    make sanitize-cpu    or    python -m scripts.sanitize_cpu [--quick] [FOLDER]

It builds the library of csrc/cpu/ with both sanitizers beside a copy of the package and its tests in FOLDER (default
build/sanitize, kept for the next run). Each sanitizer must first find the bug that sanitize_plants.py plants for it.
Then the tests run that go through every loop of the library. Python and torch are not instrumented: the sanitizers
watch what they allocate through malloc, and do not look for leaks, because Python has many.

--quick runs fewer tests, and only on the machine's newest instruction set, as continuous integration does. It takes 2
or 3 minutes on 2 cores, and about 6 without --quick. It needs Linux and GCC. The exit status is 0, or 1 after the
first finding, or 2 after a sentence about what is missing.
"""
from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace

from build_support import compiling, products, toolchain
from scripts import sanitize_plants

ROOT = pathlib.Path(__file__).resolve().parent.parent

# "undefined" does not include float-cast-overflow, which happens when a NaN or huge coordinate becomes the index of a
# table. Reads of a null pointer or past an object are left to AddressSanitizer: checking them twice doubles the
# compiler's time.
SANITIZE = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize=null,object-size,vptr",
            "-fno-sanitize-recover=address", "-fno-omit-frame-pointer", "-fno-var-tracking", "-g1"]
FLAGS = ["-O1", *SANITIZE]  # with more optimization, the compiler takes longer than the tests gain
LIBRARIES = ("libasan.so", "libubsan.so")
UNDEFINED = "runtime error: "  # each line that UndefinedBehaviorSanitizer reports contains it

# These tests cover every op, manifold, inhibitor, dtype, kind of mask and size of strip. They run on the machine's
# newest instruction set.
TESTS = ["tests/penalty/test_mirrored.py", "tests/penalty/test_kept_entries.py", "tests/penalty/test_in_place.py",
         "tests/penalty/test_grouped.py", "tests/rnn/test_rnn_cpp.py", "tests/rnn/test_rnn_cpp_blocks.py",
         "tests/ops/test_masked_rnn_op.py", "tests/rnn/test_sparse_rnn.py", "tests/penalty/test_penalty.py"]
# Left out are tests of plain PyTorch, of autograd alone, of gigabytes and of large matrices.
SELECTION = ("not fallback and not callable and not opcheck and not gradcheck and not derivatives and not beyond_2_31 "
             "and not past_the_caches and not at_size and not thousand_steps and not other_instruction_sets")
OTHER_ISAS = ("avx2", "portable")  # the same loops, compiled for older machines, run fewer tests
FEWER_TESTS = ["tests/penalty/test_mirrored.py", "tests/penalty/test_kept_entries.py", "tests/rnn/test_rnn_cpp.py",
               "tests/rnn/test_rnn_cpp_blocks.py"]
FEWER = "not sparse_masks_and_compressed_rows"  # only the newest instruction set runs this test, and not with --quick


@dataclass
class Run:
    """A command that ran under the sanitizers: its exit status, what it printed, and what they reported."""

    status: int
    text: str
    reports: str


def missing() -> str | None:
    """Says in one sentence why this cannot run here; returns None if it can."""
    if sys.platform != "linux":
        return "this needs Linux: elsewhere the sanitizers cannot be loaded into a Python made without them"
    obstacle = toolchain.obstacle()
    if obstacle:
        return obstacle
    cxx = toolchain.compiler()
    assert cxx is not None  # obstacle() has checked this
    for name in LIBRARIES:
        if runtime(cxx, name) is None:
            return f"{cxx[0]} has come without {name}; take GCC: CXX=g++ (Debian and Ubuntu: apt install g++)"
    return None


def runtime(cxx: list[str], name: str) -> pathlib.Path | None:
    """Returns the path of a shared library of GCC, or None with Clang, which has other names for its libraries."""
    # Clang prints the bare name of a file that it does not have.
    done = subprocess.run([*cxx, f"-print-file-name={name}"], text=True, capture_output=True)
    path = pathlib.Path(done.stdout.strip())
    return path.resolve() if path.is_absolute() and path.exists() else None


def build(folder: pathlib.Path) -> pathlib.Path:
    """Makes a tree in `folder` that holds the package with an instrumented library, and its tests."""
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib", ".*.partial")
    for name in ("moduli_kernels", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tree)
    product = products.ops_library()
    product = replace(product, flags=[*product.flags, *FLAGS], link_flags=[*SANITIZE, *product.link_flags])
    compiling.build([product], folder / "objects", tree / "moduli_kernels")
    return tree


def environment(tree: pathlib.Path, log: pathlib.Path, **more: str) -> dict[str, str]:
    """Returns the environment of a process that loads the instrumented library.

    AddressSanitizer writes one file a process beside `log`. UndefinedBehaviorSanitizer ignores log_path when both are
    loaded, and writes to standard error.
    """
    cxx = toolchain.compiler()
    assert cxx is not None
    # libstdc++ is loaded with them, or else the interceptor of C++ exceptions, which torch throws often, has nothing to
    # call.
    preloaded = [runtime(cxx, name) for name in (*LIBRARIES, "libstdc++.so.6")]
    # The sanitizer poisons the heap with the byte that tests/conftest.py uses without it.
    address = ("detect_leaks=0", "allocator_may_return_null=1", "malloc_fill_byte=127",
               f"max_malloc_fill_size={1 << 28}", "quarantine_size_mb=64", f"log_path={log}")
    return os.environ | {
        "LD_PRELOAD": " ".join(map(str, filter(None, preloaded))), "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1",
        "ASAN_OPTIONS": ":".join(address), "UBSAN_OPTIONS": "print_stacktrace=1", **more}


def execute(tree: pathlib.Path, name: str, command: list[str], **more: str) -> Run:
    log = tree.parent / "reports" / name
    log.parent.mkdir(exist_ok=True)
    for old in log.parent.glob(f"{name}.*"):
        old.unlink()
    done = subprocess.run([sys.executable, *command], cwd=tree, env=environment(tree, log, **more), text=True,
                          errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    reports = [path.read_text(errors="replace") for path in sorted(log.parent.glob(f"{name}.*"))]
    reports += [line for line in done.stdout.splitlines() if UNDEFINED in line]
    return Run(done.returncode, done.stdout, "\n".join(reports))


def plant(tree: pathlib.Path, library: pathlib.Path, kind: str) -> str | None:
    """Returns None if the sanitizer found the bug that was planted for it, or else a sentence."""
    done = execute(tree, f"plant-{kind}", [str(ROOT / "scripts" / "sanitize_plants.py"), kind, str(library)])
    if sanitize_plants.STARTED not in done.text:
        return f"the plant for {kind} did not start: {last(done.text)}"
    if sanitize_plants.PLANTS[kind] not in done.reports:
        return f"the bug planted for {kind} was not reported: silence proves nothing ({last(done.text)})"
    return None


def verdict(done: Run) -> str | None:
    """Returns None if the tests passed without a report, or else the first finding."""
    if done.reports:
        return first(done.reports)
    return last(done.text) if done.status else None


def first(reports: str) -> str:
    lines = (line.strip() for line in reports.splitlines())
    return next((line for line in lines if UNDEFINED in line or "ERROR: AddressSanitizer" in line), reports[:300])


def last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def main(folder: pathlib.Path, quick: bool = False) -> int:
    obstacle = missing()
    if obstacle:
        print(f"sanitize-cpu: {obstacle}", file=sys.stderr)
        return 2
    start = time.monotonic()

    def say(words: str) -> None:
        print(f"{time.monotonic() - start:5.0f} s  {words}", flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    tree = build(folder)
    cxx = toolchain.compiler()
    assert cxx is not None
    plants = folder / "plants.so"
    sanitize_plants.build(plants, cxx, SANITIZE)
    say("built")
    failures = []
    for kind in sanitize_plants.PLANTS:
        failure = plant(tree, plants, kind)
        say(failure or f"{kind}: found its planted bug")
        failures += [failure] * (failure is not None)
    # With --capture=sys, what the library writes to standard error is shown for tests that pass too.
    pytest = ["-m", "pytest", "-q", "-x", "--capture=sys", "-p", "no:cacheprovider", "-k"]
    fewer = [f"{SELECTION} and {FEWER}", *FEWER_TESTS]
    runs = {"newest": (fewer if quick else [SELECTION, *TESTS], {})}
    if not quick:
        runs |= {isa: (fewer, {"MODULI_KERNELS_ISA": isa}) for isa in OTHER_ISAS}
    for name, (chosen, settings) in () if failures else runs.items():
        done = execute(tree, f"tests-{name}", [*pytest, *chosen], **settings)
        failure = verdict(done)
        say(f"tests, {name} instruction set: {failure or last(done.text)}")
        failures += [failure] * (failure is not None)
        (tree.parent / "reports" / f"{name}.txt").write_text(done.text + done.reports)
    if failures:
        print(f"sanitize-cpu: {failures[0]}; all is in {folder / 'reports'}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=ROOT / "build" / "sanitize")
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    sys.exit(main(chosen.folder.resolve(), chosen.quick))
