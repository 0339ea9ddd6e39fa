"""A pytest plugin for scripts/gpu_tests.py: keeps a share of the tests, and writes down which one runs.

    MODULI_KERNELS_SHARD=INDEX/COUNT  MODULI_KERNELS_SHARD_NOW=FILE  pytest -p gpu_shard
"""
from __future__ import annotations

import os
import pathlib

RUN = 10  # neighbours that stay together: powers and dtypes of one test, which share compiled kernels


def pytest_collection_modifyitems(config, items):
    index, count = map(int, os.environ["MODULI_KERNELS_SHARD"].split("/"))
    run = max(1, min(RUN, len(items) // (4 * count)))
    ours = [k // run % count == index for k in range(len(items))]
    config.hook.pytest_deselected(items=[item for item, kept in zip(items, ours) if not kept])
    items[:] = [item for item, kept in zip(items, ours) if kept]


def pytest_runtest_logstart(nodeid, location):
    """What a shard that is killed was at."""
    pathlib.Path(os.environ["MODULI_KERNELS_SHARD_NOW"]).write_text(nodeid)
