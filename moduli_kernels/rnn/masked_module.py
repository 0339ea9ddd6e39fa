"""The part of a recurrent module that has to do with masks, and with the order of its neurons.

Masks are bool buffers on the module (moduli_kernels/masks.py), True where a weight is kept. set_mask, MagnitudePruner
or a state_dict makes them. Masks of floats 0 and 1 by torch.nn.utils.prune are read as well. An order of the neurons,
the buffer `<weight>_order`, says in which order rows and columns of a mask are laid out in blocks.

What a mask holds is counted once and remembered by tensor and version, since on a GPU every count waits for the device.
"""
from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import buffer_name, get_mask, live_mask, remove_mask, set_mask, zero_masked_
from ..ops.block_layout import BlockLayout, lay_out_blocks
from ..reference import compute_dtype
from . import checks, crossovers
from .layer import walks_blocks


def mask_of(module: nn.Module, name: str, weight: Tensor) -> Tensor | None:
    """The mask of the parameter `name` as a bool tensor, or None. Raises ValueError if it does not fit `weight`."""
    mask = get_mask(module, name)
    if mask is None:
        return None
    checks.found_mask(module, name, mask, weight)
    return mask if mask.dtype == torch.bool else mask != 0


def order_of(module: nn.Module, name: str) -> Tensor | None:
    """The order of the neurons set for the hidden weight `name`, int64 (hidden_size,), or None."""
    return module._buffers.get(_order_name(name))


def _order_name(name: str) -> str:
    return f"{name}_order"


class Facts:
    """Remembers what was counted of a module's masks and weights, by name, until the tensors change.

    Tensors of inference mode have no version. Their density may be stale, which costs time and never changes a result.
    """

    def __init__(self):
        self._known: dict[tuple[str, str], tuple[tuple, Any]] = {}
        self._in_graphs: list[BlockLayout] = []  # layouts that CUDA graphs read for as long as they live

    def density(self, name: str, mask: Tensor | None) -> float | None:
        """The kept share of a mask: 1 for an empty one, None without one. Waits for a GPU once per version."""
        if mask is None:
            return None
        if capturing(mask):  # a CUDA graph is being recorded, which may not wait, so only what is known counts
            return self._known.get(("density", name), (None, None, 1.0))[2]
        return self._remembered(
            ("density", name), (mask,), lambda: int(torch.count_nonzero(mask)) / max(1, mask.numel()))

    def zero_where_masked(self, name: str, weight: Tensor, mask: Tensor) -> bool:
        """Whether the weight is 0 wherever it is masked. Does not see writes through weight.data."""
        if weight.is_inference() or mask.is_inference() or capturing(mask):
            return False
        return self._remembered(("zero", name), (weight, mask), lambda: not bool(weight.masked_fill(mask, 0).any()))

    def layout(self, name: str, mask: Tensor, order: Tensor | None) -> BlockLayout | None:
        """The layout of a mask whose rows and columns are brought into `order`. Waits for a GPU once a version of both.

        None where a CUDA graph is recorded and the layout is not known yet, and for a mask of inference mode, whose
        layout would go stale unseen.
        """
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
    """Whether a CUDA graph is being recorded on the tensor's device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class MaskedModule(nn.Module):
    """Base of the recurrent modules with masks: sets and loads masks, and remembers what was counted of them.

    The subclass names its weights and biases, in the order of nn.RNN, in `_weight_names()`.
    """

    applies_masks = True  # so that no hook looks at the weights before each forward pass (masks/holding.py)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._facts = Facts()

    def set_mask(self, name: str, mask: Tensor | None) -> None:
        """Sets the mask of the weight `name` ("weight_hh_l0", "weight_ih_l1_reverse", ...), and masked weights to 0.

        The mask is the bool buffer `<name>_mask`, as MagnitudePruner keeps it. One that is there already is written in
        place. An optimizer that has gathered momentum before goes on moving masked weights, without effect on outputs
        and gradients; MagnitudePruner with `optimizer=` holds them at 0.

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
        own = live_mask(self, name)
        if own is None:
            set_mask(self, name, mask.detach().to(weight.device, copy=True))
        else:
            own.copy_(mask)
        zero_masked_(weight, get_mask(self, name))

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        error_msgs = rest[-1]
        for name in self._weight_names():
            key, weight = prefix + buffer_name(name), self._parameters.get(name)
            if key not in state_dict or weight is None or get_mask(self, name) is not None:
                continue
            problem = checks.saved_mask_problem(key, state_dict[key], weight)
            if problem is None:  # a buffer to load into
                set_mask(self, name, torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
            else:
                error_msgs.append(problem)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getstate__(self):
        # The facts hold weak references, which neither pickle nor belong to a copy.
        state = dict(super().__getstate__() if hasattr(super(), "__getstate__") else self.__dict__)
        del state["_facts"]
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        self._facts = Facts()


class OrderedModule(MaskedModule):
    """A masked module that also has orders of its neurons, one a hidden weight, and the layouts of the masks.

    The subclass has an attribute `hidden_size`.
    """

    def set_order(self, name: str, order: Tensor | None) -> None:
        """Sets the order of the neurons in which the hidden weight `name` ("weight_hh_l0", ...) is laid out in blocks.

        An order changes speed, never results: on CUDA a large masked weight is multiplied in blocks of neurons that are
        neighbours in this order, which are few where the mask is local. The order is the buffer `<name>_order`: it
        moves with the module, and is saved and loaded as a mask is.

        Args:
            name: the name of a hidden weight.
            order: int64, (hidden_size,), a permutation such as `mk.manifold_order` gives; it is copied to the weight's
                device. None takes the order away.

        Raises:
            ValueError: name is no hidden weight of this module, or order is no permutation of the neurons.
            TypeError: order is no int64 tensor.
        """
        checks.hidden_weight(self, name, self._hidden_names())
        buffer = _order_name(name)
        if order is None:
            self._buffers.pop(buffer, None)
            return
        checks.new_order(order, self.hidden_size)
        if buffer in self._buffers:
            self._buffers[buffer].copy_(order)
        else:
            self.register_buffer(buffer, order.detach().to(getattr(self, name).device, copy=True))

    def _hidden_names(self) -> list[str]:
        return [name for name in self._weight_names() if name.startswith("weight_hh")]

    def _layout(self, name: str, batch: int) -> BlockLayout | None:
        """The layout by which the op multiplies the masked weight `name`, or None where it takes the whole matrix.

        None in a compiled graph too, where a mask may change.
        """
        mask, weight = get_mask(self, name), getattr(self, name)
        if mask is None or torch.compiler.is_compiling() or not walks_blocks(weight.device.type, compute_dtype(weight)):
            return None
        case = self.hidden_size, batch, self._facts.density(name, mask)
        if crossovers.hidden_form(*case) == "masked":
            return None
        layout = self._facts.layout(name, mask, order_of(self, name))
        if layout is None or crossovers.hidden_form(*case, len(layout.kept), len(layout.strays)) == "masked":
            return None
        return layout

    def _layout_in_words(self, name: str, batch: int) -> str:
        """Describes for explain() how a masked weight is read on the sparse path."""
        mask, weight = get_mask(self, name), getattr(self, name)
        if mask is None or not walks_blocks(weight.device.type, compute_dtype(weight)):
            return ""
        layout = self._layout(name, batch)
        if layout is None:
            return ", as one matrix with its mask"
        order = "of the neurons" if order_of(self, name) is None else "set by set_order"
        return (f", in {len(layout.kept)} blocks of {layout.side} x {layout.side} and {len(layout.strays)} stray "
                f"weights, in the order {order}")

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        error_msgs = rest[-1]
        for name in self._hidden_names():
            key, buffer = f"{prefix}{_order_name(name)}", _order_name(name)
            if key not in state_dict or buffer in self._buffers:
                continue
            problem = checks.saved_order_problem(key, state_dict[key], self.hidden_size)
            if problem is None:  # a buffer to load into
                self.register_buffer(buffer, torch.arange(self.hidden_size, device=getattr(self, name).device))
            else:
                error_msgs.append(problem)
        super()._load_from_state_dict(state_dict, prefix, *rest)
