"""Makes the demo's table, with the paper's numbers beside our own, and its JSON record."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..training import files
from ..training.config import Config, Result, task_class
from ..training.nets import NETS
from .tables import all_tables

# task -> the paper's tables of the demo's nets, and what they were made with
PAPER = {
    "navigation": (("1",), "paper, Table 1: n = 4096, 512 landmarks, 50 steps, 30,000 batches of 200; cm, 5 seeds"),
    "adding": (("8", "9"), "paper, Tables 8 and 9: n = 128, 50 steps; RMSE, 5 seeds"),
}


def papers_numbers(task: str) -> dict[str, Any]:
    """Returns {"note": ..., "rows": {net: {stage: (mean, standard deviation)}}} with our names of nets and stages."""
    names, note = PAPER[task]
    held = {"95% sparse": "95 %, stabilized"}  # the adding code measures after its last epochs
    rows: dict[str, dict[str, tuple[float, float]]] = {}
    for name in names:
        for (row, column), value in all_tables()[name].paper.items():
            if row.endswith("sparse") and not column.startswith("r3"):
                net = {"l1": "L1 (not matched)"}.get(column, column.replace(" fixed", "").replace(" ", "_"))
                rows.setdefault(net, {})[held.get(row, row.replace("% sparse", " %"))] = value
    return {"note": note, "rows": rows}


@dataclass
class Row:
    """One net over its seeds. A value is (mean, standard deviation), the latter None for one seed."""

    net: str
    seeds: list[int]
    errors: dict[str, tuple[float, float | None]]  # stage -> error; a stage that a seed never reached is absent
    density: tuple[float, float | None] | None  # W_hh's at the end
    minutes: tuple[float, float | None]
    peak_mib: float
    collapsed: list[str]


def stages(schedule: list[float], wanted: tuple[float, ...]) -> dict[str, int]:
    """Returns stage -> epoch (from 0). A stage is the last epoch at a sparsity; of one that is held, also the first."""
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
    """Returns a row for each net. `wanted` are the sparsities to report."""
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


def _spread(values: list[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _shown(value: tuple[float, float | None] | None, digits: int, scale: float = 1.0) -> str:
    if value is None:
        return "-"
    mean, spread = value
    return f"{scale * mean:.{digits}f}" + (f" ± {scale * spread:.{digits}f}" if spread is not None else "")


def table(task: str, rows: list[Row], size: str, references: dict[str, float]) -> str:
    """Writes our nets, then the paper's numbers at the same stages. `references` are errors of simple answers."""
    digits, unit, theirs = task_class(task).DIGITS, task_class(task).UNIT, papers_numbers(task)
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
    """Writes everything into one JSON file, whole or not at all, and returns it. Each run names the environment that
    it began in."""
    record = {
        "task": configs[0].task, "mode": mode, "wall_seconds": seconds,
        "summary": [asdict(row) for row in rows],
        "paper": papers_numbers(configs[0].task),
        "runs": [{"config": asdict(c), **asdict(r)} for c, r in zip(configs, results, strict=True)],
    }
    files.write_text(path, json.dumps(record, indent=1) + "\n")
    return record
