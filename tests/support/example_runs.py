"""What tests of the examples' trainer share."""
from __future__ import annotations

import torch

from examples.trainer import Run


def assert_same_nets(a: Run, b: Run):
    """The same history, and bitwise the same weights, masks and points."""
    assert a.result.history == b.result.history
    for x, y in ((a.task.model, b.task.model), (a.geometry, b.geometry)):
        x, y = x.state_dict(), y.state_dict()
        assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)
