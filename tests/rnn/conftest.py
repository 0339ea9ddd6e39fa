"""Fixtures of the tests of recurrent nets."""
from __future__ import annotations

import pytest

from moduli_kernels.rnn import crossovers, ordered_module


@pytest.fixture
def laid_out(monkeypatch):
    """Every masked hidden weight is walked by a layout; which were made, in a list."""
    made, layout = [], ordered_module.lay_out_blocks
    monkeypatch.setattr(crossovers, "hidden_form", lambda *_: "blocks")
    monkeypatch.setattr(crossovers, "THRESHOLD", 4)
    monkeypatch.setattr(ordered_module, "walks_blocks", lambda *_: True)
    monkeypatch.setattr(ordered_module, "lay_out_blocks",
                        lambda *arguments, **named: made.append(layout(*arguments, **named)) or made[-1])
    return made
