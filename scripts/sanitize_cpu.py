"""`make sanitize-cpu`: the C++ kernels of the CPU under AddressSanitizer and UndefinedBehaviorSanitizer.

    python scripts/sanitize_cpu.py [--quick] [FOLDER]     FOLDER keeps the build for the next run; build/sanitize

Builds csrc/'s CPU library with both sanitizers beside a copy of the package and its tests, has each sanitizer find its
planted bug (sanitize_plants.py), then runs the tests that go through every loop of the library. Python and torch are
not instrumented: what they allocate is watched through malloc, and leaks, of which Python has many, are not looked for.
--quick, as continuous integration runs it: fewer tests, and the machine's newest instruction set alone. Linux with GCC;
2 or 3 minutes on 2 cores, about 6 without --quick. Ends with 0, or 1 and the first finding, or 2 and what is missing.
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

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import native_build  # noqa: E402
import sanitize_plants  # noqa: E402

# float-cast-overflow is no part of "undefined": a NaN or huge coordinate turned into an index of a table is one.
# What reads a null pointer or past an object AddressSanitizer sees too; looking twice doubles the compiler's time.
SANITIZE = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize=null,object-size,vptr",
            "-fno-sanitize-recover=address", "-fno-omit-frame-pointer", "-fno-var-tracking", "-g1"]
FLAGS = ["-O1", *SANITIZE]  # above it the compiler takes longer than the tests gain
LIBRARIES = ("libasan.so", "libubsan.so")
UNDEFINED = "runtime error: "  # in each line that UndefinedBehaviorSanitizer reports

# Every op, manifold, inhibitor, dtype, kind of mask and size of strip, on the newest instruction set of the machine.
TESTS = ["tests/test_mirrored.py", "tests/test_kept_entries.py", "tests/test_in_place.py",
         "tests/test_several_layers.py", "tests/test_rnn_cpp.py", "tests/test_masked_rnn_op.py",
         "tests/test_sparse_rnn.py", "tests/test_penalty.py"]
# Not: what runs plain PyTorch, what is about autograd alone, what takes gigabytes, and large matrices.
SELECTION = ("not fallback and not callable and not opcheck and not gradcheck and not derivatives and not beyond_2_31 "
             "and not past_the_caches and not at_size and not thousand_steps and not other_instruction_sets")
OTHER_ISAS = ("avx2", "portable")  # the same loops as compiled for lesser machines, on fewer tests
FEWER_TESTS = ["tests/test_mirrored.py", "tests/test_kept_entries.py", "tests/test_rnn_cpp.py"]
FEWER = "not sparse_masks_and_compressed_rows"  # each manifold, inhibitor and power: in the full run, on the newest


@dataclass
class Run:
    """A command under the sanitizers: its status, what it printed, and what they reported."""

    status: int
    text: str
    reports: str


def missing() -> str | None:
    """What keeps this from running here, as a sentence; None if nothing does."""
    if sys.platform != "linux":
        return "this needs Linux: elsewhere the sanitizers cannot be loaded into a Python made without them"
    obstacle = native_build.obstacle()
    if obstacle:
        return obstacle
    cxx = native_build.compiler()
    assert cxx is not None  # obstacle() has looked
    for name in LIBRARIES:
        if runtime(cxx, name) is None:
            return f"{cxx[0]} has come without {name}; take GCC: CXX=g++ (Debian and Ubuntu: apt install g++)"
    return None


def runtime(cxx: list[str], name: str) -> pathlib.Path | None:
    """Where a shared library of GCC's lies; Clang, which names its own differently, answers with the bare name."""
    told = subprocess.run([*cxx, f"-print-file-name={name}"], text=True, capture_output=True).stdout.strip()
    path = pathlib.Path(told)
    return path.resolve() if path.is_absolute() and path.exists() else None


def build(folder: pathlib.Path) -> pathlib.Path:
    """A tree in `folder` that holds the package with an instrumented library, and its tests."""
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib", ".*.partial")
    for name in ("moduli_kernels", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tree)
    product = native_build.ops_library()
    product = replace(product, flags=[*product.flags, *FLAGS], link_flags=[*SANITIZE, *product.link_flags])
    native_build.build([product], folder / "objects", tree / "moduli_kernels")
    return tree


def environment(tree: pathlib.Path, log: pathlib.Path, **more: str) -> dict[str, str]:
    """What a process needs to run the instrumented library. AddressSanitizer writes to files beside `log`, one a
    process; its partner, loaded beside it, takes no notice of log_path and writes to standard error."""
    cxx = native_build.compiler()
    assert cxx is not None
    # libstdc++ beside them: else the interceptor of C++ exceptions, of which torch throws many, finds none to call.
    preloaded = [runtime(cxx, name) for name in (*LIBRARIES, "libstdc++.so.6")]
    # The heap is poisoned by the sanitizer, as tests/conftest.py does without it, with the same byte.
    address = ("detect_leaks=0", "allocator_may_return_null=1", "malloc_fill_byte=127",
               f"max_malloc_fill_size={1 << 28}", "quarantine_size_mb=64", f"log_path={log}")
    return os.environ | {
        "LD_PRELOAD": " ".join(map(str, filter(None, preloaded))), "PYTHONMALLOC": "malloc",
        "PYTHONPATH": os.pathsep.join([str(tree), str(ROOT / "scripts")]), "PYTHONDONTWRITEBYTECODE": "1",
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
    """None if the sanitizer found the bug that was planted for it, else a sentence."""
    done = execute(tree, f"plant-{kind}", [str(ROOT / "scripts" / "sanitize_plants.py"), kind, str(library)])
    if sanitize_plants.STARTED not in done.text:
        return f"the plant for {kind} did not start: {last(done.text)}"
    if sanitize_plants.PLANTS[kind] not in done.reports:
        return f"the bug planted for {kind} was not reported: silence proves nothing ({last(done.text)})"
    return None


def verdict(done: Run) -> str | None:
    """None if the tests passed without a report, else the first finding."""
    if done.reports:
        return first(done.reports)
    return last(done.text) if done.status else None


def first(reports: str) -> str:
    told = (line.strip() for line in reports.splitlines())
    return next((line for line in told if UNDEFINED in line or "ERROR: AddressSanitizer" in line), reports[:300])


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
    cxx = native_build.compiler()
    assert cxx is not None
    plants = folder / "plants.so"
    sanitize_plants.build(plants, cxx, SANITIZE)
    say("built")
    failures = []
    for kind in sanitize_plants.PLANTS:
        failure = plant(tree, plants, kind)
        say(failure or f"{kind}: found its planted bug")
        failures += [failure] * (failure is not None)
    # --capture=sys: what the library writes to standard error comes through, also of tests that pass
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
