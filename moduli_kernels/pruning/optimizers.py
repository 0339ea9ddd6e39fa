"""Checks the optimizers that a user gives a pruner.

The pruner needs none: masked weights are held at 0 whatever optimizer steps them (masks/holding.py). One that is given
tells which weights the user expects it to train, so that a mistake is found at once.
"""
from __future__ import annotations

from typing import Any

from torch import Tensor


def check(optimizer: Any) -> list[Any]:
    """Returns the optimizers as a list, empty for None, each with param_groups.

    Args:
        optimizer: None, an optimizer, a wrapper of one, or several of them.

    Raises:
        TypeError: one has neither param_groups nor an attribute `optimizer` that has.
    """
    if optimizer is None:
        return []
    several = isinstance(optimizer, (list, tuple))
    return [_unwrapped(each) for each in (optimizer if several else [optimizer])]


def check_has_one_of(optimizer: Any, parameters: list[Tensor]) -> None:
    """Checks that one of the optimizers, where there are any, has one of the parameters.

    Raises:
        TypeError: as `check`.
        ValueError: none has one.
    """
    optimizers = check(optimizer)
    wanted = {id(parameter) for parameter in parameters}
    held = {id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]}
    if optimizer is not None and not wanted & held:
        kinds = ", ".join(type(each).__name__ for each in optimizers) or "an empty list"
        raise ValueError(
            f"optimizer must hold at least one of the targets, got {kinds} that holds none of them; pass the one that "
            "steps these weights (made from this model's parameters), or None."
        )


def _unwrapped(optimizer: Any) -> Any:
    inner = optimizer
    while inner is not None and not _has_groups(inner):
        inner = getattr(inner, "optimizer", None)
    if inner is None:
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, a wrapper that has param_groups, or a list of them, got a "
            f"{type(optimizer).__name__}; pass the one that steps these weights, or None."
        )
    return inner


def _has_groups(value: Any) -> bool:
    groups = getattr(value, "param_groups", None)
    return isinstance(groups, list) and all(isinstance(group, dict) and "params" in group for group in groups)
