"""The JSON file of a run: results/<machine>/<time>.json, written after every case."""
from __future__ import annotations

import json
import os
import pathlib
import re
from typing import Any

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
QUICK = "quick.json"  # overwritten by the next quick run, ignored by git and by the report


def machine(environment: dict[str, Any]) -> str:
    """A folder's name for the machine: "amd-epyc-2-cores"."""
    words = re.sub(r"\(.*?\)|@.*", " ", environment["cpu"]).lower()
    return re.sub(r"[^a-z0-9]+", "-", f"{words} {environment['cores']} cores").strip("-")


def append(path: pathlib.Path, header: dict[str, Any], list_name: str, entry: dict[str, Any]) -> None:
    """Adds an entry to a list of the run's file, which is never seen half written."""
    run = json.loads(path.read_text()) if path.exists() else header | {"penalty": [], "memory": []}
    run[list_name].append(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(run, indent=1) + "\n")
    os.replace(partial, path)


def load(path: pathlib.Path) -> dict[str, Any]:
    run = json.loads(path.read_text())
    run["file"] = path
    return run


def latest(folder: pathlib.Path = RESULTS) -> pathlib.Path | None:
    """The newest run of all machines (names begin with the time), quick ones aside."""
    runs = [path for path in folder.glob("*/*.json") if path.name != QUICK]
    return max(runs, key=lambda path: path.name, default=None)
