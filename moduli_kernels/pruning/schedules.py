"""Sparsity over the epochs of a training run (paper, section 5)."""
from __future__ import annotations

import numbers
from typing import Any

from .. import checks


def fraction(name: str, value: Any) -> float:
    """A share of all weights, in [0, 1], as a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        kind = type(value).__name__
        raise TypeError(f"{name} must be a number in [0, 1], got a {kind}; pass e.g. {name}=0.9.")
    if not 0 <= value <= 1:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(f"{name} must be in [0, 1], got {value!r}; pass a fraction, e.g. 0.9 for 90 %.")
    return float(value)


def linear_schedule(target: float, epochs: int, *, variant: str = "paper", hold: int = 0) -> list[float]:
    """Sparsity at the start of each epoch k = 1 ... epochs, rising to exactly `target` in the last one.

    Args:
        target: share of all weights to be cut in the end, in [0, 1].
        epochs: over which it rises, at least 1.
        variant: "paper": (k - 1) target / (epochs - 1); with one epoch, target at once. "language_model" (the authors'
            code for it): 0 in epoch 1, then k target / epochs; with one epoch, target.
        hold: further epochs at target (the adding problem's code has 10).

    Returns:
        epochs + hold shares in [0, 1], for `MagnitudePruner.step_to`.

    Raises:
        ValueError: target outside [0, 1], epochs < 1, hold < 0 or an unknown variant.
        TypeError: target is no number, epochs or hold no integer.
    """
    target = fraction("target", target)
    checks.positive_int("epochs", epochs)
    checks.positive_int("hold", hold, minimum=0)
    checks.one_of("variant", variant, ("paper", "language_model"))
    if epochs == 1:
        shares = [1.0]
    elif variant == "paper":
        shares = [(k - 1) / (epochs - 1) for k in range(1, epochs + 1)]
    else:
        shares = [0.0] + [k / epochs for k in range(2, epochs + 1)]
    # The last share is exactly 1, so the schedule ends at target and not an ulp beside it.
    return [target * share for share in shares] + [target] * hold
