"""Sparsity over the epochs of a training run (paper, section 5)."""
from __future__ import annotations

import numbers
from typing import Any

from .. import checks


def fraction(name: str, value: Any) -> float:
    """Returns the argument `name` as a float; raises unless it is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        kind = type(value).__name__
        raise TypeError(f"{name} must be a number in [0, 1], got a {kind}; pass e.g. {name}=0.9.")
    if not 0 <= value <= 1:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(f"{name} must be in [0, 1], got {value!r}; pass a fraction, e.g. 0.9 for 90 %.")
    return float(value)


def linear_schedule(target: float, epochs: int, *, variant: str = "paper", hold: int = 0) -> list[float]:
    """Returns the sparsity at the start of each epoch k = 1, ..., epochs; it rises linearly to exactly `target`.

    Args:
        target: the fraction of all weights that is masked in the end, in [0, 1].
        epochs: the number of epochs over which it rises, at least 1.
        variant: "paper" gives (k - 1) target / (epochs - 1). "language_model", as the authors' code for that experiment
            has it, gives 0 in epoch 1 and k target / epochs from epoch 2 on. With one epoch both give target.
        hold: the number of further epochs at target (the authors' code for the adding problem has 10).

    Returns:
        epochs + hold fractions in [0, 1], for `MagnitudePruner.step_to`.

    Raises:
        ValueError: target lies outside [0, 1], epochs < 1, hold < 0, or the variant is unknown.
        TypeError: target is no number, or epochs or hold is no integer.

    Examples:
        >>> mk.linear_schedule(0.8, 3, hold=1)
        [0.0, 0.4, 0.8, 0.8]
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
    # The last share is exactly 1, so that the schedule ends at target and not at a number next to it.
    return [target * share for share in shares] + [target] * hold
