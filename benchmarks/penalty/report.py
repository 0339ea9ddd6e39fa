"""The part of a report that is about the run and the penalty on the CPU, as lines of Markdown."""
from __future__ import annotations

from typing import Any

from ..harness.records import commit_in_words
from .cases import ACCURACY_GOALS, GOALS, MEMORY_GOAL, Goal

QUIET = 0.05  # the share of the machine's time that others may use while we measure
Record = dict[str, Any]


def report_lines(run: Record) -> list[str]:
    """Returns what the run was, and what it measured of the penalty."""
    environment = run["environment"]
    lines = [
        "# Measured" + (" (QUICK: small sizes, no figures)" if run["quick"] else ""), "",
        f"{run['started']}, commit {commit_in_words(environment)}, {environment['cpu']}, {environment['cores']} cores, "
        f"{run['threads']} threads, {' '.join(environment['isa'])}, torch {environment['versions']['torch']}, backend "
        f"{environment['backend']}. float32, value and gradients unless said. Ratios are medians over rounds in which "
        "all contestants took turns, [quartiles] beside them.",
        *quietness(run),
    ]
    if not run["penalty"]:
        return lines
    for allocator in dict.fromkeys(one["allocator"] for one in run["penalty"]):
        of_allocator = {one["case"]: one for one in run["penalty"] if one["allocator"] == allocator}
        lines += ["", f"## Figures, malloc {allocator}" + _about(allocator, run), ""]
        lines += figures(of_allocator, run["quick"], all_goals=allocator == "retained")
    lines += ["", "## Every contestant", "", *contestants(run["penalty"])]
    lines += ["", "## Accuracy: relative error against the float64 reference", "", *accuracy(run["penalty"])]
    lines += ["", "## Memory beyond W and its gradients", "", *memory(run["memory"], run["quick"])]
    return lines


def quietness(run: Record) -> list[str]:
    """Says how much of the machine others used during the timing."""
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
    """Tabulates the goals and what was measured. With `all_goals`, goals that were not measured are listed too."""
    lines = ["| case | against | goal | measured | verdict |", "| --- | --- | --- | --- | --- |"]
    for goal in GOALS:
        if goal.case in by_case:
            lines.append(goal_row(goal, by_case[goal.case], quick))
        elif all_goals:
            lines.append(f"| {goal.label} | {goal.against} | {_goal(goal)} | - | not measured in this run |")
    return lines


def _goal(goal: Goal) -> str:
    if goal.at_most:
        return f"at most {goal.ratio:g} x its time"
    return "never slower" if goal.ratio == 1 else f"{goal.ratio:g} x faster"


def goal_row(goal: Goal, record: Record, quick: bool) -> str:
    """Returns a goal's row of the table."""
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
    return f"| {goal.label} | {against} | {_goal(goal)} | {measured} | {verdict(reached, quick)} |"


def verdict(reached: bool, quick: bool = False) -> str:
    """Puts into words whether a goal is reached."""
    return "quick run: none" if quick else "reached" if reached else "NOT reached"


def contestants(penalty: list[Record]) -> list[str]:
    """Tabulates every contestant."""
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
    """Tabulates our errors."""
    limits = ", ".join(f"{name} {limit:.0e}" for name, limit in ACCURACY_GOALS.items())
    lines = [f"Goals: {limits}; gradients in norm.", "",
             "| case | value | dW | dE | verdict |", "| --- | --- | --- | --- | --- |"]
    seen = set()
    for record in penalty:
        if record["case"] in seen:  # the allocator changes no result
            continue
        seen.add(record["case"])
        errors = record["contestants"][0]["errors"]
        cells = [f"{errors[name]:.1e}" if name in errors else "-" for name in ACCURACY_GOALS]
        reached = all(error <= ACCURACY_GOALS[name] for name, error in errors.items())
        lines.append(f"| {record['case']} | {' | '.join(cells)} | {verdict(reached)} |")
    return lines


def memory(measured: list[Record], quick: bool) -> list[str]:
    """Tabulates peak memory."""
    if not measured:
        return ["Not measured in this run."]
    lines = ["Peak of resident memory during a step, in a process of its own.", "",
             "| case | contestant | MB beyond | share of W | goal | verdict |", "| --- | --- | --- | --- | --- | --- |"]
    for one in measured:
        share, goal = one["beyond"] / one["weight"], MEMORY_GOAL * one["columns"]
        judged = verdict(share < goal, quick) if one["kind"] == "ours" else ""
        lines.append(f"| {one['case']} | {one['contestant']} | {one['beyond'] / 1e6:.2f} | {100 * share:.2f} % | "
                     f"under {100 * goal:g} % | {judged} |")
    return lines
