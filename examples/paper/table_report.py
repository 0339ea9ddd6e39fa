"""Shows a table of our trials beside the paper's numbers: as text, as Markdown and as a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from moduli_kernels import plots

from ..training import files
from ..training.config import task_class
from ..training.ledger import Ledger
from .claims import Verdict, errors
from .tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def spread(values: list[float], digits: int, collapsed: int = 0) -> str:
    """Writes mean, standard deviation and number of trials."""
    if not values:
        return f"{collapsed} collapsed" if collapsed else "-"
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return f"{text} ({len(values)}{f', {collapsed} collapsed' if collapsed else ''})"


def lines_of(table: Table, preset: str, ledger: Ledger, seeds: list[int], **changes) -> list[list[str]]:
    """Returns the table's cells: a head, then for each row the paper's numbers and ours."""
    digits = task_class(table.task).DIGITS
    found = [["", "", *table.columns]]
    for row in table.rows:
        if table.paper:
            theirs = [table.paper.get((row, column)) for column in table.columns]
            found.append([row, "paper", *("" if t is None else f"{t[0]:g} ± {t[1]:g}" for t in theirs)])
        last = [errors(table, row, c, preset, ledger, seeds, "error", **changes) for c in table.columns]
        first = [errors(table, row, c, preset, ledger, seeds, "pruned_error", **changes) for c in table.columns]
        if _held(table, row, preset):
            found.append([row, "ours, pruning ends", *(spread(v, digits, c) for v, c in first)])
            found.append([row, "ours, stabilized", *(spread(v, digits, c) for v, c in last)])
        else:
            found.append([row, "ours", *(spread(v, digits, c) for v, c in last)])
        its = task_class(table.task)
        if its.PAPERS_METRIC:
            theirs = [errors(table, row, c, preset, ledger, seeds, "paper", **changes) for c in table.columns]
            found.append([row, f"ours, {its.PAPERS_METRIC} as the paper", *(spread(v, digits, c) for v, c in theirs)])
    return found


def heading(table: Table, preset: str, what: str, seeds: list[int]) -> str:
    """Says which table it is, what it measures and how the nets were trained."""
    name = f"Table {table.name}" if table.paper else table.name
    note = f"; {table.note}" if table.note else ""
    return (f"{name}: {table.task}, {table.metric}; preset {preset}: {what}; mean ± standard deviation (trials), "
            f"seeds {', '.join(map(str, seeds))}{note}")


def markdown(title: str, rows: list[list[str]], judged: list[Verdict]) -> str:
    """Writes the table and the verdicts for a file."""
    head, *body = rows
    name, *protocol = title.split("; ", 1)
    lines = [f"# {name}", "", *(f"{words[0].upper()}{words[1:]}.\n" for words in protocol)]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    if judged:
        lines += ["", "Claims of the paper, by Welch's test (two-sided, p < 0.05, at least 5 trials on both sides):",
                  "",
                  "| claim | pair, the better one first | verdict | p | means |", "| --- | --- | --- | --- | --- |"]
        lines += [f"| {v.words} | {v.pair.replace('<', 'under')} | {v.verdict} | {_p(v)} | {_means(v)} |"
                  for v in judged]
    return "\n".join(lines) + "\n"


def text(title: str, rows: list[list[str]], judged: list[Verdict]) -> str:
    """Writes the same for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [title, ""]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    for words in dict.fromkeys(v.words for v in judged):
        lines += ["", words]
        for v in judged:
            if v.words == words:
                counts = f"{v.counts[0]} and {v.counts[1]} trials"
                found = counts if v.means is None else f"{_means(v)}, p = {_p(v)}, {counts}"
                lines.append(f"  {v.verdict}: {v.pair} ({found})")
    return "\n".join(lines)


def _p(verdict: Verdict) -> str:
    return "" if verdict.p is None else f"{verdict.p:.2g}"


def _means(verdict: Verdict) -> str:
    return "" if verdict.means is None else f"{verdict.means[0]:.3g}, {verdict.means[1]:.3g}"


# measuring point -> words, marker and colour in the picture
MOMENTS = {"pruned_error": ("as pruning ends", "s", plots.COLOURS[1]), "paper": ("at the end", "o", plots.COLOURS[0])}


def picture(table: Table, title: str, preset: str, ledger: Ledger, seeds: list[int], **changes) -> Figure:
    """Draws a panel for each row. A mark stands for a trial at either measuring point, a bar for the mean, and beside
    them the paper's mean ± standard deviation."""
    from matplotlib.figure import Figure

    ours = {(row, c, moment): errors(table, row, c, preset, ledger, seeds, moment, **changes)[0]
            for row in table.rows for c in table.columns for moment in MOMENTS}
    rows = [row for row in table.rows if any(ours[row, c, "paper"] for c in table.columns)]
    size = (max(6.4, 1.1 * len(table.columns) + 1.5), 2.5 * max(1, len(rows)) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(max(1, len(rows)), 1, squeeze=False)[:, 0]
    for ax, row in zip(axes, rows):
        top = 0.0
        for x, column in enumerate(table.columns):
            for place, (moment, (when, marker, colour)) in zip((x - 0.3, x - 0.05), MOMENTS.items()):
                values = ours[row, column, moment]
                if not values or moment != "paper" and not _held(table, row, preset):
                    continue
                ax.plot([place] * len(values), values, marker, color=colour, alpha=0.6, markersize=5,
                        label=f"a trial, {when}")
                ax.plot([place - 0.1, place + 0.1], [statistics.fmean(values)] * 2, color=colour, linewidth=2,
                        label=f"mean, {when}")
                top = max(top, *values)
            theirs = table.paper.get((row, column))
            if theirs is not None:
                ax.errorbar(x + 0.22, theirs[0], yerr=theirs[1], fmt="D", color="0.35", markersize=4, capsize=3,
                            label="paper, mean ± standard deviation")
                top = max(top, sum(theirs))
        its = task_class(table.task)
        ax.set(title=row, ylabel=its.PAPERS_METRIC or its.METRIC)
        ax.set(ylim=(0, 1.08 * top), xlim=(-0.6, len(table.columns) - 0.4))
        ax.set_xticks(range(len(table.columns)), table.columns)
        ax.spines[["top", "right"]].set_visible(False)
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels())}
    place = {"loc": "outside lower center", "ncols": 3, "frameon": False, "fontsize": "small"}
    figure.legend(handles.values(), handles.keys(), **place)
    figure.suptitle(title, fontsize="small", wrap=True)
    return figure


def _held(table: Table, row: str, preset: str) -> bool:
    """Returns whether a row's nets train on after pruning."""
    config = table.config(row, table.columns[0], 0, preset)
    return 0 < config.pruned_at() < len(config.schedule) - 1


def write(folder: Path, table: Table, preset: str, what: str, ledger: Ledger, seeds: list[int],
          judged: list[Verdict], **changes) -> tuple[str, list[Path]]:
    """Writes the table into `folder` and returns (what a terminal shows, the files written)."""
    rows = lines_of(table, preset, ledger, seeds, **changes)
    title = heading(table, preset, what, seeds)
    stem = (f"table-{table.name}" if table.paper else table.name) + ("" if preset == "full" else f"-{preset}")
    paths = [folder / f"{stem}.md"]
    files.write_text(paths[0], markdown(title, rows, judged))
    try:
        drawn = picture(table, title, preset, ledger, seeds, **changes)
        drawn.savefig(folder / f"{stem}.png", dpi=110)
        paths.append(folder / f"{stem}.png")
    except ImportError as error:
        return f"{text(title, rows, judged)}\n\nNo picture: {error}; install matplotlib.", paths
    return text(title, rows, judged), paths
