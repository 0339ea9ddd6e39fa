"""Shows a recorded run as tables and a picture.

    python -m benchmarks.report [--run FILE] [--no-tests]

The tests of the penalty run first, and there is no report while one fails, since a wrong kernel has no speed. Then it
prints, from the newest run in results/ (or FILE), the goals and what was measured, and every contestant's time,
accuracy and memory. The same is written beside the run as report.md, and speed against n is drawn as penalty.png.
"""
from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys

import torch

from . import report_gpu
from .harness import records
from .penalty import report as penalty
from .penalty.picture import draw
from .penalty.report import Record
from .rnn import report as rnn

ROOT = pathlib.Path(__file__).resolve().parent.parent
TESTS = "tests/penalty/test_penalty*.py"  # pattern of the tests that must pass


def main() -> int:
    """Prints and writes the report, and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=pathlib.Path, help="a run's JSON file (default: the newest in results/)")
    parser.add_argument("--no-tests", action="store_true",
                        help="print what was measured without asking whether the kernels are right today")
    asked = parser.parse_args()
    path = asked.run or records.latest()
    if path is None or not path.exists():
        return _refuse(f"there is no run {path or 'in ' + str(records.RESULTS)}; make one with `pytest benchmarks`.")
    run = records.load(path)
    on_gpu = run.get("device") == "cuda"
    if not asked.no_tests and (reason := red_then(run) or failing_tests(on_gpu and torch.cuda.is_available())):
        return _refuse(reason)
    text = "\n".join(report_gpu.report_lines(run) if on_gpu else
                     penalty.report_lines(run) + rnn.report_lines(run.get("rnn", []), run["quick"]))
    print(text)
    if run["quick"]:
        return 0
    name = "report.md" if run["penalty"] else "report-rnn.md"
    path.with_name(name).write_text(text + "\n")
    picture = draw(run, path.with_name("penalty.png"))
    print(f"\nwritten beside {os.path.relpath(path)}: {name}" + (f", {picture.name}" if picture else ""))
    return 0


def red_then(run: Record) -> str | None:
    """Returns why there is no report of a run of `make gpu` whose own tests failed, or None."""
    bad = [name for name, part in run.get("parts", {}).items() if name in ("tests", "sanitize") and not part["ok"]]
    return f"{' and '.join(bad)} failed in that very run, and a wrong kernel has no speed." if bad else None


def failing_tests(on_gpu: bool = False) -> str | None:
    """Returns None if the penalty's tests pass, else why there is no report."""
    files = sorted(str(path) for path in ROOT.glob(TESTS))
    if not files:
        return f"there are no correctness tests ({TESTS}), so nothing says that the kernels are right."
    print(f"running {' '.join(str(pathlib.Path(f).relative_to(ROOT)) for f in files)} first ...", flush=True)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *files], cwd=ROOT, text=True,
                          capture_output=True,
                          env=os.environ | {"MODULI_KERNELS_TEST_DEVICE": "cuda" if on_gpu else "cpu"})
    if done.returncode == 0:
        return None
    return ("the penalty's tests are red, and a wrong kernel has no speed; see `pytest -x " + TESTS + "`:\n"
            + "\n".join(done.stdout.splitlines()[-5:]))


def _refuse(reason: str) -> int:
    print(f"no report: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
