"""Hooks of a module that keep its masked weights at 0, whoever writes them.

Masked weights are set to 0 before a forward pass, before the module's state_dict is made and after one is loaded.
Copies and pickles of the module have these hooks too. They look up the masks when they run and do nothing where there
is none (any more), so that one left behind is harmless.
"""
from __future__ import annotations

import contextlib
import gc
import pydoc
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..graphs import constant_at_compile_time, is_exporting
from .buffers import buffer_name, described, get_mask, is_left_out, masked_names, parameter_of_mask
from .training_hooks import gradient_hooks, mask_changed, register_gradient_hook
from .zeros import is_zero_where_masked, zero_masked_

LOADED_UNDER_A_MASK = "weights of the state_dict that was loaded are masked here and are set to 0"
# Attributes of a module: the parameters whose masks are held no longer; what tells a copy from a module that is held.
_RELEASED, _HELD = "masks_not_held", "holds_masks"

# --- which masks are held ---------------------------------------------------------------------------------------

def released_names(module: nn.Module) -> set[str]:
    """The parameters of the module whose masks are there and held no longer."""
    return vars(module).get(_RELEASED, set())


def release(module: nn.Module, name: str) -> None:
    """Notes that the mask of the parameter `name` is held no longer; the hooks pass it over."""
    vars(module).setdefault(_RELEASED, set()).add(name)


class _NotCopied:
    """An object of which a copy or a pickle holds None."""

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


_not_copied = _NotCopied()


def note_held(module: nn.Module) -> None:
    """Notes that hooks of the module's gradients are registered, which are not in a copy or a pickle of it."""
    vars(module)[_HELD] = _not_copied


def is_copy(module: nn.Module) -> bool:
    """Whether a module with masks came out of a copy or a pickle of one, and nothing has held it since."""
    return vars(module).get(_HELD) is None


def _held_names(module: nn.Module) -> list[str]:
    return [name for name in masked_names(module) if name not in released_names(module)]


# --- the hooks --------------------------------------------------------------------------------------------------

class _ModuleHook:
    """A function that is registered as a hook of a module. There is one object of each kind in the process.

    A copy of the module keeps the object. A pickle of the module, which must be readable without this package, holds an
    expression that gives the object where the package is installed, which it asks for moduli_kernels.<name>, and a
    function that does nothing elsewhere.
    """

    def __init__(self, name: str, function: Callable[..., None]):
        self.name, self.function = name, function

    def __call__(self, *arguments: Any) -> None:
        self.function(*arguments)

    @property
    def __name__(self) -> str:
        """There is none: torch.jit.script asks for it first, to compile the hook, which cannot be compiled."""
        raise AttributeError(
            "torch.jit.script must be given a module without masks, got one whose masks are held by hooks, which it "
            "cannot compile; script a copy.deepcopy(model) after MagnitudePruner(copy, ...).make_permanent() (zeros "
            "stay), or use torch.jit.trace or torch.export.")

    def __deepcopy__(self, memo: Any) -> _ModuleHook:
        return self

    def __reduce__(self) -> Any:
        package = _WhenLoaded(pydoc.locate, "moduli_kernels")  # None where it is not installed
        ours = _WhenLoaded(getattr, package, self.name, None)
        nothing = _WhenLoaded(getattr, contextlib.nullcontext(), "__exit__")  # takes any arguments and returns None
        return next, (_WhenLoaded(filter, None, [ours, nothing]),)


class _WhenLoaded:
    """In a pickle: what a call gives at the time when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


# --- what they do ----------------------------------------------------------------------------------------------

def _zero_before_forward(module: nn.Module, arguments: Any) -> None:
    """A forward pre-hook: the pass sees masked weights, also where something else has written them.

    On the CPU a weight is looked at and written only where a masked entry differs from 0. On other devices, which would
    have to be waited for, masked entries are always written; that is no change, and so does not count in the tensor's
    version. A Parameter that is not known as the module's own (torch.func.functional_call has put it there) is never
    written: the pass uses a masked copy.
    """
    if torch.compiler.is_compiling():
        _zero_in_graph(module)
    elif torch._C._get_tracing_state() is None:
        _zero_eagerly(module)
    else:
        with _not_traced():
            _zero_eagerly(module)


def _zero_before_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """A state_dict pre-hook: what is saved is masked."""
    for name in _held_names(module):
        _zero_quietly(cast(Tensor, module._parameters[name]), cast(Tensor, get_mask(module, name)))


def _zero_after_loading(module: nn.Module, incompatible_keys: Any) -> None:
    """A load_state_dict post-hook: a dense checkpoint does not undo pruning.

    Weights that were saved under another mask would be lost without a word where masks are not part of the state_dict.
    """
    for name in _held_names(module):
        parameter, mask = cast(Tensor, module._parameters[name]), cast(Tensor, get_mask(module, name))
        if is_left_out(module, name) and not is_zero_where_masked(parameter, mask):
            count = int(torch.count_nonzero(parameter.detach().masked_fill(mask, 0)))
            warnings.warn(f"{name} of {type(module).__name__}: {count} {LOADED_UNDER_A_MASK}; to have them, give the "
                          "pruner the masks that they were saved with, before loading.", UserWarning, stacklevel=2)
        zero_masked_(parameter, mask)
        register_gradient_hook(module, name)  # load_state_dict(assign=True) puts another Parameter there
        mask_changed(module, name)


zero_before_forward = _ModuleHook("zero_before_forward", _zero_before_forward)
zero_before_saving = _ModuleHook("zero_before_saving", _zero_before_saving)
zero_after_loading = _ModuleHook("zero_after_loading", _zero_after_loading)


def _zero_in_graph(module: nn.Module) -> None:
    """Sets masked weights to 0 in a graph of torch.compile or torch.export, whatever they hold when it runs.

    A graph registers no hooks, so those of the gradients of a copied module are registered when it is compiled. What
    torch.export makes by dynamo (strict) holds the weights as they are, which are set to 0 then as well.
    """
    if torch.compiler.is_dynamo_compiling() and (is_exporting() or is_copy(module)):
        _hold_while_compiling(id(module))
    for name in _held_names(module):
        parameter, mask = cast(Tensor, module._parameters[name]), cast(Tensor, get_mask(module, name))
        if not is_exporting():
            with torch.no_grad():  # the op, since its write does not count in the tensor's version
                torch.ops.moduli_kernels.zero_masked_(parameter, mask)
        elif not torch.compiler.is_dynamo_compiling():  # an exported program should write no parameter
            _use_masked_copy(module, name)


@constant_at_compile_time
def _hold_while_compiling(address: int) -> None:
    """Sets masked weights to 0 and registers hooks of their gradients while dynamo follows a module's forward pass.

    Dynamo runs this function with constants alone, such as the address of the module, which is searched for among all
    objects there are.
    """
    module = next(each for each in gc.get_objects() if id(each) == address)
    for name in _held_names(module):
        zero_masked_(cast(Tensor, module._parameters[name]), cast(Tensor, get_mask(module, name)))
        register_gradient_hook(module, name)


def _zero_eagerly(module: nn.Module) -> None:
    """Sets the masked weights of a module to 0 for the forward pass that begins. It runs at every step, so it looks at
    each mask once."""
    released = released_names(module)
    for key, mask in list(module._buffers.items()):
        name = parameter_of_mask(key)
        if name is None or mask is None or name in released:
            continue
        parameter = module._parameters.get(name)
        if parameter is None:
            _check_not_lost(module, name, mask)
        elif mask.dtype == torch.bool and parameter.shape == mask.shape:
            _zero_for_call(module, name, parameter, mask)
        else:
            _check_not_held(module, name, parameter, mask)


def _zero_for_call(module: nn.Module, name: str, parameter: Tensor, mask: Tensor) -> None:
    hook = next((hook for hook in gradient_hooks(parameter) if hook.belongs_to(module, name)), None)
    if hook is not None:
        _zero_quietly(parameter, mask)
        hook.link(parameter)
    elif parameter.device.type == "meta":
        return
    elif torch._C._are_functorch_transforms_active() or not is_zero_where_masked(parameter, mask):
        _use_masked_copy(module, name)
    elif isinstance(parameter, nn.Parameter):
        register_gradient_hook(module, name)  # of a copied module, or a new Parameter


def _zero_quietly(parameter: Tensor, mask: Tensor) -> None:
    """Sets masked entries to 0. The write counts in the tensor's version only where it is known to change something."""
    if parameter.device.type == "cpu":
        zero_masked_(parameter, mask)
    else:
        with torch.autograd._unsafe_preserve_version_counter(parameter):  # pyright: ignore[reportPrivateImportUsage]
            zero_masked_(parameter, mask)


def _use_masked_copy(module: nn.Module, name: str) -> None:
    """Lets the forward pass that begins use a masked copy of the parameter, which comes back after the pass."""
    parameter, mask = cast(Any, module._parameters[name]), cast(Tensor, get_mask(module, name))
    module._parameters[name] = torch.where(mask, parameter, 0)  # pyright: ignore[reportArgumentType]

    def put_back(*_: Any) -> None:
        handle.remove()
        module._parameters[name] = parameter

    handle = module.register_forward_hook(put_back, always_call=True)


def _check_not_lost(module: nn.Module, name: str, mask: Tensor) -> None:
    """Raises where something has replaced the masked Parameter, so that its mask no longer counts."""
    if mask.dtype != torch.bool:  # of torch.nn.utils.prune
        return
    value = None if getattr(module, "_is_replica", False) else getattr(module, name, None)  # of nn.DataParallel
    if isinstance(value, Tensor) and value.shape == mask.shape:
        raise RuntimeError(
            f"{name} of {type(module).__name__} must be a plain Parameter while it has a mask, got one that a "
            f"parametrization or another hook computes, which the mask does not reach; del module.{buffer_name(name)} "
            "to go on without it, or use a SparseRNN, which multiplies computed weights by their masks."
        )


def _check_not_held(module: nn.Module, name: str, parameter: Tensor, mask: Tensor) -> None:
    """Raises where a buffer that is no mask of the Parameter has taken the place of one that is held."""
    if any(hook.belongs_to(module, name) for hook in gradient_hooks(parameter)):
        key, kind, shape = buffer_name(name), type(module).__name__, tuple(parameter.shape)
        raise RuntimeError(
            f"{key} of {kind} must be a torch.bool mask {shape}, got {described(mask)}, which would mask nothing; "
            f"assign e.g. mask.bool().expand({shape}).contiguous(), or del module.{key} to go on without it."
        )


@contextlib.contextmanager
def _not_traced() -> Iterator[None]:
    """Keeps what happens inside out of the graph that torch.jit.trace records."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # pyright: ignore[reportAttributeAccessIssue]
