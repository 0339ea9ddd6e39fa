"""The part of a recurrent module that has to do with the order of its neurons, and with masks laid out in blocks.

An order, the buffer `<weight>_order`, says in which order rows and columns of a mask are laid out. A layout is
remembered with copies of the mask and the order that it was made of, and compared with them at each use.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..masks import get_mask
from ..ops.block_layout import BlockLayout, lay_out_blocks
from ..reference import compute_dtype
from . import checks, crossovers
from .layer import walks_blocks
from .masked_module import Counted, MaskedModule, capturing


def order_of(module: nn.Module, name: str) -> Tensor | None:
    """The order of the neurons set for the hidden weight `name`, int64 (hidden_size,), or None."""
    return module._buffers.get(_order_name(name))


def share_order(module: nn.Module, name: str, order: Tensor) -> None:
    """Registers `order` itself, not a copy, as the order for the hidden weight `name`."""
    module.register_buffer(_order_name(name), order)


def _order_name(name: str) -> str:
    return f"{name}_order"


class Laid(NamedTuple):
    """A layout, and copies of what it was made of."""

    mask: Tensor
    order: Tensor | None
    layout: BlockLayout

    def is_of(self, mask: Tensor, order: Tensor | None) -> bool:
        """Whether mask and order hold what they held then. Waits for a GPU."""
        return _equal(self.mask, mask) and (
            order is self.order if order is None or self.order is None else _equal(self.order, order))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)


class OrderedModule(MaskedModule):
    """A masked module that also has orders of its neurons, one a hidden weight, and the layouts of the masks.

    The subclass has nn.RNN's attributes.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._laid: dict[str, Laid] = {}

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
        return [names[1] for names in self._all_weights]

    def _layout(self, name: str, weight: Tensor, batch: int, counted: Counted | None) -> BlockLayout | None:
        """The layout by which the op multiplies the masked weight `name`, or None where it takes the whole matrix.

        None while a CUDA graph is recorded too, since the mask may change between its replays.
        """
        mask = get_mask(self, name)
        if (mask is None or counted is None or capturing(mask)
                or not walks_blocks(weight.device.type, compute_dtype(weight))):
            return None
        case = self.hidden_size, batch, self._share(name, counted)
        if crossovers.hidden_form(*case) == "masked":
            return None
        layout = self._laid_out(name, mask)
        if crossovers.hidden_form(*case, len(layout.kept), len(layout.strays)) == "masked":
            return None
        return layout

    def _laid_out(self, name: str, mask: Tensor) -> BlockLayout:
        """The layout of a mask in the order set for its weight. Waits for a GPU."""
        order, known = order_of(self, name), self._laid.get(name)
        if known is None or not known.is_of(mask, order):
            with torch.inference_mode(False), torch.no_grad():
                layout = lay_out_blocks(mask if mask.dtype == torch.bool else mask != 0, order, order,
                                        side=crossovers.SIDE, threshold=crossovers.THRESHOLD)
                known = Laid(mask.clone(), None if order is None else order.clone(), layout)
            if mask.is_cuda:  # it may be read on any stream from now on
                torch.cuda.current_stream(mask.device).synchronize()
            self._laid[name] = known
        return known.layout

    def _layout_in_words(self, name: str, weight: Tensor, batch: int, counted: Counted) -> str:
        """Describes for explain() how a masked weight is read on the sparse path."""
        if get_mask(self, name) is None or not walks_blocks(weight.device.type, compute_dtype(weight)):
            return ""
        layout = self._layout(name, weight, batch, counted)
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

    def __getstate__(self):
        return super().__getstate__() | {"_laid": {}}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._laid = {}
