"""The part of a report that is about the RNN on the CPU."""
from __future__ import annotations

from typing import Any

from .cases import ACCURACY, CASES, NEVER_UNDER
from .contest import OURS, PEER


def report_lines(measured: list[dict[str, Any]], quick: bool) -> list[str]:
    """Returns lines of Markdown, none where the run measured no RNN."""
    if not measured:
        return []
    goals = {case.name: case.goal for case in CASES}
    lines = ["", "## SparseRNN against torch.nn.RNN with the same masked weights", "",
             "float32, T steps as said, random masks; forward + backward unless said forward, gradients dropped before "
             "each step. Ratios are medians over rounds, [quartiles] beside them.", "",
             "| case | T, B, layers | goal | ours is faster by | path of auto | ours, ms | torch.nn.RNN, ms "
             "| others, their time / ours | verdict |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for one in measured:
        by_name = {each["name"]: each for each in one["contestants"]}
        low, middle, high = by_name[PEER]["ratio"]
        goal = goals[one["case"]]
        reached = middle >= (NEVER_UNDER if goal is None else goal)
        verdict = "quick run: none" if quick else "reached" if reached else "NOT reached"
        others = ", ".join(f"{name} {each['ratio'][1]:.2f}" for name, each in by_name.items()
                           if name not in (OURS, PEER))
        lines.append(
            f"| {one['case']} | {one['steps']}, {one['batch']}, {one['layers']} | "
            f"{f'never under {NEVER_UNDER:g} x' if goal is None else f'{goal:g} x'} | "
            f"{middle:.2f} x [{low:.2f}, {high:.2f}] | {one['path']} | {1e3 * by_name[OURS]['time'][1]:.2f} | "
            f"{1e3 * by_name[PEER]['time'][1]:.2f} | {others or '-'} | {verdict} |")
    worst = max((error, one["case"], name) for one in measured for name, error in one["errors"].items())
    lines += ["", "Accuracy of the sparse path against torch.nn.RNN in float64, over the first steps: at worst "
              f"{worst[0]:.1e} ({worst[2]}, {worst[1]}), goal {ACCURACY:.0e}."]
    return lines
