"""What the tests of the examples share: runs to compare, and a trial of each kind for the ledger."""
from __future__ import annotations

import torch

from examples.adding import PRESETS
from examples.training.config import Result
from examples.training.preset import Preset
from examples.training.trainer import Run

CONFIG = PRESETS["full"].config("adding", "torus", 0, 0.95)
TINY = Preset("tiny", {"hidden": 8, "steps": 5, "batch": 4, "tests": 20}, epochs=2, hold=1, batches=3, lr=1e-3,
              strength=1e-3)


def result(config=CONFIG, collapsed=None) -> Result:
    """Makes up the result of a run; a collapsed one ends after four epochs."""
    history = [{"epoch": k + 1, "sparsity": s, "density": 1 - s, "error": 1 / (k + 1)}
               for k, s in enumerate(config.sparsities())]
    return Result(history=history if collapsed is None else history[:4], seconds=1.0, collapsed=collapsed)


def assert_same_nets(a: Run, b: Run):
    """Asserts that both have the same history, and bitwise the same weights, masks and points."""
    assert a.result.history == b.result.history
    for x, y in ((a.task.model, b.task.model), (a.geometry, b.geometry)):
        x, y = x.state_dict(), y.state_dict()
        assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)
