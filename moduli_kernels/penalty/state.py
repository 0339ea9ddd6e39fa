"""The settings of a regularizer in its state dict, and when two of them are the same."""
from __future__ import annotations

import ast
import hashlib
import json
import re
from typing import Any

import torch
from torch import Tensor

from ..geometry.base import Inhibitor, Manifold
from ..geometry.inhibitors import TabulatedInhibitor


def packed(settings: dict[str, Any]) -> Tensor:
    """The settings as JSON: uint8, on the CPU."""
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8, device="cpu")


def unpacked(state: Tensor) -> dict[str, Any]:
    """The settings in what `packed` made; none in a tensor on the meta device."""
    return {} if state.is_meta else json.loads(bytes(state.tolist()).decode())


def described(setting: Manifold | Inhibitor) -> str:
    """A text that two manifolds or inhibitors have in common only where they are the same."""
    if isinstance(setting, TabulatedInhibitor):
        digest = hashlib.sha256(json.dumps(setting.values).encode()).hexdigest()[:16]
        return f"{setting!r} of values {digest}"
    return repr(setting)


def same_setting(saved: Any, mine: Any) -> bool:
    """Whether two settings are equal by value: Circle(radius=5) and Circle(radius=5.0) are, and a function is the same
    wherever it lay in memory."""
    if isinstance(saved, str) and isinstance(mine, str):
        return _canonical(saved) == _canonical(mine)
    return saved == mine


def _canonical(text: str) -> str:
    """A description in which all numbers are floats, and which holds no address in memory."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", text)
    head, of, values = text.partition(" of values ")
    try:
        tree = ast.parse(head, mode="eval")
    except SyntaxError:  # as of a function: CallableInhibitor(<lambda>)
        return text
    return ast.dump(_Floats().visit(tree)) + of + values


class _Floats(ast.NodeTransformer):
    """Turns the numbers of an expression into floats, NumPy's among them: 5, 5.0 and np.float64(5.0) are one."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        number = isinstance(node.value, (int, float)) and not isinstance(node.value, bool)
        return ast.Constant(float(node.value)) if number else node  # pyright: ignore[reportArgumentType]

    def visit_Call(self, node: ast.Call) -> ast.AST:
        function = node.func
        if isinstance(function, ast.Attribute) and ast.unparse(function.value) in ("np", "numpy") and node.args:
            return self.visit(node.args[0])
        return self.generic_visit(node)
