"""The report of a run on a GPU, as lines of Markdown."""
from __future__ import annotations

from typing import Any

from .harness.records import commit_in_words
from .penalty.cases import ACCURACY_GOALS, MEMORY_GOAL
from .penalty.cases_gpu import ACCURACY_16_BIT, COPY, GPU_GOALS
from .rnn.cases_gpu import RNN_GPU_GOALS

Record = dict[str, Any]
LEAST_ROUNDS = 50  # the report warns of cases with fewer


def report_lines(run: Record) -> list[str]:
    """Returns the report as lines of Markdown."""
    environment = run["environment"]
    versions = environment["versions"]
    lines = [
        "# Penalty on a GPU: measured" + (" (QUICK: small sizes, no figures)" if run["quick"] else ""), "",
        f"{run['started']}, commit {commit_in_words(environment)}, {environment['device']}, driver "
        f"{run['driver'] or 'unknown'}, CUDA {versions['cuda']}, torch {versions['torch']}, Triton "
        f"{versions['triton']}, second-level cache {run['l2'] / 2**20:.0f} MiB. float32, torus + DoG, value and "
        "gradients unless said. Times are the device's, by CUDA events, warm, weights rotating through more memory "
        "than the cache holds; ratios are medians over rounds in which all contestants took turns, [quartiles] beside "
        "them.",
        "", "## Figures", "", *figures(run), "",
        "## grad_output 1 and not 1", "", *scaled(run), "",
        "## Every contestant", "", *contestants(run["penalty"]), "",
        "## Accuracy: relative error against the float64 reference", "", *accuracy(run["penalty"]), "",
        "## Memory beyond W and its gradients", "", *memory(run["memory"], run["quick"]),
    ]
    if "parts" in run:
        lines += ["", "## The whole of `make gpu`", "", *parts(run["parts"])]
    return lines


def rows(run: Record) -> list[tuple[str, str, str, str]]:
    """Returns (case, goal, value, verdict) for every goal."""
    found = []
    for goal in (*GPU_GOALS, *(RNN_GPU_GOALS if "rnn" in run else ())):
        figure = goal.figure(run)
        if figure is None:
            found.append((goal.label, goal.goal(), "-", "not measured in this run"))
        else:
            verdict = "quick run" if run["quick"] else "reached" if figure[1] else "NOT reached"
            found.append((goal.label, goal.goal(), figure[0], verdict))
    return found


def figures(run: Record) -> list[str]:
    """Tabulates the goals and what was measured, and says which measurements to distrust."""
    lines = ["| case | goal | value | verdict |", "| --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(run)]
    few = [one["case"] for one in run["penalty"] if one["rounds"] < LEAST_ROUNDS]
    gaps = [f"{one['case']}: {who['name']}" for one in run["penalty"] for who in one["contestants"] if who["gaps"]]
    if few and not run["quick"]:
        lines += ["", f"**Fewer than {LEAST_ROUNDS} rounds:** {', '.join(few)}."]
    if gaps:
        lines += ["", f"The device waited for the host in some turns, so these times are too long: {', '.join(gaps)}."]
    return lines


def scaled(run: Record) -> list[str]:
    """Tabulates ours with grad_output 0.5, which scales the gradients in place, against grad_output 1."""
    ours = {one["case"]: one["contestants"][0]["time"][1] for one in run["penalty"]}
    pairs = [(case, ours[case], ours[case + "-scaled"]) for case in ours if case + "-scaled" in ours]
    if not pairs:
        return ["Not measured in this run."]
    return ["| case | grad_output = 1, us | 0.5, us | ratio |", "| --- | --- | --- | --- |",
            *(f"| {case} | {1e6 * one:.1f} | {1e6 * other:.1f} | {other / one:.2f} |" for case, one, other in pairs)]


def contestants(penalty: list[Record]) -> list[str]:
    """Tabulates every contestant."""
    lines = ["The share of the copy's bandwidth is copy time over time. In a loop: seconds a step with launching, "
             "which small weights are bound by.", "",
             "| case | contestant | us [quartiles] | its time / ours | share of copy bandwidth | in a loop, us |",
             "| --- | --- | --- | --- | --- | --- |"]
    for record in penalty:
        copy = next((one["time"][1] for one in record["contestants"] if one["name"] == COPY), None)
        for index, one in enumerate(record["contestants"]):
            low, middle, high = (1e6 * seconds for seconds in one["time"])
            share = "-" if copy is None else f"{100 * copy / one['time'][1]:.0f} %"
            loop = f"{1e6 * one['loop']:.0f}" if one.get("loop") else "-"
            case = record["case"] if index == 0 else ""
            lines.append(f"| {case} | {one['name']} | {middle:.1f} [{low:.1f}, {high:.1f}] | {one['ratio'][1]:.2f} | "
                         f"{share} | {loop} |")
        lines += [f"| | {name}: refused, {why} | | | | |" for name, why in record["refused"].items()]
    return lines


def accuracy(penalty: list[Record]) -> list[str]:
    """Tabulates our errors."""
    sixteen = {str(dtype).removeprefix("torch."): goals for dtype, goals in ACCURACY_16_BIT.items()}
    lines = ["Gradients in norm.", "", "| case | value | dW | dE | verdict |", "| --- | --- | --- | --- | --- |"]
    for record in penalty:
        errors = record["contestants"][0]["errors"]
        if errors is None:
            continue
        goals = sixteen.get(record["dtype"], ACCURACY_GOALS)
        cells = [f"{errors[name]:.1e}" if name in errors else "-" for name in goals]
        reached = all(error <= goals[name] for name, error in errors.items())
        lines.append(f"| {record['case']} | {' | '.join(cells)} | {'reached' if reached else 'NOT reached'} |")
    return lines


def memory(measured: list[Record], quick: bool) -> list[str]:
    """Tabulates peak memory."""
    if not measured:
        return ["Not measured in this run."]
    lines = ["Peak of torch's allocator during a step.", "",
             "| case | MB beyond | share of W | goal | verdict |", "| --- | --- | --- | --- | --- |"]
    for one in measured:
        share, goal = one["beyond"] / one["weight"], MEMORY_GOAL * one["columns"]
        verdict = "quick run" if quick else "reached" if share < goal else "NOT reached"
        lines.append(f"| {one['case']} | {one['beyond'] / 1e6:.2f} | {100 * share:.2f} % | under {100 * goal:g} % | "
                     f"{verdict} |")
    return lines


def parts(done: dict[str, Record]) -> list[str]:
    """Tabulates the parts of `make gpu`."""
    return ["| part | verdict | seconds | |", "| --- | --- | --- | --- |",
            *(f"| {name} | {'passed' if one['ok'] else 'FAILED'} | {one['seconds']:.0f} | {one['summary']} |"
              for name, one in done.items())]
