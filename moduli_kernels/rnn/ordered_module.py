"""The part of a recurrent module that has to do with the order of its neurons, and with masks laid out in blocks.

An order, the buffer `<weight>_order`, says in which order rows and columns of a mask are laid out. A layout is
remembered with copies of the mask and the order that it was made of, and compared with them at each use.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from ..masks import get_mask
from ..ops import torch_ops
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


def orders_of_layer(module: nn.Module, name: str) -> tuple[Tensor | None, Tensor | None]:
    """The orders of the inputs (I,) and the neurons (H,) of the layer whose hidden weight is `name`; None where unset.

    module has nn.RNN's attributes. The inputs of a layer are the neurons of all directions of the layer before.
    """
    directions = 2 if module.bidirectional else 1
    layer = name.removeprefix("weight_hh_l").removesuffix("_reverse")
    ends = ["", "_reverse"][:directions]
    before = [order_of(module, f"weight_hh_l{int(layer) - 1}{end}") for end in ends] if int(layer) else []
    return _joined(before, module.hidden_size), order_of(module, name)


def _joined(orders: list[Tensor | None], hidden: int) -> Tensor | None:
    """The order of the neurons of several directions, those of one after those of the other."""
    if all(order is None for order in orders):
        return None
    if len(orders) == 1:
        return orders[0]
    own = next(torch.arange(hidden, device=order.device) for order in orders if order is not None)
    return torch.cat([(own if order is None else order) + k * hidden for k, order in enumerate(orders)])


def load_orders(module: nn.Module, names: list[str], state_dict: dict[str, Any], prefix: str,
                error_msgs: list[str]) -> None:
    """Makes buffers for the orders of the hidden weights `names` that a state_dict has and the module has not."""
    for name in names:
        key, buffer = f"{prefix}{_order_name(name)}", _order_name(name)
        if key not in state_dict or buffer in module._buffers:
            continue
        problem = checks.saved_order_problem(key, state_dict[key], module.hidden_size)
        if problem is None:
            device = next(iter((*module.parameters(recurse=False), *module.buffers(recurse=False)))).device
            module.register_buffer(buffer, torch.arange(module.hidden_size, device=device))
        else:
            error_msgs.append(problem)


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

        An order changes speed, and results by rounding alone: a masked weight is multiplied in blocks of neurons that
        are neighbours in this order, which are few where the mask is local. On the CPU the order counts for the rows
        of the layer's input weight too, and for the columns of the next layer's. The order is the buffer
        `<name>_order`: it moves with the module, and is saved and loaded as a mask is.

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

    def _layouts_in_words(self, names: list[str], weight: Tensor, batch: int, counted: Counted) -> str:
        """Describes for explain() how the masked weights of a layer, W_ih and W_hh, are read on the sparse path."""
        if backends.active(weight.device.type) != "cpp" or walks_blocks(weight.device.type, compute_dtype(weight)):
            return self._layout_in_words(names[1], weight, batch, counted)
        order_x, order_h = orders_of_layer(self, names[1])
        return "".join(self._blocks_in_words(name, order_h, columns, batch)
                       for name, columns in zip(names, (order_x, order_h)))

    def _blocks_in_words(self, name: str, rows: Tensor | None, columns: Tensor | None, batch: int) -> str:
        mask = get_mask(self, name)
        if mask is None or mask.is_meta:
            return ""
        mask = (mask if mask.dtype == torch.bool else mask != 0).contiguous()
        side, blocks, inside, strays = torch_ops.found_blocks(mask, rows, columns, batch).tolist()
        if not side:
            return f"; {name} has no blocks worth multiplying whole"
        order = "their own order" if rows is None and columns is None else "the order set by set_order"
        full = 100 * inside / (blocks * side**2)
        return (f"; {name} in {blocks} blocks of {side} x {side}, {full:.0f} % of them kept, and {strays} stray "
                f"weights, with neurons in {order}")

    def _layout_in_words(self, name: str, weight: Tensor, batch: int, counted: Counted) -> str:
        if get_mask(self, name) is None or not walks_blocks(weight.device.type, compute_dtype(weight)):
            return ""
        layout = self._layout(name, weight, batch, counted)
        if layout is None:
            return ", as one matrix with its mask"
        order = "of the neurons" if order_of(self, name) is None else "set by set_order"
        return (f", in {len(layout.kept)} blocks of {layout.side} x {layout.side} and {len(layout.strays)} stray "
                f"weights, in the order {order}")

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        load_orders(self, self._hidden_names(), state_dict, prefix, rest[-1])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getstate__(self):
        return super().__getstate__() | {"_laid": {}}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._laid = {}
