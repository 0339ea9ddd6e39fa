"""Tables and pictures of a recorded run.

    python -m benchmarks.report [--run FILE] [--no-tests]

Runs the tests of the penalty first and refuses while one fails: a wrong kernel has no speed. Then prints, from the
newest run in results/ (or FILE), the figures to be reached and what was measured, every contestant's time, accuracy
and memory, writes the same as report.md beside the run, and draws speed against n as penalty.png.
"""
from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
from typing import Any

import torch

from . import records, report_gpu, report_rnn
from .cases import ACCURACY_GOALS, GOALS, MEMORY_GOAL, Goal
from .picture import draw

ROOT = pathlib.Path(__file__).resolve().parent.parent
TESTS = "tests/test_penalty*.py"
QUIET = 0.05  # of the machine's time; what others may use while we measure
Record = dict[str, Any]


def main() -> int:
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
    text = "\n".join(report_gpu.report(run) if on_gpu else report(run))
    print(text)
    if run["quick"]:
        return 0
    name = "report.md" if run["penalty"] else "report-rnn.md"
    path.with_name(name).write_text(text + "\n")
    picture = draw(run, path.with_name("penalty.png"))
    print(f"\nwritten beside {os.path.relpath(path)}: {name}" + (f", {picture.name}" if picture else ""))
    return 0


def red_then(run: Record) -> str | None:
    """Why there is no report of a run of `make gpu` whose own tests failed."""
    bad = [name for name, part in run.get("parts", {}).items() if name in ("tests", "sanitize") and not part["ok"]]
    return f"{' and '.join(bad)} failed in that very run, and a wrong kernel has no speed." if bad else None


def failing_tests(on_gpu: bool = False) -> str | None:
    """None if the penalty's tests pass, else why there is no report."""
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


# --- tables ----------------------------------------------------------------------------------------------------

def report(run: Record) -> list[str]:
    """The report as lines of Markdown."""
    environment = run["environment"]
    commit = (environment["commit"] or "unknown")[:12] + (" with uncommitted changes" if environment["dirty"] else "")
    lines = [
        "# Measured" + (" (QUICK: small sizes, no figures)" if run["quick"] else ""), "",
        f"{run['started']}, commit {commit}, {environment['cpu']}, {environment['cores']} cores, {run['threads']} "
        f"threads, {' '.join(environment['isa'])}, torch {environment['versions']['torch']}, backend "
        f"{environment['backend']}. float32, value and gradients unless said. Ratios are medians over rounds in which "
        "all contestants took turns, [quartiles] beside them.",
        *_quiet(run),
    ]
    if not run["penalty"]:
        return lines + report_rnn.report(run.get("rnn", []), run["quick"])
    for allocator in dict.fromkeys(one["allocator"] for one in run["penalty"]):
        of_allocator = {one["case"]: one for one in run["penalty"] if one["allocator"] == allocator}
        lines += ["", f"## Figures, malloc {allocator}" + _about(allocator, run), ""]
        lines += figures(of_allocator, run["quick"], all_goals=allocator == "retained")
    lines += ["", "## Every contestant", "", *contestants(run["penalty"])]
    lines += ["", "## Accuracy: relative error against the float64 reference", "", *accuracy(run["penalty"])]
    lines += ["", "## Memory beyond W and its gradients", "", *memory(run["memory"], run["quick"])]
    return lines + report_rnn.report(run.get("rnn", []), run["quick"])


def _quiet(run: Record) -> list[str]:
    """How much of the machine others used during the timing."""
    measured = run["penalty"] + run.get("rnn", [])
    shares = [(one["others_cpu"], one["case"]) for one in measured if one.get("others_cpu") is not None]
    if not shares:
        return []
    share, case = max(shares)
    if share <= QUIET:
        return [f"Other processes used at most {100 * share:.0f} % of the machine."]
    return ["", f"**The machine was not quiet: others used up to {100 * share:.0f} % of it ({case}). Run again.**"]


def _about(allocator: str, run: Record) -> str:
    if allocator == "retained":
        return " (freed memory is kept: the figures that count, since they time kernels)"
    return " (glibc as it comes: each new gradient of tens of MB is page-faulted in, for everybody)"


def figures(by_case: dict[str, Record], quick: bool, all_goals: bool) -> list[str]:
    lines = ["| case | against | goal | measured | verdict |", "| --- | --- | --- | --- | --- |"]
    for goal in GOALS:
        if goal.case in by_case:
            lines.append(_figure(goal, by_case[goal.case], quick))
        elif all_goals:
            lines.append(f"| {goal.label} | {goal.against} | {_goal(goal)} | - | not measured in this run |")
    return lines


def _goal(goal: Goal) -> str:
    if goal.at_most:
        return f"at most {goal.ratio:g} x its time"
    return "never slower" if goal.ratio == 1 else f"{goal.ratio:g} x faster"


def _figure(goal: Goal, record: Record, quick: bool) -> str:
    opponents = goal.opponents(record["contestants"])
    if not opponents:
        return f"| {goal.label} | {goal.against} | {_goal(goal)} | - | not measured in this run |"
    one = min(opponents, key=lambda each: each["ratio"][1])
    low, middle, high = one["ratio"]
    if goal.at_most:
        low, middle, high = 1 / high, 1 / middle, 1 / low
    reached = middle <= goal.ratio if goal.at_most else middle >= goal.ratio
    measured = f"{middle:.2f} x [{low:.2f}, {high:.2f}]" + (" its time" if goal.at_most else "")
    against = goal.against if one["name"] == goal.against else f"{goal.against}: {one['name']}"
    return f"| {goal.label} | {against} | {_goal(goal)} | {measured} | {_verdict(reached, quick)} |"


def _verdict(reached: bool, quick: bool = False) -> str:
    return "quick run: none" if quick else "reached" if reached else "NOT reached"


def contestants(penalty: list[Record]) -> list[str]:
    """share: of the bandwidth of the copy in the same run, which like the floor reads and writes n x n once."""
    lines = ["The share of the copy's bandwidth is copy time over time: 100 % is the floor of reading W and writing "
             "its gradient once. Page faults: median of a call.", "",
             "| case | malloc | contestant | ms [quartiles] | its time / ours | share of copy bandwidth "
             "| page faults |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for record in penalty:
        copy = next(one for one in record["contestants"] if one["name"] == "copy into a buffer")["time"][1]
        for index, one in enumerate(record["contestants"]):
            low, middle, high = (1e3 * seconds for seconds in one["time"])
            share = f"{100 * copy / one['time'][1]:.0f} %" if record["gradients"] else "-"
            case = [record["case"], record["allocator"]] if index == 0 else ["", ""]
            ratio = "1" if one["kind"] == "ours" else f"{one['ratio'][1]:.2f}"
            lines.append("| " + " | ".join([*case, one["name"], f"{middle:.3f} [{low:.3f}, {high:.3f}]", ratio, share,
                                            f"{one['page_faults']:.0f}"]) + " |")
        lines += [f"| | | {name}: refused, {why} | | | | |" for name, why in record["refused"].items()]
    return lines


def accuracy(penalty: list[Record]) -> list[str]:
    limits = ", ".join(f"{name} {limit:.0e}" for name, limit in ACCURACY_GOALS.items())
    lines = [f"Goals: {limits}; gradients in norm.", "",
             "| case | value | dW | dE | verdict |", "| --- | --- | --- | --- | --- |"]
    seen = set()
    for record in penalty:
        if record["case"] in seen:  # the allocator changes nothing
            continue
        seen.add(record["case"])
        errors = record["contestants"][0]["errors"]
        cells = [f"{errors[name]:.1e}" if name in errors else "-" for name in ACCURACY_GOALS]
        reached = all(error <= ACCURACY_GOALS[name] for name, error in errors.items())
        lines.append(f"| {record['case']} | {' | '.join(cells)} | {_verdict(reached)} |")
    return lines


def memory(measured: list[Record], quick: bool) -> list[str]:
    if not measured:
        return ["Not measured in this run."]
    lines = ["Peak of resident memory during a step, in a process of its own.", "",
             "| case | contestant | MB beyond | share of W | goal | verdict |", "| --- | --- | --- | --- | --- | --- |"]
    for one in measured:
        share, goal = one["beyond"] / one["weight"], MEMORY_GOAL * one["columns"]
        verdict = _verdict(share < goal, quick) if one["kind"] == "ours" else ""
        lines.append(f"| {one['case']} | {one['contestant']} | {one['beyond'] / 1e6:.2f} | {100 * share:.2f} % | "
                     f"under {100 * goal:g} % | {verdict} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
