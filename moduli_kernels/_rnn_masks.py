"""Masks of a recurrent module: bool buffers `<weight>_mask` (True = kept), the one place where they live, whoever made
them: set_mask, MagnitudePruner or a state_dict. What torch.nn.utils.prune made (0/1 floats) is read as well.

What a mask holds is counted once and remembered by tensor and version, never at each call: on a GPU every count waits.
"""
from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks_rnn, _mask_hooks


def mask_of(module: nn.Module, name: str, weight: Tensor) -> Tensor | None:
    """The bool mask of a weight, or None."""
    mask = module._buffers.get(f"{name}_mask")
    if mask is None:
        return None
    _checks_rnn.found_mask(module, name, mask, weight)
    return mask if mask.dtype == torch.bool else mask != 0


def kept(weight: Tensor, mask: Tensor | None) -> Tensor:
    """The weight with 0 where it is masked, whatever stands there; the gradient is 0 there, too."""
    return weight if mask is None else torch.where(mask, weight, 0)


class Facts:
    """What was counted of a module's masks and weights, by name, until the tensors change.

    Tensors of inference mode count no versions: of them a density may be stale, which costs time only.
    """

    def __init__(self):
        self._known: dict[tuple[str, str], tuple[tuple, Any]] = {}

    def density(self, name: str, mask: Tensor | None) -> float | None:
        """The kept share, 1 for an empty mask; None without a mask. Waits for a GPU once per version of the mask."""
        if mask is None:
            return None
        if capturing(mask):  # a CUDA graph is being recorded, which may not wait: what is known
            return self._known.get(("density", name), (None, 1.0))[1]
        return self._remembered(
            ("density", name), (mask,), lambda: int(torch.count_nonzero(mask)) / max(1, mask.numel()))

    def zero_where_masked(self, name: str, weight: Tensor, mask: Tensor) -> bool:
        """Whether the weight is 0 wherever it is masked. Does not see writes through weight.data."""
        if weight.is_inference() or mask.is_inference() or capturing(mask):
            return False
        return self._remembered(("zero", name), (weight, mask), lambda: not bool(weight.masked_fill(mask, 0).any()))

    def _remembered(self, key: tuple[str, str], tensors: tuple[Tensor, ...], count: Any) -> Any:
        state = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        references, then, value = self._known.get(key, ((), None, None))
        if then != state or any(ref() is not t for ref, t in zip(references, tensors)):
            with torch.no_grad():
                value = count()
            self._known[key] = (tuple(weakref.ref(t) for t in tensors), state, value)
        return value


def capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class MaskedModule(nn.Module):
    """The masks' part of a recurrent module: setting, loading, and what is known of them. The module's own class says
    which weights and biases there are, in nn.RNN's order: `_weight_names()`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._facts = Facts()

    def set_mask(self, name: str, mask: Tensor | None) -> None:
        """Sets the mask of the weight `name` ("weight_hh_l0", "weight_ih_l1_reverse", ...), and masked weights to 0.

        Args:
            name: a weight's or a bias's name. mask: bool, of its shape, True = kept; copied to the weight's device.
                None takes the mask away; masked weights stay 0 until they are trained.

        The mask is the bool buffer `<name>_mask`, as MagnitudePruner keeps it; one that is there is written in place.
        An optimizer that has gathered momentum before goes on moving masked weights, without effect on outputs and
        gradients; MagnitudePruner with `optimizer=` holds them at 0.

        Raises:
            ValueError, TypeError: name is no weight of this module or pruned by torch.nn.utils.prune; mask is no bool
            tensor of the weight's shape.
        """
        _checks_rnn.maskable(self, name, self._weight_names())
        weight, buffer = getattr(self, name), f"{name}_mask"
        if mask is None:
            if buffer in self._buffers:
                delattr(self, buffer)
            return
        _checks_rnn.new_mask(name, mask, weight)
        if _mask_hooks.live_mask(self, name) is None:
            self.register_buffer(buffer, mask.detach().to(weight.device, copy=True))
        else:
            self._buffers[buffer].copy_(mask)
        _mask_hooks.zero(weight, self._buffers[buffer])

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        error_msgs = rest[-1]
        for name in self._weight_names():
            key, weight = f"{prefix}{name}_mask", self._parameters.get(name)
            if key not in state_dict or weight is None or self._buffers.get(f"{name}_mask") is not None:
                continue
            problem = _checks_rnn.saved_mask_problem(key, state_dict[key], weight)
            if problem is None:
                self.register_buffer(f"{name}_mask", torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
            else:
                error_msgs.append(problem)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getstate__(self):
        # weak references neither pickle nor belong to a copy
        state = dict(super().__getstate__() if hasattr(super(), "__getstate__") else self.__dict__)
        del state["_facts"]
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        self._facts = Facts()
