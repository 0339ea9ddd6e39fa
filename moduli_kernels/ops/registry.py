"""How an op is declared: an `Op` holds everything that PyTorch must know about it, and `declare` hands it over.

The compiled CPU kernels register themselves for the schemas declared here (csrc/cpu); an op without one, or a package
without its compiled library, is served by the op's fallback.
"""
from __future__ import annotations

import importlib
import typing
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, runtime

library = torch.library.Library("moduli_kernels", "DEF")

declared: dict[str, Op] = {}  # every op by its name

# How a field of a group of arguments is written in a schema.
SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", list[Tensor]: "Tensor[]", list[Tensor | None]: "Tensor?[]",
    bool: "bool", int: "int", float: "float", str: "str",
    list[bool]: "bool[]", list[int]: "int[]", list[float]: "float[]",
}


class Derivative(NamedTuple):
    """The autograd formula of an op, which torch.compile takes (eager mode has autograd.Functions of its own).

    save: (ctx, results, *arguments) -> None keeps what the formula needs. results: the op's result, or their tuple.
    formula: (ctx, needs, *gradients of the results) -> {name of an argument: its gradient}. Arguments that are left out
        have none. needs: {name of an argument: whether its gradient is asked for}.
    """

    save: Callable[..., None]
    formula: Callable[..., dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Op:
    """One op, torch.ops.moduli_kernels.<name>. The package's functions for it take its arguments in groups.

    name: the op's name, which its Triton launcher has too. A name ends with _ where an argument is written in place.
    arguments: what the op takes, in order: one argument, written as in a schema ("Tensor grad"), or a group of them, a
        NamedTuple class whose fields stand in the schema one by one.
    returns: what it gives, written as in a schema.
    fallback: (*arguments) -> the results, in plain PyTorch, for every device that has no kernel.
    fake: (*arguments) -> results of the right shapes and dtypes without their numbers, for torch.compile.
    launcher: the module below moduli_kernels/triton that holds the function `name`, which takes the op's arguments one
        by one. The first call imports it. None: there is no Triton kernel, and the fallback serves CUDA.
    derivative: the autograd formula; None for an op that is called where autograd is off.
    mutates: the name of the argument that is written in place.
    """

    name: str
    arguments: tuple[str | type[tuple[Any, ...]], ...]
    returns: str
    fallback: Callable[..., Any]
    fake: Callable[..., Any]
    launcher: str | None = None
    derivative: Derivative | None = None
    mutates: str | None = None
    _cuts: list[tuple[Callable[..., Any] | None, int, int]] = field(init=False, repr=False)

    def __post_init__(self):
        # For each of `arguments`: the class of its group or None, and where its values begin and end one by one.
        cuts: list[tuple[Callable[..., Any] | None, int, int]] = []
        start = 0
        for group in self.arguments:
            make, fields = (None, 1) if isinstance(group, str) else (group, len(group._fields))  # pyright: ignore[reportAttributeAccessIssue]
            cuts.append((make, start, start + fields))
            start += fields
        object.__setattr__(self, "_cuts", cuts)

    def grouped(self, arguments: Iterable[Any]) -> tuple[Any, ...]:
        """The op's arguments, given one by one, in the groups of `self.arguments`."""
        flat = tuple(arguments)
        return tuple([flat[start] if make is None else make(*flat[start:end]) for make, start, end in self._cuts])

    def by_reference(self, *arguments: Any) -> Any:
        """What the fallback gives for the op's arguments, given one by one as to the op itself."""
        return self.fallback(*self.grouped(arguments))

    def launch(self, *arguments: Any) -> Any:
        """What the Triton launcher gives for the op's arguments, given one by one as to the op itself."""
        module = importlib.import_module(f"moduli_kernels.triton.{self.launcher}")
        return getattr(module, self.name)(*arguments)

    def fields(self) -> list[tuple[str, str]]:
        """(type as in a schema, name) of every argument, one by one."""
        fields = []
        for group in self.arguments:
            if isinstance(group, str):
                fields.append(tuple(group.split()))
            else:
                hints = typing.get_type_hints(group)
                fields += [(SCHEMA_TYPES[hints[field]], field) for field in group._fields]  # pyright: ignore[reportAttributeAccessIssue]
        return fields

    def schema(self) -> str:
        """The op as PyTorch's dispatcher reads it; Tensor(a!) marks what is written in place."""
        written = (f"{kind.replace('Tensor', 'Tensor(a!)') if name == self.mutates else kind} {name}"
                   for kind, name in self.fields())
        return f"{self.name}({', '.join(written)}) -> {self.returns}"


def declare(op: Op) -> Op:
    """Registers an op with PyTorch: schema, fallback, fake kernel, derivative and, with Triton installed, launcher.

    Triton's kernels serve CUDA tensors. In Triton's interpreter they serve CPU tensors too, where the backend "triton"
    is chosen; all other calls go to what served the CPU before, the compiled kernel or the fallback.
    """
    declared[op.name] = op
    qualified = f"moduli_kernels::{op.name}"
    library.define(op.schema(), tags=(torch.Tag.pt2_compliant_tag,) if op.mutates is None else ())
    library.impl(op.name, op.by_reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, lambda *arguments: op.fake(*op.grouped(arguments)), lib=library)
    if op.derivative is not None:
        _register_derivative(op, op.derivative)
    if op.launcher is None:
        return op
    if runtime.triton_installed:
        library.impl(op.name, op.launch, "CUDA")
    if runtime.triton_interpreted:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns that the compiled kernel is replaced, which is meant
            library.impl(op.name, _interpreted(op), "CPU", with_keyset=True)
    return op


def _register_derivative(op: Op, derivative: Derivative) -> None:
    names = [name for _, name in op.fields()]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        derivative.save(ctx, output, *op.grouped(inputs))

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        found = derivative.formula(ctx, dict(zip(names, ctx.needs_input_grad)), *gradients)
        return tuple(found.get(name) for name in names)

    torch.library.register_autograd(f"moduli_kernels::{op.name}", backward, setup_context=save, lib=library)


def _interpreted(op: Op) -> Callable[..., Any]:
    """What serves CPU tensors under Triton's interpreter: (dispatch keys, *arguments one by one) -> results."""
    qualified = f"moduli_kernels::{op.name}"
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU")
    before = torch.library.get_kernel(qualified, "CPU").call_boxed if compiled else None

    def on_cpu(keys: Any, *arguments: Any) -> Any:
        if backends.active("cpu") == "triton":
            return op.launch(*arguments)
        return before(keys, *arguments) if before else op.by_reference(*arguments)

    return on_cpu
