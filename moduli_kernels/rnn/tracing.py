"""How a call is made: in plain eager mode, or recorded, transformed or taken over by something else.

In plain eager mode Python may look at the numbers in masks and weights and decide by them. Elsewhere it may not: a
compiler or tracer records the call for other numbers, fake tensors have none, and under torch.func a tensor stands for
several. Objects with a `__torch_function__` of their own want to see the functions that torch.nn.RNN calls.
"""
from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy

from ..graphs import is_exporting

PLAIN = (Tensor, nn.Parameter)


def untraced(function: Callable) -> Callable:
    """Has torch.compile run `function` outside its graphs, and not compile what it calls piece by piece.

    It does so where torch.compile could not take the caller into a graph. It does not import the compiler, which takes
    seconds.
    """
    disabled = None

    @functools.wraps(function)
    def call(*arguments):
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return function(*arguments)
            disabled = torch.compiler.disable(function)
        return disabled(*arguments)

    return call


def is_recorded_or_transformed() -> bool:
    """Whether something else than autograd's backward mode follows this call: torch.export, torch.jit.trace,
    torch.func, forward-mode derivatives, make_fx, or a mode of fake tensors."""
    if torch.compiler.is_compiling():
        return is_exporting()
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    kinds = torch._C._TorchDispatchModeKey
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        torch._C._get_dispatch_mode(kind) is not None for kind in (kinds.FAKE, kinds.PROXY))


def may_look_at(tensors: Iterable[Tensor | None]) -> bool:
    """Whether Python may look at the numbers in these tensors and decide by them."""
    return not torch.compiler.is_compiling() and not is_recorded_or_transformed() and all(
        [t is None or type(t) in PLAIN and not t.is_meta for t in tensors])  # a list takes half the time of a generator


def is_taken_over(values: Iterable[Any]) -> bool:
    """Whether one of the values has a __torch_function__ of its own, as subclasses of Tensor have by inheritance."""
    own = False
    for value in values:
        kind = type(value)
        own = own or kind not in PLAIN and (
            getattr(kind, "__torch_function__", None) not in (None, torch._C._disabled_torch_function_impl))
    return own and torch._C._is_torch_function_enabled()


def recorded(module: nn.Module, *arguments: Any) -> Proxy | None:
    """The call of a module as one node of the graph that torch.fx.symbolic_trace records, None where it records none.

    A tracer keeps the modules of torch.nn whole, which it knows by name. Here a module does the same for itself, unless
    it is what is traced; then None is returned too.
    """
    for value in arguments:
        if isinstance(value, Proxy):
            name = value.tracer.path_of_module(module)  # pyright: ignore[reportAttributeAccessIssue]
            given = tuple(arguments[:-1] if arguments[-1] is None else arguments)
            return value.tracer.create_proxy("call_module", name, given, {}) if name else None
    return None
