"""The library in which the ops are declared, and how the Triton kernels are registered for them."""
from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable

import torch

from .. import backends, runtime

library = torch.library.Library("moduli_kernels", "DEF")


def register_triton(schemas: Iterable[str], module_of: Callable[[str], str], fallbacks: dict[str, Callable]) -> None:
    """Has CUDA tensors served by the launcher of each op's own name. In Triton's interpreter CPU tensors too, where the
    backend "triton" is chosen, else by what served them before.

    module_of: from an op's name to the module of moduli_kernels/triton that holds its launcher, which is imported by
    the first call. fallbacks: the reference of op `name` as "_name"; a module's globals().
    """
    for name in schemas if runtime.triton_installed else ():
        library.impl(name, _triton(name, module_of), "CUDA")
    for name in schemas if runtime.triton_interpreted else ():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that they replace the compiled ones
            library.impl(name, _interpreted(name, module_of, fallbacks), "CPU", with_keyset=True)


def _triton(name: str, module_of: Callable[[str], str]) -> Callable:
    def launch(*arguments):
        module = importlib.import_module(f"moduli_kernels.triton.{module_of(name)}")
        return getattr(module, name)(*arguments)

    return launch


def _interpreted(name: str, module_of: Callable[[str], str], fallbacks: dict[str, Callable]) -> Callable:
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"moduli_kernels::{name}", "CPU")
    before = torch.library.get_kernel(f"moduli_kernels::{name}", "CPU").call_boxed if compiled else None
    launch = _triton(name, module_of)

    def on_cpu(keys, *arguments):
        if backends.active("cpu") == "triton":
            return launch(*arguments)
        return before(keys, *arguments) if before else fallbacks[f"_{name}"](*arguments)

    return on_cpu
