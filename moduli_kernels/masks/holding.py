"""What keeps masked weights at 0, whoever writes them.

A mask that is set is held by four kinds of hooks. All look up the module's mask when they run and do nothing where
there is none (any more), so that one left behind is harmless.

    the module      before a forward pass, before its state_dict is made and after one is loaded, masked weights are set
                    to 0. Copies and pickles of the module have these hooks too. A module that multiplies by its masks
                    itself says so by `applies_masks = True`, and needs none before forward.
    the Parameter   masks the gradient before it is accumulated, and so before clipping
    the optimizer   one hook for every optimizer in the process masks weights after its step, so that momentum and
                    weight decay revive nothing
    torch's prune   a mask that torch.nn.utils.prune puts in the place of ours keeps what ours has masked
"""
from __future__ import annotations

import contextlib
import pydoc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..distributed import is_sharded
from .averaging import keep_masks_when_averaging
from .buffers import buffer_name, get_mask, is_left_out, live_mask, masked_names, parameter_of_mask
from .zeros import is_zero_where_masked, zero_masked_

LOADED_UNDER_A_MASK = "weights of the state_dict that was loaded are masked here and are set to 0"
_RELEASED = "masks_not_held"  # attribute of a module: the parameters whose masks stop_holding has let go


# --- setting and removing ---------------------------------------------------------------------------------------

def set_mask(module: nn.Module, name: str, mask: Tensor) -> None:
    """Registers `mask` itself, not a copy, as the mask of the parameter `name`, in place of one that is there, and
    holds it. Masked weights become 0 at the next of the events above; zero_masked_ sets them to 0 at once."""
    module.register_buffer(buffer_name(name), mask)
    hold(module, name)


def remove_mask(module: nn.Module, name: str) -> None:
    """Takes the mask of the parameter `name` and its hooks away; nothing happens where there is none."""
    stop_holding(module, name)
    if get_mask(module, name) is not None:
        delattr(module, buffer_name(name))
    _released(module).discard(name)
    if not masked_names(module):
        _remove_module_hooks(module)


def hold(module: nn.Module, name: str) -> None:
    """Registers what keeps the masked weights of the parameter `name` at 0; what is registered stays so."""
    _hold_in_the_process()
    _released(module).discard(name)
    if not getattr(module, "applies_masks", False):
        _register_once(module._forward_pre_hooks, module.register_forward_pre_hook, zero_before_forward)
    _register_once(module._state_dict_pre_hooks, module.register_state_dict_pre_hook, zero_before_saving)
    _register_once(module._load_state_dict_post_hooks, module.register_load_state_dict_post_hook, zero_after_loading)
    _register_gradient_hook(module, name)


def stop_holding(module: nn.Module, name: str) -> None:
    """Removes what `hold` has registered for the parameter `name`; a hook or a Parameter that is gone is no error."""
    parameter = module._parameters.get(name)
    for hook in _gradient_hooks(parameter):
        if hook.belongs_to(module, name):
            hook.handle.remove()
    if get_mask(module, name) is not None:
        vars(module).setdefault(_RELEASED, set()).add(name)


def mask_changed(module: nn.Module, name: str) -> None:
    """Notes that more weights are masked: an optimizer forgets what it has gathered of them, now if it is known to have
    stepped the parameter, and at its next step.

    On the CPU the latter is seen by itself, where an optimizer has moved masked weights. Some have more to forget at
    once: schedule-free ones compute the weights from their own copy of them when they go over to evaluation.
    """
    parameter = module._parameters.get(name)
    for hook in _gradient_hooks(parameter):
        if hook.belongs_to(module, name):
            hook.mask_changed = True
            optimizer, mask = hook.optimizer(), hook.mask()
            if optimizer is not None and mask is not None:
                _forget_masked(optimizer.state.get(parameter), cast(Tensor, parameter), mask)


def _released(module: nn.Module) -> set[str]:
    return vars(module).get(_RELEASED, set())


def is_held(module: nn.Module, name: str) -> bool:
    """Whether hooks keep the masked weights of the parameter `name` at 0."""
    return (name not in _released(module) and live_mask(module, name) is not None
            and any(hook is zero_before_saving for hook in module._state_dict_pre_hooks.values()))


def _held_names(module: nn.Module) -> list[str]:
    return [name for name in masked_names(module) if name not in _released(module)]


def _register_once(hooks: dict[int, Any], register: Any, function: Any) -> None:
    if not any(hook is function for hook in hooks.values()):
        register(function)


def _remove_module_hooks(module: nn.Module) -> None:
    for hooks, function in ((module._forward_pre_hooks, zero_before_forward),
                            (module._state_dict_pre_hooks, zero_before_saving),
                            (module._load_state_dict_post_hooks, zero_after_loading)):
        for key in [key for key, hook in hooks.items() if hook is function]:
            del hooks[key]


# --- hooks of the module ----------------------------------------------------------------------------------------

class _ModuleHook:
    """A function that is registered as a hook of a module. There is one object of each kind in the process.

    A copy of the module keeps the object. A pickle of the module, which must be readable without this package, holds an
    expression that gives the object where the package is installed, and a function that does nothing elsewhere.
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
        _register_gradient_hook(module, name)  # load_state_dict(assign=True) puts another Parameter there
        mask_changed(module, name)


zero_before_forward = _ModuleHook("zero_before_forward", _zero_before_forward)
zero_before_saving = _ModuleHook("zero_before_saving", _zero_before_saving)
zero_after_loading = _ModuleHook("zero_after_loading", _zero_after_loading)


def _zero_in_graph(module: nn.Module) -> None:
    """Sets masked weights to 0 in a graph of torch.compile or torch.export, whatever they hold when it runs."""
    for name in _held_names(module):
        parameter, mask = cast(Tensor, module._parameters[name]), cast(Tensor, get_mask(module, name))
        if not torch.compiler.is_exporting():
            with torch.no_grad():  # the op, since its write does not count in the tensor's version
                torch.ops.moduli_kernels.zero_masked_(parameter, mask)
        elif not torch.compiler.is_dynamo_compiling():  # an exported program should write no parameter
            _use_masked_copy(module, name)


def _zero_eagerly(module: nn.Module) -> None:
    """Sets the masked weights of a module to 0 for the forward pass that begins. It runs at every step, so it looks at
    each mask once."""
    released = _released(module)
    for key, mask in list(module._buffers.items()):
        name = parameter_of_mask(key)
        if name is None or mask is None or mask.dtype != torch.bool or name in released:
            continue
        parameter = module._parameters.get(name)
        if parameter is None:
            _check_not_lost(module, name, mask)
        elif parameter.shape == mask.shape:
            _zero_for_call(module, name, parameter, mask)


def _zero_for_call(module: nn.Module, name: str, parameter: Tensor, mask: Tensor) -> None:
    hook = next((hook for hook in _gradient_hooks(parameter) if hook.belongs_to(module, name)), None)
    if hook is not None:
        _zero_quietly(parameter, mask)
        hook.link(parameter)
    elif parameter.device.type == "meta":
        return
    elif torch._C._are_functorch_transforms_active() or not is_zero_where_masked(parameter, mask):
        _use_masked_copy(module, name)
    elif isinstance(parameter, nn.Parameter):
        _register_gradient_hook(module, name)  # of a copied module, or a new Parameter


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
    value = None if getattr(module, "_is_replica", False) else getattr(module, name, None)  # of nn.DataParallel
    if isinstance(value, Tensor) and value.shape == mask.shape:
        raise RuntimeError(
            f"{name} of {type(module).__name__} must be a plain Parameter while it has a mask, got one that a "
            f"parametrization or another hook computes, which the mask does not reach; del module.{buffer_name(name)} "
            "to go on without it, or use a SparseRNN, which multiplies computed weights by their masks."
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


# --- hooks of the Parameter -------------------------------------------------------------------------------------

def _register_gradient_hook(module: nn.Module, name: str) -> None:
    parameter = module._parameters.get(name)
    if parameter is not None:
        kind = _ShardGradientHook if is_sharded(parameter) else _GradientHook
        kind.register(module, name)


def _gradient_hooks(parameter: Tensor | None) -> list[_Hook]:
    """The hooks of masks on a Parameter: one for each module that holds a mask of it."""
    found: list[_Hook] = []
    for hooks in () if parameter is None else (parameter._backward_hooks, parameter._post_accumulate_grad_hooks):
        if hooks:
            found += [hook for hook in hooks.values() if isinstance(hook, _Hook)]
    return found


def _none() -> None:
    """Stands for a weak reference to nothing."""


class _Hook:
    """Holds a module, weakly so that no hook keeps a model alive, and a parameter's name."""

    __torch_unserializable__ = True  # torch drops it without a warning when the parameter goes to another process

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = weakref.ref(module), name
        self.handle: Any = None  # removes the hook from where it is registered
        self.mask_changed = True  # since the last step of an optimizer
        self.optimizer: Callable[[], Any] = _none  # a weak reference to the optimizer of that step

    def belongs_to(self, module: nn.Module, name: str) -> bool:
        return self.name == name and self.module() is module

    def link(self, parameter: Any) -> None:
        """Makes sure that autograd knows the hook of this Parameter."""

    def mask(self) -> Tensor | None:
        return live_mask(self.module(), self.name)


class _GradientHook(_Hook):
    """Masks a gradient before it is accumulated into .grad, and so before clipping."""

    tensor: int  # the address of the C++ tensor to which the hook is linked

    @classmethod
    def register(cls, module: nn.Module, name: str) -> None:
        """Registers one hook a Parameter, and another where the Parameter was replaced or its tensor swapped."""
        parameter: Any = module._parameters[name]
        if not parameter.requires_grad or not parameter.is_leaf:
            return
        hook = next((h for h in _gradient_hooks(parameter) if isinstance(h, cls) and h.belongs_to(module, name)), None)
        if hook is None:
            hook = cls(module, name)
            hook.handle, hook.tensor = parameter.register_hook(hook), parameter._cdata
        hook.link(parameter)

    def link(self, parameter: Any) -> None:
        """swap_tensors (module.to under torch.__future__'s swap) leaves the dict of hooks on the Python object but not
        on the new tensor; assigning the dict links it again."""
        if self.tensor != parameter._cdata:
            parameter._backward_hooks = parameter._backward_hooks
            self.tensor = parameter._cdata

    def __call__(self, grad: Tensor) -> Tensor | None:
        mask = self.mask()
        if mask is None:
            return None
        return torch.where(mask, grad, 0) if grad.layout == torch.strided else grad * mask


class _ShardGradientHook(_Hook):
    """Masks .grad of a sharded Parameter after each accumulation, and so before clipping.

    FSDP writes the gradients of shards itself, and this is the only kind of hook that it calls.
    """

    @classmethod
    def register(cls, module: nn.Module, name: str) -> None:
        """Registers one hook a Parameter, and another where the Parameter was replaced."""
        parameter: Any = module._parameters[name]
        known = any(isinstance(h, cls) and h.belongs_to(module, name) for h in _gradient_hooks(parameter))
        if parameter.requires_grad and not known:
            hook = cls(module, name)
            hook.handle = parameter.register_post_accumulate_grad_hook(hook)

    def __call__(self, parameter: Tensor) -> None:
        mask = self.mask()
        if mask is not None:
            zero_masked_(cast(Tensor, parameter.grad), mask)


# --- hooks of the process ---------------------------------------------------------------------------------------

def _zero_after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """A hook after the step of every optimizer: masks the weights that it has moved.

    Where it has moved masked ones, it still has momentum or other state of them, which is set to 0 as well.
    """
    reference = weakref.ref(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for hook in _gradient_hooks(parameter):
                mask = hook.mask()
                if mask is None:
                    continue
                hook.optimizer = reference
                moved = zero_masked_(parameter, mask) and parameter.device.type == "cpu"
                if moved or hook.mask_changed:
                    hook.mask_changed = False
                    _forget_masked(optimizer.state.get(parameter), parameter, mask)


def _forget_masked(state: Any, parameter: Tensor, mask: Tensor) -> None:
    for value in state.values() if isinstance(state, dict) else ():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            zero_masked_(value, mask)


def _keep_our_mask(module: nn.Module, key: str, buffer: Tensor | None) -> Tensor | None:
    """A hook of every register_buffer: where torch.nn.utils.prune puts its float mask in the place of a held bool mask,
    returns the product of both."""
    name = parameter_of_mask(key)
    if name is None or buffer is None or not buffer.is_floating_point():
        return None
    ours = get_mask(module, name)
    if ours is None or ours.dtype != torch.bool or ours.shape != buffer.shape or name in _released(module):
        return None
    return buffer * ours


_held_in_the_process = False


def _hold_in_the_process() -> None:
    """Registers, once, the hooks that are there for all optimizers, averages and modules."""
    global _held_in_the_process
    if not _held_in_the_process:
        _held_in_the_process = True
        # In a compiled step, dynamo would trace the hook, and sees no hooks of Parameters. Making an optimizer has
        # imported dynamo already, so that this decorator, which imports it at the first call, costs nothing.
        register_optimizer_step_post_hook(torch._compile._disable_dynamo(_zero_after_step))  # pyright: ignore
        register_module_buffer_registration_hook(_keep_our_mask)  # pyright: ignore[reportArgumentType]
        keep_masks_when_averaging(set_mask, remove_mask)
