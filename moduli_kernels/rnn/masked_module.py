"""Masks of a recurrent module: bool buffers `<weight>_mask` (True = kept), the one place where they live, whoever made
them: set_mask, MagnitudePruner or a state_dict. What torch.nn.utils.prune made (0/1 floats) is read as well. And the
orders of the neurons, `<weight>_order`, in which a mask is laid out in blocks.

What a mask holds is counted once and remembered by tensor and version, never at each call: on a GPU every count waits.
"""
from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import live_mask, zero_masked_
from ..ops.block_layout import BlockLayout, lay_out_blocks
from ..reference import compute_dtype
from . import checks, crossovers
from .layer import walks_blocks


def mask_of(module: nn.Module, name: str, weight: Tensor) -> Tensor | None:
    """The bool mask of a weight, or None."""
    mask = module._buffers.get(f"{name}_mask")
    if mask is None:
        return None
    checks.found_mask(module, name, mask, weight)
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
        self._in_graphs: list[BlockLayout] = []  # CUDA graphs read them for as long as they live

    def density(self, name: str, mask: Tensor | None) -> float | None:
        """The kept share, 1 for an empty mask; None without a mask. Waits for a GPU once per version of the mask."""
        if mask is None:
            return None
        if capturing(mask):  # a CUDA graph is being recorded, which may not wait: what is known
            return self._known.get(("density", name), (None, None, 1.0))[2]
        return self._remembered(
            ("density", name), (mask,), lambda: int(torch.count_nonzero(mask)) / max(1, mask.numel()))

    def zero_where_masked(self, name: str, weight: Tensor, mask: Tensor) -> bool:
        """Whether the weight is 0 wherever it is masked. Does not see writes through weight.data."""
        if weight.is_inference() or mask.is_inference() or capturing(mask):
            return False
        return self._remembered(("zero", name), (weight, mask), lambda: not bool(weight.masked_fill(mask, 0).any()))

    def layout(self, name: str, mask: Tensor, order: Tensor | None) -> BlockLayout | None:
        """Of a mask whose rows and columns are in this order. Waits for a GPU once per version of both. None where a
        CUDA graph is recorded and it is not known yet, and for a mask of inference mode: it would go stale unseen."""
        if mask.is_inference():
            return None
        key, tensors = ("layout", name), (mask,) if order is None else (mask, order)
        if capturing(mask):
            layout = self._known[key][2] if self._knows(key, tensors) else None
            if layout is not None and not any(layout is each for each in self._in_graphs):
                self._in_graphs.append(layout)
            return layout
        return self._remembered(key, tensors, lambda: _laid_out(mask, order))

    def _remembered(self, key: tuple[str, str], tensors: tuple[Tensor, ...], count: Any) -> Any:
        if self._knows(key, tensors):
            return self._known[key][2]
        with torch.no_grad():
            value = count()
        self._known[key] = (tuple(weakref.ref(t) for t in tensors), _state(tensors), value)
        return value

    def _knows(self, key: tuple[str, str], tensors: tuple[Tensor, ...]) -> bool:
        references, then, _ = self._known.get(key, ((), None, None))
        return then == _state(tensors) and all(ref() is t for ref, t in zip(references, tensors))


def _state(tensors: tuple[Tensor, ...]) -> list[tuple[int, int]]:
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def _laid_out(mask: Tensor, order: Tensor | None) -> BlockLayout:
    layout = lay_out_blocks(mask if mask.dtype == torch.bool else mask != 0, order, order, side=crossovers.SIDE,
                          threshold=crossovers.THRESHOLD)
    if mask.is_cuda:  # it may be read on any stream from now on
        torch.cuda.current_stream(mask.device).synchronize()
    return layout


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
            name: a weight's or a bias's name.
            mask: bool, of its shape, True = kept; copied to the weight's device. None takes the mask away; masked
                weights stay 0 until they are trained.

        The mask is the bool buffer `<name>_mask`, as MagnitudePruner keeps it; one that is there is written in place.
        An optimizer that has gathered momentum before goes on moving masked weights, without effect on outputs and
        gradients; MagnitudePruner with `optimizer=` holds them at 0.

        Raises:
            ValueError: name is no weight of this module or pruned by torch.nn.utils.prune; mask has another shape.
            TypeError: mask is no bool tensor.
        """
        checks.maskable(self, name, self._weight_names())
        weight, buffer = getattr(self, name), f"{name}_mask"
        if mask is None:
            if buffer in self._buffers:
                delattr(self, buffer)
            return
        checks.new_mask(name, mask, weight)
        if live_mask(self, name) is None:
            self.register_buffer(buffer, mask.detach().to(weight.device, copy=True))
        else:
            self._buffers[buffer].copy_(mask)
        zero_masked_(weight, self._buffers[buffer])

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        error_msgs = rest[-1]
        for name in self._weight_names():
            key, weight = f"{prefix}{name}_mask", self._parameters.get(name)
            if key not in state_dict or weight is None or self._buffers.get(f"{name}_mask") is not None:
                continue
            problem = checks.saved_mask_problem(key, state_dict[key], weight)
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


class OrderedModule(MaskedModule):
    """Also orders of the neurons, by hidden weight, and the layouts of their masks; for modules with a hidden_size."""

    def set_order(self, name: str, order: Tensor | None) -> None:
        """Sets the order of the neurons in which the hidden weight `name` ("weight_hh_l0", ...) is laid out in blocks.

        Args:
            name: a hidden weight's name.
            order: int64, (hidden_size,), a permutation such as `mk.manifold_order` gives; copied to the weight's
                device. None takes it away.

        It changes speed, never results: on CUDA a large masked weight is multiplied in blocks of neighbours in this
        order, which are few where the mask is local. The order is the buffer `<name>_order`: it moves with the module,
        and is saved and loaded as a mask is.

        Raises:
            ValueError: name is no hidden weight of this module; order is no permutation of the neurons.
            TypeError: order is no int64 tensor.
        """
        checks.hidden_weight(self, name, self._hidden_names())
        buffer = f"{name}_order"
        if order is None:
            if buffer in self._buffers:
                delattr(self, buffer)
            return
        checks.new_order(order, self.hidden_size)
        if buffer in self._buffers:
            self._buffers[buffer].copy_(order)
        else:
            self.register_buffer(buffer, order.detach().to(getattr(self, name).device, copy=True))

    def _hidden_names(self) -> list[str]:
        return [name for name in self._weight_names() if name.startswith("weight_hh")]

    def _layout(self, name: str, batch: int) -> BlockLayout | None:
        """By which the masked weight `name` is walked; None where it is taken whole, and in a compiled graph, in which
        a mask may change."""
        mask, weight = self._buffers.get(f"{name}_mask"), getattr(self, name)
        if mask is None or torch.compiler.is_compiling() or not walks_blocks(weight.device.type, compute_dtype(weight)):
            return None
        case = self.hidden_size, batch, self._facts.density(name, mask)
        if crossovers.hidden_form(*case) == "masked":
            return None
        layout = self._facts.layout(name, mask, self._buffers.get(f"{name}_order"))
        if layout is None or crossovers.hidden_form(*case, len(layout.kept), len(layout.strays)) == "masked":
            return None
        return layout

    def _layout_in_words(self, name: str, batch: int) -> str:
        """Of a masked weight on the sparse path, for explain()."""
        mask, weight = self._buffers.get(f"{name}_mask"), getattr(self, name)
        if mask is None or not walks_blocks(weight.device.type, compute_dtype(weight)):
            return ""
        layout = self._layout(name, batch)
        if layout is None:
            return ", read whole"
        order = "set by set_order" if f"{name}_order" in self._buffers else "of the neurons"
        return (f", in {len(layout.kept)} blocks of {layout.side} x {layout.side} and {len(layout.strays)} stray "
                f"weights, in the order {order}")

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        error_msgs = rest[-1]
        for name in self._hidden_names():
            key, buffer = f"{prefix}{name}_order", f"{name}_order"
            if key not in state_dict or buffer in self._buffers:
                continue
            problem = checks.saved_order_problem(key, state_dict[key], self.hidden_size)
            if problem is None:
                self.register_buffer(buffer, torch.arange(self.hidden_size, device=getattr(self, name).device))
            else:
                error_msgs.append(problem)
        super()._load_from_state_dict(state_dict, prefix, *rest)
