"""The paper's tables, and our own, as grids of trials."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from .config import Config
from .nets import INHIBITORS, NETS

REFERENCE = Path(__file__).resolve().parent / "reference.json"
# Tables of our own: what the paper does not show.
OWN = {
    "adding-cuts": {
        "task": "adding", "metric": "test RMSE", "columns": ["torus", "none", "l1_matched", "shuffled"],
        "rows": ["95% sparse", "98% sparse", "99% sparse"], "note": "how far each net can be cut",
    },
    "speech": {
        "task": "speech", "metric": "test CER, %", "columns": ["torus", "l1", "none"],
        "rows": ["0% sparse", "75% sparse", "90% sparse"], "note": "the paper has no table of this experiment",
    },
}


@dataclass(frozen=True)
class Table:
    """columns and rows are as printed; paper: (row, column) -> (mean, standard deviation), of `trials` trials."""

    name: str
    task: str
    metric: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    trials: int
    paper: dict[tuple[str, str], tuple[float, float]]
    note: str = ""

    def settings(self, row: str, column: str) -> dict[str, Any]:
        """Of Preset.config: net, cut, lottery, and what the table varies."""
        matched = re.fullmatch(r"(?:(\w+) )?(\d+)% (sparse|lottery)", row)
        if matched is None:
            raise ValueError(f"row must be like '90% sparse' or 'torus 90% lottery', got {row!r} of table {self.name}")
        net, cut, kind = matched.groups()
        found: dict[str, Any] = {"cut": int(cut) / 100, "lottery": kind == "lottery"}
        if net is not None:  # Tables 17-20: a row a net, a column a strength
            return {**found, "net": net, "strength": float(column)}
        if column in INHIBITORS:
            return {**found, "net": "torus", "inhibitor": column}
        name = column.replace(" fixed", "").replace(" ", "_")
        if name not in NETS:
            raise ValueError(f"column must be a net or an inhibitor, got {column!r} of table {self.name}")
        return {**found, "net": name}

    def config(self, row: str, column: str, seed: int, preset: str, **changes: Any) -> Config:
        """The trial of a cell. changes: fields of Config for all cells, e.g. device."""
        its = import_module(f"{__package__}.{self.task}").PRESETS[preset]
        return its.config(self.task, seed=seed, **{**changes, **self.settings(row, column)})

    def trials_of(self, seeds: list[int], preset: str, rows: str = "", **changes: Any) -> Iterator[Config]:
        """All cells of the first seed first; sparse nets before the lotteries that need their masks. rows: only those
        in whose name this pattern is found."""
        for seed in seeds:
            for row in sorted(self.rows, key=lambda row: "lottery" in row):
                for column in self.columns if re.search(rows, row) else ():
                    yield self.config(row, column, seed, preset, **changes)


@cache
def tables() -> dict[str, Table]:
    """Name ("1" ... "20", own names) -> table, l1_matched beside every l1."""
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
