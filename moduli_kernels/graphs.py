"""What code that torch.compile or torch.export follows may ask and do."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def is_exporting() -> bool:
    """torch.compiler.is_exporting(), which is True in torch 2.10 wherever torch.compile follows the code."""
    return torch.compiler._is_exporting_flag  # pyright: ignore[reportPrivateImportUsage]


def constant_at_compile_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """Does what torch.compiler.assume_constant_result does, without importing the compiler."""
    vars(function)["_dynamo_marked_constant"] = True
    return function
