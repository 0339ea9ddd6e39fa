"""Global magnitude pruning with masks that live on the modules, schedules, the lottery (paper, section 5).

A mask is a bool buffer `<param>_mask` (True = kept) on the module that owns the parameter, so it moves with
`module.to(...)` and is saved in the module's state_dict. Everything here reads it afresh from the module.
"""
from __future__ import annotations

import contextlib
import math
import numbers
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from . import _checks

Pairs = list[tuple[nn.Module, str]]


# --- checks that only this module needs ---------------------------------------------------------------------

def _fraction(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        kind = type(value).__name__
        raise TypeError(f"{name} must be a number in [0, 1], got a {kind}; pass e.g. {name}=0.9.")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}; pass a fraction, e.g. 0.9 for 90 %.")
    return float(value)


def _pairs(targets: Any) -> Pairs:
    how = "pass e.g. [(model.rnn, 'weight_hh_l0')]."
    if not isinstance(targets, Iterable) or isinstance(targets, (str, nn.Module)):
        kind = type(targets).__name__
        raise TypeError(f"targets must be a list of (module, parameter name), got a {kind}; {how}")
    pairs = list(targets)
    for i, pair in enumerate(pairs):
        fits = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not (fits and isinstance(pair[0], nn.Module) and isinstance(pair[1], str)):
            kind = type(pair).__name__
            raise TypeError(f"targets[{i}] must be a pair (module, parameter name), got a {kind}; {how}")
    if not pairs:
        raise ValueError(f"targets must name at least one parameter, got an empty list; {how}")
    return [(module, name) for module, name in pairs]


def _prunable(i: int, module: nn.Module, name: str) -> None:
    """(module, name) is a floating-point Parameter whose `<name>_mask` is free or already a mask of ours."""
    kind = type(module).__name__
    if _pruned_by_torch(module, name):
        raise ValueError(
            f"targets[{i}] must be a plain parameter, got {kind}.{name} pruned by torch.nn.utils.prune; use "
            "MagnitudePruner.from_torch_prune(...)."
        )
    parameter = module._parameters.get(name)
    if parameter is None:
        have = ", ".join(n for n, p in module._parameters.items() if p is not None) or "none"
        raise ValueError(
            f"targets[{i}] must name a parameter the module itself owns, got {name!r} of {kind}; it owns: "
            f"{have}."
        )
    if nn.parameter.is_lazy(parameter):
        raise ValueError(
            f"targets[{i}] must be initialized, got the lazy {kind}.{name}; run one forward pass first."
        )
    _floating(i, kind, name, parameter)
    mask = getattr(module, f"{name}_mask", None)
    if mask is None:
        return
    if f"{name}_mask" not in module._buffers or mask.dtype != torch.bool or mask.shape != parameter.shape:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"{name}_mask of targets[{i}] must be a torch.bool buffer {tuple(parameter.shape)}, got {got}: a "
            f"mask that fits no parameter; delete it from the {kind} or give it that shape."
        )


def _floating(i: int, kind: str, name: str, parameter: Tensor) -> None:
    if not parameter.is_floating_point():
        raise TypeError(
            f"targets[{i}] must be a floating-point weight, got {kind}.{name} with {parameter.dtype}; "
            "integer and complex weights are not pruned, leave it out."
        )


def _optimizer(optimizer: Any) -> None:
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got a {type(optimizer).__name__}; pass the one that "
            "steps these weights, or None and call apply() after each step."
        )


def _pruned_by_torch(module: nn.Module, name: str) -> bool:
    return name in _names_pruned_by_torch(module)


def _names_pruned_by_torch(module: nn.Module) -> list[str]:
    hooks = module._forward_pre_hooks.values()
    return [hook._tensor_name for hook in hooks if isinstance(hook, torch_prune.BasePruningMethod)]


# --- hooks --------------------------------------------------------------------------------------------------

def _live_mask(module: nn.Module | None, name: str) -> Tensor | None:
    """The bool mask of a plain parameter, or None where there is none (any more)."""
    if module is None or module._parameters.get(name) is None:
        return None
    mask = module._buffers.get(f"{name}_mask")
    return mask if mask is not None and mask.dtype == torch.bool else None


def _zero(tensor: Tensor, mask: Tensor) -> None:
    # In place and counted by autograd: a backward pass through the weights as they were is rightly an error.
    with torch.no_grad():
        tensor.masked_fill_(~mask, 0)


class _Hook:
    """A module, held weakly so that no hook keeps a model alive, and a parameter's name.

    Without a live mask a hook does nothing, so one left behind on a parameter or an optimizer is harmless.
    """

    __torch_unserializable__ = True  # dropped without a warning when the parameter goes to another process

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = weakref.ref(module), name

    @classmethod
    def of(cls, hooks: dict | None, module: nn.Module, name: str) -> Any:
        """The hook of this kind for (module, name) in `hooks`, or None."""
        mine = (h for h in (hooks or {}).values() if isinstance(h, cls))
        return next((h for h in mine if h.module() is module and h.name == name), None)


class _GradientHook(_Hook):
    """Masks a gradient before it is accumulated into .grad, so before clipping."""

    @classmethod
    def attach(cls, module: nn.Module, name: str) -> None:
        """Once a Parameter; again where the module's Parameter was replaced or its tensor swapped."""
        parameter = module._parameters[name]
        if not parameter.requires_grad:
            return
        hook = cls.of(parameter._backward_hooks, module, name)
        if hook is None:
            hook = cls(module, name)
            hook.handle = parameter.register_hook(hook)
        elif hook.tensor != parameter._cdata:
            # swap_tensors (module.to with torch.__future__'s swap on) leaves the dict of hooks on the Python
            # object but not on the new tensor; assigning the dict links it again.
            parameter._backward_hooks = parameter._backward_hooks
        hook.tensor = parameter._cdata

    def __call__(self, grad: Tensor) -> Tensor | None:
        mask = _live_mask(self.module(), self.name)
        if mask is None:
            return None
        return torch.where(mask, grad, 0) if grad.layout == torch.strided else grad * mask


class _StepHook(_Hook):
    """Masks the weight after each optimizer step, so that momentum and decay revive nothing."""

    @classmethod
    def attach(cls, module: nn.Module, name: str, optimizer: torch.optim.Optimizer) -> None:
        if cls.of(optimizer._optimizer_step_post_hooks, module, name) is None:
            hook = cls(module, name)
            hook.handle = optimizer.register_step_post_hook(hook)

    def __call__(self, *_: Any) -> None:
        module = self.module()
        mask = _live_mask(module, self.name)
        if mask is not None:
            _zero(module._parameters[self.name], mask)
            _GradientHook.attach(module, self.name)


# --- the pruner ---------------------------------------------------------------------------------------------

class _Weight:
    """One pruned Parameter: its key and the (module, name) pairs that own it, several where it is tied."""

    def __init__(self, key: str, module: nn.Module, name: str):
        self.key, self.owners = key, [(module, name)]

    @property
    def parameter(self) -> Tensor:
        module, name = self.owners[0]
        return module._parameters[name]

    @property
    def mask(self) -> Tensor:
        module, name = self.owners[0]
        return module._buffers[f"{name}_mask"]

    def found_mask(self) -> Tensor | None:
        """A mask that one of the owners has already."""
        masks = (module._buffers.get(f"{name}_mask") for module, name in self.owners)
        masks = [mask for mask in masks if mask is not None]
        if any((mask != masks[0]).any() for mask in masks[1:]):
            raise ValueError(
                f"the modules that share {self.key} must have one mask, got masks that differ; delete "
                "all but one."
            )
        return masks[0] if masks else None


def _grouped(pairs: Pairs) -> list[_Weight]:
    """One _Weight a Parameter (`<name>_orig` where torch has renamed it), in the order of `pairs`."""
    weights: dict[int, _Weight] = {}
    for i, (module, name) in enumerate(pairs):
        own = module._parameters
        parameter = own[name] if name in own else own[f"{name}_orig"]
        weight = weights.setdefault(id(parameter), _Weight(f"{i}.{name}", module, name))
        if all(m is not module or n != name for m, n in weight.owners):
            weight.owners.append((module, name))
    for weight in weights.values():
        weight.found_mask()
    return list(weights.values())


class MagnitudePruner:
    """Cuts the smallest weights of all targets together, step by step, and keeps them cut.

    Args:
        targets: list of (module, parameter name). A Parameter reached twice (tied) is counted once, at its
            first place, and every module that owns it gets the same mask buffer.
        optimizer: with it, gradients are masked as they arrive (before accumulation and clipping, as
            torch.nn.utils.prune does) and weights after each `optimizer.step()`, so momentum and decay revive
            nothing. Without it only gradients are masked: call `apply()` after each step.
        block, order: SparseRNN's pruning in blocks, not there yet (NotImplementedError).

    Each module gets a bool buffer `<param>_mask` (True = kept), saved in its state_dict; one that is there
    already (an earlier pruner's) is taken over, and the weights it cuts are set to 0. To load a checkpoint
    with masks, make the pruner first, then load.

    Hooks belong to the weights, not to this object: dropping the pruner keeps the net masked,
    `remove_hooks()` ends it. `copy.deepcopy(model)` copies the masks but no hooks: make a new MagnitudePruner
    on the copy (and its optimizer), which takes the masks over. The same goes for a new optimizer.

    Raises TypeError / ValueError for targets, masks or an optimizer that do not fit; nothing is changed then.
    """

    def __init__(self, targets: Iterable[tuple[nn.Module, str]], *,
                 optimizer: torch.optim.Optimizer | None = None,
                 block: tuple[int, int] | None = None, order: Mapping | None = None):
        if block is not None or order is not None:
            raise NotImplementedError(
                "block and order must be None: pruning in blocks comes with SparseRNN's block pruning; leave "
                "them out to rank weight by weight."
            )
        _optimizer(optimizer)
        pairs = _pairs(targets)
        for i, (module, name) in enumerate(pairs):
            _prunable(i, module, name)
        self._weights = _grouped(pairs)
        self.optimizer = optimizer
        self._hooked = True
        for weight in self._weights:
            mask = weight.found_mask()
            if mask is None:
                mask = torch.ones(weight.parameter.shape, dtype=torch.bool, device=weight.parameter.device)
            for module, name in weight.owners:
                if module._buffers.get(f"{name}_mask") is not mask:
                    module.register_buffer(f"{name}_mask", mask)
        self.apply()

    # -- pruning --

    @torch.no_grad()
    def step_to(self, sparsity: float) -> None:
        """Masks exactly round(sparsity * N) of the N weights of all targets (Python's round: halves to even).

        All weights are ranked together: masked first, then by |w|, then by order of targets and flat
        (row-major) index; the first ones are cut. Masked weights and their gradients are set to 0. Asking for
        what is already cut changes no mask. Mixed dtypes are compared in the widest one.

        Raises ValueError for a sparsity outside [0, 1] or below what is already cut, and for NaN among the
        weights; then nothing was changed.
        """
        sparsity = _fraction("sparsity", sparsity)
        self._check_alive()
        total, cut = self._size(), self._cut()
        count = round(sparsity * total)
        if count < cut:
            raise ValueError(
                f"sparsity must be at least the {cut / total:.6g} already cut ({cut} of {total} weights), "
                f"got {sparsity!r}; pruned weights never come back, load earlier masks to go back."
            )
        if count > cut:
            for weight, mask in zip(self._weights, self._masks_at(count), strict=True):
                weight.mask.copy_(mask)
        self.apply()
        for weight in self._weights:
            grad = weight.parameter.grad
            if grad is not None and grad.layout == torch.strided:
                _zero(grad, weight.mask)
            elif grad is not None:
                weight.parameter.grad = grad * weight.mask

    def _masks_at(self, count: int) -> list[Tensor]:
        """Masks with `count` entries cut, more than are cut now. By selection: sorting takes 7 x longer."""
        dtype = reduce(torch.promote_types, (w.parameter.dtype for w in self._weights), torch.float32)
        scores = torch.empty(self._size(), dtype=dtype, device=self._weights[0].parameter.device)
        parts = scores.split([w.parameter.numel() for w in self._weights])
        for weight, part in zip(self._weights, parts, strict=True):
            cut = ~weight.mask.reshape(-1).to(part.device)
            part.copy_(weight.parameter.reshape(-1)).abs_().masked_fill_(cut, -1)
            if part.isnan().any():
                raise ValueError(
                    f"weights must not hold NaN when they are ranked, got NaN in {weight.key}; no mask was "
                    "changed, look at the loss and the learning rate."
                )
        # On a GPU kthvalue is refused by use_deterministic_algorithms, and sorting is fast.
        on_cpu = scores.device.type == "cpu"
        threshold = scores.kthvalue(count).values if on_cpu else scores.sort().values[count - 1]
        ties = count - int(torch.count_nonzero(scores < threshold))
        masks = []
        for weight, part in zip(self._weights, parts, strict=True):
            keep = part >= threshold
            if ties:
                equal = (part == threshold).nonzero()[:ties, 0]
                keep[equal] = False
                ties -= len(equal)
            masks.append(keep.view(weight.parameter.shape))
        return masks

    def apply(self) -> None:
        """Sets masked weights to 0: after an optimizer step the pruner does not see, or writes by hand."""
        self._check_alive()
        for weight in self._weights:
            module, name = weight.owners[0]
            _zero(weight.parameter, weight.mask)
            if self._hooked:
                _GradientHook.attach(module, name)
            if self._hooked and self.optimizer is not None:
                _StepHook.attach(module, name, self.optimizer)

    def _check_alive(self) -> None:
        again = "make a new MagnitudePruner."
        for weight in self._weights:
            for module, name in weight.owners:
                if _live_mask(module, name) is None:
                    raise RuntimeError(
                        f"{weight.key} has lost its parameter or its bool buffer {name}_mask (made "
                        f"permanent, handed to torch.nn.utils.prune, or deleted); {again}"
                    )
                if module._parameters[name] is not weight.parameter:
                    raise RuntimeError(f"{weight.key} was one tied parameter and is several now; {again}")
                module._buffers[f"{name}_mask"] = weight.mask  # module.to(device) moved each one by itself
            parameter, mask = weight.parameter, weight.mask
            if (mask.shape, mask.device) != (parameter.shape, parameter.device):
                raise RuntimeError(
                    f"{weight.key} and its mask must have one shape and device, got {tuple(parameter.shape)} "
                    f"on {parameter.device} and {tuple(mask.shape)} on {mask.device}; move the module with "
                    "module.to(...), not the parameter alone."
                )

    # -- reading --

    def _size(self) -> int:
        return sum(w.parameter.numel() for w in self._weights)

    def _cut(self) -> int:
        return sum(w.mask.numel() - int(torch.count_nonzero(w.mask)) for w in self._weights)

    @property
    def masks(self) -> dict[str, Tensor]:
        """The live mask buffers, True = kept, by "<position in targets>.<parameter>": "0.weight_hh_l0"."""
        self._check_alive()
        return {w.key: w.mask for w in self._weights}

    @property
    def sparsity(self) -> float:
        """Fraction of all weights that is cut (0 for no weights)."""
        self._check_alive()
        return self._cut() / max(self._size(), 1)

    def densities(self) -> dict[str, float]:
        """Kept fraction of each weight, with the keys of `masks` (1 for an empty one)."""
        masks = self.masks.items()
        return {key: int(torch.count_nonzero(m)) / m.numel() if m.numel() else 1.0 for key, m in masks}

    def __repr__(self) -> str:
        return f"MagnitudePruner({', '.join(w.key for w in self._weights)})"

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the masks: a flat dict of contiguous bool tensors with the keys of `masks`."""
        return {k: m.clone(memory_format=torch.contiguous_format) for k, m in self.masks.items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Takes the masks of `state_dict()`, sparser or denser than now, and sets masked weights to 0.

        Raises ValueError where keys, shapes or dtypes do not fit; then nothing was changed.
        """
        masks = self.masks
        for key in state_dict:
            if key not in masks:
                raise ValueError(
                    f"state_dict must hold a mask for each of {', '.join(masks)}, got {key!r}: a mask that "
                    "fits no parameter; give the pruner the targets it was saved with."
                )
        for key, mask in masks.items():
            new = state_dict.get(key)
            if not isinstance(new, Tensor) or new.dtype != torch.bool or new.shape != mask.shape:
                got = f"{new.dtype} {tuple(new.shape)}" if isinstance(new, Tensor) else "none"
                raise ValueError(
                    f"state_dict[{key!r}] must be a torch.bool mask {tuple(mask.shape)}, got {got}; give the "
                    "pruner the targets it was saved with."
                )
        for key, mask in masks.items():
            mask.copy_(state_dict[key])
        self.apply()

    # -- leaving --

    def remove_hooks(self) -> None:
        """Stops masking gradients, and weights after optimizer steps. Masks stay and `apply()` works."""
        self._hooked = False
        for weight in self._weights:
            module, name = weight.owners[0]
            parameter = module._parameters.get(name)
            hooks = [_GradientHook.of(getattr(parameter, "_backward_hooks", None), module, name)]
            if self.optimizer is not None:
                hooks.append(_StepHook.of(self.optimizer._optimizer_step_post_hooks, module, name))
            for hook in hooks:
                if hook is not None:
                    hook.handle.remove()

    def make_permanent(self) -> None:
        """Leaves plain modules: masked weights are 0, mask buffers and hooks are gone. It ends here."""
        self.apply()
        self.remove_hooks()
        for weight in self._weights:
            for module, name in weight.owners:
                delattr(module, f"{name}_mask")

    def to_torch_prune(self) -> None:
        """Hands the masks to torch.nn.utils.prune: `<param>_orig`, `<param>_mask` and a forward pre-hook.

        `<param>_orig` is the same Parameter object, so optimizers go on working. This pruner ends here.
        """
        masks = self.state_dict()
        self.make_permanent()
        for weight in self._weights:
            for module, name in weight.owners:
                torch_prune.custom_from_mask(module, name, masks[weight.key])

    @classmethod
    def from_torch_prune(cls, targets_or_model: nn.Module | Iterable[tuple[nn.Module, str]],
                         optimizer: torch.optim.Optimizer | None = None) -> MagnitudePruner:
        """Takes over what torch.nn.utils.prune has pruned: all of a model, or the given targets.

        The Parameter object that was `<param>_orig` becomes `<param>` again, so optimizers go on working.
        Targets that torch has not pruned start with nothing cut. Raises ValueError where it has pruned none
        of them, or where a mask holds anything but 0 and 1; then nothing was changed.
        """
        _optimizer(optimizer)
        if isinstance(targets_or_model, nn.Module):
            pairs = [(m, name) for m in targets_or_model.modules() for name in _names_pruned_by_torch(m)]
        else:
            pairs = _pairs(targets_or_model)
        masks = {}
        for i, (module, name) in enumerate(pairs):
            if not _pruned_by_torch(module, name):
                _prunable(i, module, name)
                continue
            kind, mask = type(module).__name__, module._buffers[f"{name}_mask"]
            _floating(i, kind, name, module._parameters[f"{name}_orig"])
            if not ((mask == 0) | (mask == 1)).all():
                raise ValueError(
                    f"{name}_mask of {kind} must hold only 0 and 1, got other values; make these weights "
                    "permanent with torch.nn.utils.prune.remove first."
                )
            masks[module, name] = mask == 1
        if not masks:
            raise ValueError(
                "targets_or_model must hold a parameter pruned by torch.nn.utils.prune, got none; use "
                "MagnitudePruner(targets) for plain parameters."
            )
        _grouped(pairs)  # tied weights with masks that differ are refused before anything is changed
        for (module, name), mask in masks.items():
            torch_prune.remove(module, name)
            module.register_buffer(f"{name}_mask", mask)
        return cls(pairs, optimizer=optimizer)


# --- schedules and the lottery ------------------------------------------------------------------------------

def linear_schedule(target: float, epochs: int, *, variant: str = "paper", hold: int = 0) -> list[float]:
    """Sparsity at the start of each epoch k = 1 ... epochs, rising to exactly `target` in the last one.

    variant "paper": (k - 1) target / (epochs - 1); with one epoch, target at once.
    variant "language_model" (the authors' code for it): 0 in epoch 1, then k target / epochs.
    hold: further epochs at target (the adding problem's code has 10).

    Raises ValueError / TypeError for target outside [0, 1], epochs < 1, hold < 0 or an unknown variant.
    """
    target = _fraction("target", target)
    _checks.positive_int("epochs", epochs)
    _checks.positive_int("hold", hold, minimum=0)
    _checks.one_of("variant", variant, ("paper", "language_model"))
    if epochs == 1:
        shares = [1.0]
    elif variant == "paper":
        shares = [(k - 1) / (epochs - 1) for k in range(1, epochs + 1)]
    else:
        shares = [0.0] + [k / epochs for k in range(2, epochs + 1)]
    # The last share is exactly 1, so the schedule ends at target and not an ulp beside it.
    return [target * share for share in shares] + [target] * hold


@torch.no_grad()
def reinitialize_(model: nn.Module, pruner: MagnitudePruner,
                  init_fn: Callable[[nn.Module], Any] | None = None,
                  generator: torch.Generator | None = None) -> None:
    """The lottery: fresh weights, same masks. Make a new optimizer afterwards, and a new pruner on it.

    Args:
        init_fn: called with the model; None calls every submodule's `reset_parameters()`, children first, so
            that a parent may refine them. Frozen parameters of modules without one stay as they are.
        generator: makes torch's draws reproducible and leaves the global generators (CPU, CUDA) as they were.

    Raises ValueError where the pruner's modules are not in the model, or where a trainable parameter was not
    set afresh; then the model is as it was.
    """
    _mask_keys(model, pruner)
    with _restored_on_error(model), _drawing_from(generator, model):
        if init_fn is None:
            _reset(model)
        else:
            init_fn(model)
        pruner.apply()


def _reset(model: nn.Module) -> None:
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for _, parameter in trainable:
        parameter.fill_(math.nan)  # what nobody resets is still NaN below
    for module in reversed(list(model.modules())):
        # nn.MultiheadAttention and nn.Transformer have theirs under the underscored name.
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            reset()
    stale = [name for name, p in trainable if p.isnan().any()]
    if stale:
        raise ValueError(
            f"model must set every trainable parameter in some reset_parameters(), got none that sets "
            f"{', '.join(stale)}; pass init_fn, or freeze what should stay."
        )


@torch.no_grad()
def rewind_(model: nn.Module, pruner: MagnitudePruner, state_dict: Mapping[str, Any]) -> None:
    """Earlier weights, same masks. Masks in `state_dict` are ignored; all else must fit the model exactly.

    Raises ValueError where it does not, where `state_dict` holds the model's own live tensors (a state_dict()
    that was not copied), or where the pruner's modules are not in the model; then the model is as it was.
    """
    masks = _mask_keys(model, pruner)
    for key, parameter in model.named_parameters():
        earlier = state_dict.get(key)
        if isinstance(earlier, Tensor) and earlier.numel() and earlier.data_ptr() == parameter.data_ptr():
            raise ValueError(
                f"state_dict must hold earlier weights, got the model's own live tensor at {key!r}; save "
                "copy.deepcopy(model.state_dict()) before training."
            )
    now = model.state_dict()
    merged = {key: value for key, value in state_dict.items() if key not in masks}
    merged.update((key, now[key]) for key in masks if key in now)
    with _restored_on_error(model):
        try:
            model.load_state_dict(merged)
        except RuntimeError as error:
            message = f"state_dict must fit the model, pass one saved from this model: {error}"
            raise ValueError(message) from error
        pruner.apply()


def _mask_keys(model: nn.Module, pruner: MagnitudePruner) -> set[str]:
    """The pruner's masks as the model's state_dict names them (several names where a module is shared)."""
    prefixes: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefixes.setdefault(id(module), []).append(f"{path}." if path else "")
    keys = set()
    for weight in pruner._weights:
        for module, name in weight.owners:
            if id(module) not in prefixes:
                raise ValueError(
                    f"pruner must prune modules of the model, got {weight.key} of a {type(module).__name__} "
                    "that is not in it; after a deepcopy make a new MagnitudePruner on the copy."
                )
            keys.update(f"{prefix}{name}_mask" for prefix in prefixes[id(module)])
    return keys


@contextlib.contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Puts parameters and buffers back as they were when the block raises."""
    before = [(tensor, tensor.clone()) for tensor in (*model.parameters(), *model.buffers())]
    try:
        yield
    except BaseException:
        for tensor, old in before:
            tensor.copy_(old)
        raise


@contextlib.contextmanager
def _drawing_from(generator: torch.Generator | None, model: nn.Module) -> Iterator[None]:
    """Global draws follow from `generator` inside the block and go on after it as if none had been made."""
    if generator is None:
        yield
        return
    if not isinstance(generator, torch.Generator):
        kind = type(generator).__name__
        raise TypeError(
            f"generator must be a torch.Generator, got a {kind}; pass torch.Generator().manual_seed(0)."
        )
    devices = {p.device for p in model.parameters()}
    others = {d.type for d in devices} - {"cpu", "cuda"}
    if others:
        raise ValueError(
            "generator must be None for a model outside CPU and CUDA, got one for "
            f"{', '.join(sorted(others))}; initialize the model on the CPU."
        )
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    gpus = sorted(d.index for d in devices if d.type == "cuda")
    with torch.random.fork_rng(devices=gpus, device_type="cuda"):
        # Not torch.manual_seed: it would seed GPUs that are not put back.
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield
