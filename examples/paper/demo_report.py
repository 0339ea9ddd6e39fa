"""What the demo says at its end: the table, the paper's figures beside it, and the JSON record."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .config import Config, Result, task_class
from .nets import NETS
from .tables import tables

# The paper's tables whose nets the demo has, and what they are of.
PAPER = {
    "navigation": (("1",), "paper, Table 1: n = 4096, 512 landmarks, 50 steps, 30,000 batches of 200; cm, 5 seeds"),
    "adding": (("8", "9"), "paper, Tables 8 and 9: n = 128, 50 steps; RMSE, 5 seeds"),
}


def paper(task: str) -> dict[str, Any]:
    """{"note": ..., "rows": {net: {stage: (mean, standard deviation)}}}, the stages named as ours."""
    names, note = PAPER[task]
    held = {"95% sparse": "95 %, stabilized"}  # the adding code's last epochs
    rows: dict[str, dict[str, tuple[float, float]]] = {}
    for name in names:
        for (row, column), value in tables()[name].paper.items():
            if row.endswith("sparse") and not column.startswith("r3"):
                net = {"l1": "L1 (not matched)"}.get(column, column.replace(" fixed", "").replace(" ", "_"))
                rows.setdefault(net, {})[held.get(row, row.replace("% sparse", " %"))] = value
    return {"note": note, "rows": rows}


@dataclass
class Row:
    """One net over its seeds; a value is (mean, standard deviation or None for one seed)."""

    net: str
    seeds: list[int]
    errors: dict[str, tuple[float, float | None]]  # stage -> error; absent where some seed never reached it
    density: tuple[float, float | None] | None  # of W_hh at the end
    minutes: tuple[float, float | None]
    peak_mib: float
    collapsed: list[str]


def stages(schedule: list[float], wanted: tuple[float, ...]) -> dict[str, int]:
    """The last epoch (from 0) at each sparsity wanted; of one that is held, the first and the last."""
    found = {}
    for sparsity in wanted:
        at = [epoch for epoch, s in enumerate(schedule) if abs(s - sparsity) < 1e-9]
        if not at:
            continue
        name = f"{100 * sparsity:g} %"
        if sparsity > 0 and len(at) > 1:
            found[name], found[f"{name}, stabilized"] = at[0], at[-1]
        else:
            found[name] = at[-1]
    return found


def summarize(configs: list[Config], results: list[Result], wanted: tuple[float, ...]) -> list[Row]:
    rows = []
    for net in dict.fromkeys(config.net for config in configs):
        runs = [(c, r) for c, r in zip(configs, results, strict=True) if c.net == net]
        errors = {}
        for stage, epoch in stages(runs[0][0].schedule, wanted).items():
            if all(len(r.history) > epoch for _, r in runs):
                errors[stage] = _spread([r.history[epoch]["error"] for _, r in runs])
        whole = all(len(r.history) == len(c.schedule) for c, r in runs)
        rows.append(Row(
            net=net, seeds=[c.seed for c, _ in runs], errors=errors,
            density=_spread([r.history[-1]["density"] for _, r in runs]) if whole else None,
            minutes=_spread([r.seconds / 60 for _, r in runs]), peak_mib=max(r.peak_mib for _, r in runs),
            collapsed=[f"seed {c.seed}: {r.collapsed}" for c, r in runs if r.collapsed],
        ))
    return rows


def with_unit(task: str, error: float) -> str:
    its = task_class(task)
    return f"{error:.{its.DIGITS}f} {its.UNIT}"


def _spread(values: list[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _shown(value: tuple[float, float | None] | None, digits: int, scale: float = 1.0) -> str:
    if value is None:
        return "-"
    mean, spread = value
    return f"{scale * mean:.{digits}f}" + (f" ± {scale * spread:.{digits}f}" if spread is not None else "")


def table(task: str, rows: list[Row], size: str, references: dict[str, float]) -> str:
    """Text: our nets, then the paper's figures at the same stages. `references`: errors of simple answers."""
    digits, unit, theirs = task_class(task).DIGITS, task_class(task).UNIT, paper(task)
    names = list(dict.fromkeys(stage for row in rows for stage in row.errors))
    head = ["net", *names, "W_hh kept, %", "minutes", "peak MiB"]
    ours = [
        [row.net, *(_shown(row.errors.get(s), digits) for s in names), _shown(row.density, 2, 100),
         _shown(row.minutes, 1), f"{row.peak_mib:.0f}"]
        for row in rows
    ]
    papers = [
        [net, *(_shown(values.get(s), 2 if task == "navigation" else 3) for s in names), "", "", ""]
        for net, values in theirs["rows"].items()
    ]
    lines = [f"error in {unit} when the net has this sparsity; {size}", *_aligned([head, *ours, [], *papers])]
    lines.insert(len(ours) + 3, f"full size, for comparison ({theirs['note']}):")
    simple = ", ".join(f"{name} {value:.{digits}f}" for name, value in references.items())
    lines += ["", f"for comparison, {unit} on the test of seed {rows[0].seeds[0]}: {simple}"]
    lines += [f"{row.net}: {NETS[row.net]}" for row in rows]
    seeds = rows[0].seeds
    if len(seeds) == 1:
        lines.append(f"One seed ({seeds[0]}): differences between nets may be chance.")
    else:
        lines.append(f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}.")
    lines += [f"COLLAPSED {row.net}, {text}" for row in rows for text in row.collapsed]
    return "\n".join(lines)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows if row) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip() if row else "")
    return lines


def write_record(
    path: Path, mode: str, configs: list[Config], results: list[Result], rows: list[Row], seconds: float
) -> dict[str, Any]:
    """Everything in one JSON file, written whole or not at all; each run has the environment it began in."""
    record = {
        "task": configs[0].task, "mode": mode, "wall_seconds": seconds,
        "summary": [asdict(row) for row in rows],
        "paper": paper(configs[0].task),
        "runs": [{"config": asdict(c), **asdict(r)} for c, r in zip(configs, results, strict=True)],
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)
    return record
