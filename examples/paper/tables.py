"""The paper's tables, and our own, as grids of trials."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..training.config import Config, task_module
from ..training.nets import INHIBITORS, NETS

REFERENCE = Path(__file__).resolve().parent / "reference.json"
# Tables of our own, for what the paper does not show.
OWN = {
    "adding-cuts": {
        "task": "adding", "metric": "test RMSE", "columns": ["torus", "none", "l1_matched", "shuffled"],
        "rows": ["95% sparse", "98% sparse", "99% sparse"], "note": "how far each net can be cut",
    },
    "speech": {
        "task": "speech", "metric": "test CER, %", "columns": ["torus", "l1", "none"],
        "rows": ["0% sparse", "75% sparse", "90% sparse"], "note": "the paper has no table of this experiment",
    },
    # The 6-torus is where it matters that the authors' code lets the cheapest pair of points cost 0 ("sampled").
    "6-sampled": {
        "task": "language_model", "metric": "test perplexity", "columns": ["torus6", "torus6 sampled"],
        "rows": ["0% sparse", "90% sparse", "90% lottery", "98% sparse", "98% lottery"],
        "note": "Table 6 with the offset of the authors' code on the 6-torus",
    },
    "10-sampled": {
        "task": "adding", "metric": "test RMSE", "columns": ["torus6", "torus6 sampled"],
        "rows": ["0% sparse", "95% sparse", "95% lottery"],
        "note": "Table 10 with the offset of the authors' code on the 6-torus",
    },
}
SAMPLED = " sampled"  # ends the column of a net whose difference of Gaussians has the offset of the authors' code


@dataclass(frozen=True)
class Table:
    """A grid of trials."""

    name: str
    task: str
    metric: str
    columns: tuple[str, ...]  # as they are printed
    rows: tuple[str, ...]
    trials: int  # how many the paper has in a cell
    paper: dict[tuple[str, str], tuple[float, float]]  # (row, column) -> the paper's mean and standard deviation
    note: str = ""

    def settings(self, row: str, column: str) -> dict[str, Any]:
        """Returns a cell's arguments of Preset.config: net, cut, lottery, and what the table varies."""
        matched = re.fullmatch(r"(?:(\w+) )?(\d+)% (sparse|lottery)", row)
        if matched is None:
            raise ValueError(f"row must be like '90% sparse' or 'torus 90% lottery', got {row!r} of table {self.name}")
        net, cut, kind = matched.groups()
        found: dict[str, Any] = {"cut": int(cut) / 100, "lottery": kind == "lottery"}
        if net is not None:  # in Tables 17 to 20 a row is a net and a column a strength
            return {**found, "net": net, "strength": float(column)}
        if column in INHIBITORS:
            return {**found, "net": "torus", "inhibitor": column}
        if column.endswith(SAMPLED):
            found["inhibitor"] = "dog_sampled"
        name = column.removesuffix(SAMPLED).replace(" fixed", "").replace(" ", "_")
        if name not in NETS:
            raise ValueError(f"column must be a net or an inhibitor, got {column!r} of table {self.name}")
        return {**found, "net": name}

    def config(self, row: str, column: str, seed: int, preset: str, **changes: Any) -> Config:
        """Returns the trial of a cell. `changes` are fields of Config for all cells, such as the device."""
        its = task_module(self.task).PRESETS[preset]
        return its.config(self.task, seed=seed, **{**changes, **self.settings(row, column)})

    def trials_of(self, seeds: list[int], preset: str, rows: str = "", **changes: Any) -> Iterator[Config]:
        """Yields all cells of the first seed, then of the next; sparse nets before the lotteries that need their masks.

        Args:
            rows: a pattern; only rows in whose name it is found count.
        """
        for seed in seeds:
            for row in sorted(self.rows, key=lambda row: "lottery" in row):
                for column in self.columns if re.search(rows, row) else ():
                    yield self.config(row, column, seed, preset, **changes)


@cache
def all_tables() -> dict[str, Table]:
    """Returns name ("1" ... "20", names of our own) -> table. Beside every column l1 stands l1_matched."""
    found = {}
    for each in json.loads(REFERENCE.read_text())["tables"]:
        columns = list(each["columns"])
        paper = {
            (row, column): (cell["mean"], cell["std"])
            for row, cells in each["rows"].items() for column, cell in zip(columns, cells, strict=True)
            if cell is not None
        }
        if "l1" in columns:
            columns.insert(columns.index("l1") + 1, "l1_matched")
        name = str(each["id"])
        found[name] = Table(name, each["task"], each["metric"], tuple(columns), tuple(each["rows"]), each["trials"],
                            paper, each.get("note") or "")
    for name, each in OWN.items():
        found[name] = Table(name, each["task"], each["metric"], tuple(each["columns"]), tuple(each["rows"]), 0, {},
                            each["note"])
    return found
