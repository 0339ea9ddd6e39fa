"""The part of a recurrent module that has to do with masks.

Masks are bool buffers on the module (moduli_kernels/masks), True where a weight is kept. set_mask, MagnitudePruner or a
state_dict makes them. Masks of floats 0 and 1 by torch.nn.utils.prune are read as well.

Nothing is remembered of what a mask or a weight holds, where a result depends on it: a write through `.data` changes a
tensor without a trace.
"""
from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from ..masks import (
    buffer_name,
    effective_weight,
    get_mask,
    hold,
    is_mask,
    is_zero_where_masked,
    mask_changed,
    names_pruned_by_torch,
    origin,
    remove_mask,
    set_mask,
    zero_masked_,
)
from ..reference.rnn import kept
from . import checks

LARGE = 2**17  # from so many entries on, eight bytes of a mask are added at a time
ADDED = 128  # so many of them: at most 255, so that no byte overflows

# The kept shares that one call has counted, by the names of the weights. None in its place: the call may not look at
# masks and weights, and takes what is right whatever they hold.
Counted = dict[str, float | None]


def mask_of(module: nn.Module, name: str, weight: Tensor) -> Tensor | None:
    """The mask of the parameter `name` as a bool tensor, or None. Raises ValueError if it does not fit `weight`."""
    mask = get_mask(module, name)
    if mask is None:
        return None
    checks.found_mask(module, name, mask, weight)
    return mask if mask.dtype == torch.bool else mask != 0


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being recorded on the tensor's device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def used_weight(module: nn.Module, name: str) -> Tensor:
    """The tensor that a forward pass uses under `name`, masks aside; the attribute itself where nothing is known of its
    origin."""
    return effective_weight(module, name) if origin(module, name) not in ("attribute", None) else getattr(module, name)


def needs_gradient(weight: Tensor) -> bool:
    return torch.is_grad_enabled() and weight.requires_grad


def kept_share(mask: Tensor) -> float:
    """The kept share of a mask, 1 for an empty one and one on meta. Waits for a GPU."""
    return _kept_entries(mask) / mask.numel() if mask.numel() and not mask.is_meta else 1.0


def _kept_entries(mask: Tensor) -> int:
    """torch.count_nonzero, for a large mask on the CPU in a fifth of its time: bytes are added eight at a time."""
    if mask.numel() < LARGE or mask.dtype != torch.bool or mask.device.type != "cpu" or mask.storage_offset() % 8:
        return int(torch.count_nonzero(mask))
    flat = mask.reshape(-1)
    whole = len(flat) // (8 * ADDED) * 8 * ADDED
    eight_sums = flat[:whole].view(torch.int64).view(-1, ADDED).sum(1)
    return int(eight_sums.view(torch.uint8).sum()) + int(torch.count_nonzero(flat[whole:]))


class MaskedModule(nn.Module):
    """Base of the recurrent modules with masks: sets, loads and reads them.

    The subclass names its weights and biases, in the order of nn.RNN, in `_weight_names()`.
    """

    applies_masks = True  # its forward pass reads no masked weight, whoever wrote it (moduli_kernels/masks)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._shares: dict[str, tuple[weakref.ref[Tensor], int, float]] = {}

    def set_mask(self, name: str, mask: Tensor | None) -> None:
        """Sets the mask of the weight `name` ("weight_hh_l0", "weight_ih_l1_reverse", ...), and masked weights to 0.

        The mask is the bool buffer `<name>_mask`, as MagnitudePruner keeps it. One that is there already is written in
        place. From now on masked weights are 0 in a state_dict and after the step of any optimizer. Of a weight that
        torch.nn.utils.parametrize or a hook computes, the mask is multiplied in at each call, and what it is computed
        from stays as it is.

        Args:
            name: the name of a weight or a bias.
            mask: bool, of the weight's shape, True = kept; it is copied to the weight's device. None takes the mask
                away; masked weights stay 0 until they are trained.

        Raises:
            ValueError: name is no weight of this module, or the weight is pruned by torch.nn.utils.prune; the mask has
                another shape.
            TypeError: mask is no bool tensor.
        """
        checks.maskable(self, name, self._weight_names())
        if mask is None:
            remove_mask(self, name)
            return
        weight = getattr(self, name)
        checks.new_mask(name, mask, weight)
        own = get_mask(self, name)
        if own is not None and is_mask(own, weight) and own.device == weight.device:
            own.copy_(mask)
            hold(self, name)
            mask_changed(self, name)
        else:
            set_mask(self, name, mask.detach().to(weight.device, copy=True))
        if self._parameters.get(name) is not None:  # a weight that is computed is masked in the forward pass alone
            zero_masked_(weight, get_mask(self, name))

    # -- what a call reads --

    def _masked_weight(self, name: str, weight: Tensor, counted: Counted | None) -> Tensor:
        """The weight with 0 where it is masked: the weight itself where no gradient needs the mask and it is 0 there,
        which is looked up on the CPU only, else a copy."""
        mask = mask_of(self, name, weight)
        if mask is None or (counted is not None and weight.device.type == "cpu" and not needs_gradient(weight)
                            and is_zero_where_masked(weight, mask)):
            return weight
        return kept(weight, mask)

    def _share(self, name: str, counted: Counted) -> float | None:
        """The kept share of the mask of `name`, None without one.

        On CUDA, where a count waits for the device, it is also remembered as long as the mask stays the same tensor of
        the same version: it decides about speed only, never about a result. While a CUDA graph is recorded nothing can
        be counted, and what is not remembered counts as 1.
        """
        if name not in counted:
            mask = get_mask(self, name)
            counted[name] = None if mask is None else self._share_on_cuda(name, mask) if mask.is_cuda else (
                kept_share(mask))
        return counted[name]

    def _share_on_cuda(self, name: str, mask: Tensor) -> float:
        version = 0 if mask.is_inference() else mask._version
        its, its_version, share = self._shares.get(name, (lambda: None, 0, 1.0))
        if its() is mask and its_version == version or capturing(mask):
            return share
        share = kept_share(mask)
        self._shares[name] = weakref.ref(mask), version, share
        return share

    # -- moving, saving and copying --

    def _apply(self, fn, recurse=True):
        """Moves masks as torch.nn.Module moves Parameters: they stay the same tensors, since another net may have them
        too (SparseRNN.from_rnn)."""
        masks = {buffer_name(name): get_mask(self, name) for name in self._weight_names()}
        super()._apply(fn, recurse)
        for key, mask in masks.items():
            moved = self._buffers.get(key)
            if mask is not None and moved is not mask and torch._has_compatible_shallow_copy_type(mask, moved):
                mask.data = moved
                self._buffers[key] = mask
        return self

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        error_msgs = rest[-1]
        for name in self._weight_names():
            key = prefix + buffer_name(name)
            if key not in state_dict or name in names_pruned_by_torch(self) or get_mask(self, name) is not None:
                continue
            weight = getattr(self, name)
            problem = checks.saved_mask_problem(key, state_dict[key], weight)
            if problem is None:  # a buffer to load into
                set_mask(self, name, torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
            else:
                error_msgs.append(problem)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getstate__(self):
        # Shares hold weak references, which neither pickle nor belong to a copy.
        state = dict(super().__getstate__() if hasattr(super(), "__getstate__") else self.__dict__)
        return state | {"_shares": {}}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._shares = {}
