"""The contestants of an RNN case on a GPU.

A step is forward and backward of one sequence, with all gradients. torch.nn.RNN holds the same masked weights;
"vendor's products" is the same net written out as a product and a nonlinearity for each step. All of it is float32
with tf32 products, which is what torch.nn.RNN does by default.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moduli_kernels.ops import blocked_rnn
from moduli_kernels.ops.block_layout import lay_out_blocks

from ..harness import stopwatch
from .cases_gpu import OURS, OURS_GRAPH, PRODUCTS, VENDOR, RnnGpuCase

ops = torch.ops.moduli_kernels
AGREE = 2e-2  # largest difference of gradients, as a share of the norm: both sides round factors to 11 bits


class RnnGpuContest:
    """Makes the contestants of a case: calls that only queue work."""

    def __init__(self, case: RnnGpuCase) -> None:
        self.case = case
        torch.manual_seed(0)
        self.vendor = nn.RNN(case.inputs, case.n, case.layers, nonlinearity=case.nonlinearity).to(case.device)
        self.masks = self._masks()
        with torch.no_grad():
            for name, mask in self.masks.items():
                getattr(self.vendor, name).masked_fill_(~mask, 0)
        if case.device == "cuda":
            self.vendor.flatten_parameters()
        self.weights = {name: p.detach().clone().requires_grad_() for name, p in self.vendor.named_parameters()}
        self.x = torch.randn(case.steps, case.batch, case.inputs, device=case.device, requires_grad=True)
        self.grad = torch.randn(case.steps, case.batch, case.n, device=case.device)
        self.layouts: list[list[Tensor]] = []
        if case.kept:
            self.layouts = [blocked_rnn.flat(lay_out_blocks(
                self.masks[f"weight_hh_l{k}"], self.order, self.order, side=case.side or 32,
                threshold=None if case.side else 32 * 32 + 1)) for k in range(case.layers)]

    def _masks(self) -> dict[str, Tensor]:
        """Draws the masks by name, True = kept, and the order in which kept entries fill blocks."""
        case, found = self.case, {}
        generator = torch.Generator().manual_seed(1)
        self.order = torch.randperm(case.n, generator=generator).to(case.device)
        if case.density is None:
            return found
        for name, p in self.vendor.named_parameters():
            if name.startswith("weight_hh") or case.mask_inputs and name.startswith("weight_ih"):
                mask = torch.rand(p.shape, generator=generator) < case.density
                if case.side is not None:
                    blocks = torch.rand(*(-(-n // case.side) for n in p.shape), generator=generator) < case.density
                    mask = blocks.repeat_interleave(case.side, 0).repeat_interleave(case.side, 1)
                    back = self.order.argsort().cpu()
                    mask = mask[:p.shape[0], :p.shape[1]][back][:, back]
                found[name] = mask.to(case.device)
        return found

    def _layer(self, k: int, x: Tensor) -> Tensor:
        """Runs our layer k over a sequence."""
        case, w = self.case, self.weights
        weights = (w[f"weight_ih_l{k}"], w[f"weight_hh_l{k}"], w[f"bias_ih_l{k}"], w[f"bias_hh_l{k}"])
        masks = self.masks.get(f"weight_ih_l{k}"), self.masks.get(f"weight_hh_l{k}")
        h, step = x.new_zeros(case.batch, case.n), (case.nonlinearity, 1.0, False)
        if case.kept:
            return ops.blocked_rnn(x, h, *weights, *masks, self.layouts[k], case.side or 32, None, *step, True)[0]
        return ops.masked_rnn(x, h, *weights, *masks, *[None] * 7, *step, True)[0]

    def _products(self, k: int, x: Tensor) -> Tensor:
        """Runs layer k written out: a product and a nonlinearity for each step."""
        w = self.weights
        inputs = nn.functional.linear(x, w[f"weight_ih_l{k}"], w[f"bias_ih_l{k}"] + w[f"bias_hh_l{k}"])
        w_hh, h, states = w[f"weight_hh_l{k}"].t(), None, []
        for a in inputs.unbind(0):
            a = a if h is None else torch.addmm(a, h, w_hh)
            h = a.tanh() if self.case.nonlinearity == "tanh" else a.relu()
            states.append(h)
        return torch.stack(states)

    def _stacked(self, layer: Callable[[int, Tensor], Tensor]) -> Callable[[], Tensor]:
        def net() -> Tensor:
            y = self.x
            for k in range(self.case.layers):
                y = layer(k, y)
            return y
        return net

    def _step(self, net: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], None]:
        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            net().backward(self.grad)
        return run

    def calls(self) -> dict[str, Callable[[], None]]:
        """Returns name -> call, ours first. Raises AssertionError where ours and torch.nn.RNN differ."""
        own, theirs = [self.x, *self.weights.values()], [self.x, *self.vendor.parameters()]
        ours = self._step(self._stacked(self._layer), own)
        vendor = self._step(lambda: self.vendor(self.x)[0], theirs)
        vendor()
        want = {"input": self.x.grad, **{name: p.grad for name, p in self.vendor.named_parameters()}}
        ours()
        for name, grad in {"input": self.x.grad, **{name: w.grad for name, w in self.weights.items()}}.items():
            wanted = torch.where(self.masks[name], want[name], 0) if name in self.masks else want[name]
            error, norm = float((grad - wanted).norm()), float(wanted.norm())
            assert error <= AGREE * norm, f"{self.case.name}: gradient of {name} is off by {error:.1e} of {norm:.1e}"
        calls = {OURS: ours, VENDOR: vendor, PRODUCTS: self._step(self._stacked(self._products), own)}
        return calls | ({OURS_GRAPH: stopwatch.captured(ours)} if self.case.device == "cuda" else {})


@contextmanager
def tf32() -> Iterator[None]:
    """Lets the vendor's products use tf32 as torch.nn.RNN does, so that all contestants round alike."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
