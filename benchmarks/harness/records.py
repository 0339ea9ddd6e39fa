"""The JSON file of a run, results/<machine>/<time>.json, which grows with every case."""
from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import time
from typing import Any

import torch

from examples.training import files
from moduli_kernels.env_report import environment

# Environment variable for a tree without .git: what `git describe --always --dirty --abbrev=40` says at its origin.
COMMIT = "MODULI_KERNELS_COMMIT"
NAME = re.compile(r"\d{8}-\d{6}\.json")
RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results"
QUICK = "quick.json"  # the next quick run overwrites it; git and the report ignore it


def machine(environment: dict[str, Any]) -> str:
    """Returns a folder's name for the machine, such as "amd-epyc-2-cores"."""
    words = re.sub(r"\(.*?\)|@.*", " ", environment["cpu"]).lower()
    return re.sub(r"[^a-z0-9]+", "-", f"{words} {environment['cores']} cores").strip("-")


def gpu_machine(name: str) -> str:
    """Returns a folder's name for a GPU, such as "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def gpu_header(quick: bool) -> dict[str, Any]:
    """Returns what the record of a run on a GPU begins with; `l2` is the bytes of its second-level cache."""
    facts = environment()
    asked = os.environ.get(COMMIT)
    if facts["commit"] is None and asked:
        facts |= {"commit": asked.removesuffix("-dirty"), "dirty": asked.endswith("-dirty")}
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {"environment": facts, "device": "cuda", "driver": driver(), "l2": gpu.L2_cache_size,
            "multiprocessors": gpu.multi_processor_count, "quick": quick,
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}


def driver() -> str | None:
    """Returns the version of NVIDIA's driver; None if it cannot be found."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], text=True,
                              capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def append(path: pathlib.Path, header: dict[str, Any], list_name: str, entry: dict[str, Any]) -> None:
    """Adds an entry to a list of the run's file, which is never half written."""
    run = json.loads(path.read_text()) if path.exists() else header | {"penalty": [], "memory": []}
    run.setdefault(list_name, []).append(entry)
    files.write_text(path, json.dumps(run, indent=1) + "\n")


def load(path: pathlib.Path) -> dict[str, Any]:
    """Reads a run; `file` is its path."""
    run = json.loads(path.read_text())
    run["file"] = path
    return run


def latest(folder: pathlib.Path = RESULTS) -> pathlib.Path | None:
    """Returns the newest run of all machines. Quick runs, and runs of `make gpu` that timed nothing, do not count."""
    runs = [path for path in folder.glob("*/*.json") if NAME.fullmatch(path.name)]
    return max(runs, key=lambda path: path.name, default=None)


def commit_in_words(environment: dict[str, Any]) -> str:
    """Names the commit of a run."""
    return (environment["commit"] or "unknown")[:12] + (" with uncommitted changes" if environment["dirty"] else "")
