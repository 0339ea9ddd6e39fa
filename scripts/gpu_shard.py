"""A pytest plugin for scripts/gpu_tests.py: keeps every k-th test, and writes down which one runs.

    MODULI_KERNELS_SHARD=INDEX/COUNT  MODULI_KERNELS_SHARD_NOW=FILE  pytest -p gpu_shard
"""
from __future__ import annotations

import os
import pathlib


def pytest_collection_modifyitems(config, items):
    index, count = map(int, os.environ["MODULI_KERNELS_SHARD"].split("/"))
    kept = items[index::count]
    config.hook.pytest_deselected(items=[item for k, item in enumerate(items) if k % count != index])
    items[:] = kept


def pytest_runtest_logstart(nodeid, location):
    """What a shard that is killed was at."""
    pathlib.Path(os.environ["MODULI_KERNELS_SHARD_NOW"]).write_text(nodeid)
