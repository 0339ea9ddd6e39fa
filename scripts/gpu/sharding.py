"""A pytest plugin for suite.py: it keeps one share of the tests and writes down which test is running.

    MODULI_KERNELS_SHARD=INDEX/COUNT  MODULI_KERNELS_SHARD_NOW=FILE  pytest -p scripts.gpu.sharding
"""
from __future__ import annotations

import os
import pathlib

# This many neighbouring tests stay together: powers and dtypes of one test share compiled kernels.
RUN = 10


def pytest_collection_modifyitems(config, items):
    index, count = map(int, os.environ["MODULI_KERNELS_SHARD"].split("/"))
    run = max(1, min(RUN, len(items) // (4 * count)))
    ours = [k // run % count == index for k in range(len(items))]
    config.hook.pytest_deselected(items=[item for item, kept in zip(items, ours) if not kept])
    items[:] = [item for item, kept in zip(items, ours) if kept]


def pytest_runtest_logstart(nodeid, location):
    """Writes down the test that begins, so that suite.py can name it if this process is killed."""
    pathlib.Path(os.environ["MODULI_KERNELS_SHARD_NOW"]).write_text(nodeid)
