"""Checks linear_schedule, which gives the sparsity of each epoch."""
from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from moduli_kernels.pruning.schedules import linear_schedule


def test_the_papers_schedule():
    assert linear_schedule(0.9, 10) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    assert linear_schedule(0.95, 3, hold=2) == [0.0, 0.475, 0.95, 0.95, 0.95]


def test_the_language_models_schedule():
    expected = [0] + [0.06 * k for k in range(2, 16)]
    assert linear_schedule(0.9, 15, variant="language_model") == pytest.approx(expected)


@pytest.mark.parametrize("variant", ["paper", "language_model"])
def test_one_epoch_goes_to_the_target_at_once(variant):
    assert linear_schedule(0.7, 1, variant=variant) == [0.7]
    assert linear_schedule(0.7, 1, variant=variant, hold=1) == [0.7, 0.7]


@given(target=st.floats(0, 1), epochs=st.integers(2, 300), hold=st.integers(0, 12),
       variant=st.sampled_from(["paper", "language_model"]))
def test_any_schedule_starts_at_zero_never_falls_and_ends_exactly_at_target(target, epochs, hold, variant):
    schedule = linear_schedule(target, epochs, variant=variant, hold=hold)
    assert len(schedule) == epochs + hold
    assert schedule[0] == 0 and schedule[epochs - 1:] == [target] * (hold + 1)
    assert all(a <= b for a, b in zip(schedule, schedule[1:]))


@pytest.mark.parametrize("arguments, kind, message", [
    (dict(target=90, epochs=3), ValueError,
     "target must be in [0, 1], got 90; pass a fraction, e.g. 0.9 for 90 %."),
    (dict(target=math.nan, epochs=3), ValueError,
     "target must be in [0, 1], got nan; pass a fraction, e.g. 0.9 for 90 %."),
    (dict(target=None, epochs=3), TypeError,
     "target must be a number in [0, 1], got a NoneType; pass e.g. target=0.9."),
    (dict(target=0.9, epochs=0), ValueError,
     "epochs must be an integer of at least 1, got 0; pass a larger one."),
    (dict(target=0.9, epochs=2.5), TypeError,
     "epochs must be an integer of at least 1, got 2.5; pass an int."),
    (dict(target=0.9, epochs=3, hold=-1), ValueError,
     "hold must be an integer of at least 0, got -1; pass a larger one."),
    (dict(target=0.9, epochs=3, variant="cubic"), ValueError,
     "variant must be one of 'paper', 'language_model', got 'cubic'; pick one of them."),
])
def test_bad_schedules(arguments, kind, message):
    with pytest.raises(kind) as error:
        linear_schedule(**arguments)
    assert str(error.value) == message
