"""The RNN on a GPU: the cases, the contestants, and the figures they are to reach.

A step is forward and backward of one sequence, all gradients. torch.nn.RNN holds the same masked weights; "vendor's
products" is the same net written out: a product and a nonlinearity a step. All in float32 with tf32 products, which is
what torch.nn.RNN does by default.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moduli_kernels.ops import blocked_rnn as blocked_rnn_op
from moduli_kernels.ops.block_layout import block_layout

from .cases_gpu import GpuGoal
from .peers_gpu import captured

ops = torch.ops.moduli_kernels
OURS, OURS_GRAPH, VENDOR, PRODUCTS = "ours", "ours, under a CUDA graph", "torch.nn.RNN", "vendor's products"
AGREE = 2e-2  # of the norm: both round what they multiply to 11 bits


@dataclass(frozen=True)
class RnnGpuCase:
    """density: kept share of W_hh (and of W_ih, where mask_inputs); None: no mask. side: its kept entries fill blocks
    of that side, in an order that is drawn; None: single entries. kept: by the op that walks a layout of the mask."""

    name: str
    n: int
    batch: int
    steps: int = 50
    inputs: int = 16
    layers: int = 1
    nonlinearity: str = "tanh"
    density: float | None = None
    mask_inputs: bool = False
    side: int | None = None
    kept: bool = False
    device: str = "cuda"

    def smaller(self) -> RnnGpuCase:
        density = None if self.density is None else max(self.density, 0.2)
        return replace(self, n=min(self.n, 256), batch=min(self.batch, 24), steps=4, density=density)


RNN_GPU_CASES = (
    RnnGpuCase("rnn-128", 128, 32, inputs=128, nonlinearity="relu"),
    RnnGpuCase("rnn-650-3-layers", 650, 20, 35, inputs=650, layers=3),
    RnnGpuCase("rnn-650-3-layers-10", 650, 20, 35, inputs=650, layers=3, density=0.1, mask_inputs=True),
    *(RnnGpuCase(f"rnn-4096-{round(100 * density)}-blocks-{side}", 4096, 200, nonlinearity="relu", density=density,
                 side=side, kept=True) for density in (0.1, 0.02) for side in (32, 64)),
    RnnGpuCase("rnn-4096-2-unstructured", 4096, 20, nonlinearity="relu", density=0.02, kept=True),
)


class RnnContest:
    """The contestants of a case: calls that only queue work."""

    def __init__(self, case: RnnGpuCase):
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
            self.layouts = [blocked_rnn_op.flat(block_layout(
                self.masks[f"weight_hh_l{k}"], self.order, self.order, side=case.side or 32,
                threshold=None if case.side else 32 * 32 + 1)) for k in range(case.layers)]

    def _masks(self) -> dict[str, Tensor]:
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
        case, w = self.case, self.weights
        weights = (w[f"weight_ih_l{k}"], w[f"weight_hh_l{k}"], w[f"bias_ih_l{k}"], w[f"bias_hh_l{k}"])
        masks = self.masks.get(f"weight_ih_l{k}"), self.masks.get(f"weight_hh_l{k}")
        h, step = x.new_zeros(case.batch, case.n), (case.nonlinearity, 1.0, False)
        if case.kept:
            return ops.blocked_rnn(x, h, *weights, *masks, self.layouts[k], case.side or 32, None, *step, True)[0]
        return ops.masked_rnn(x, h, *weights, *masks, *[None] * 5, *step, True)[0]

    def _products(self, k: int, x: Tensor) -> Tensor:
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
        """Ours first; checked against torch.nn.RNN."""
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
        return calls | ({OURS_GRAPH: captured(ours)} if self.case.device == "cuda" else {})


@contextmanager
def tf32() -> Iterator[None]:
    """The vendor's products as torch.nn.RNN has them, so that all contestants round alike."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- goals -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class RnnFaster(GpuGoal):
    """By that factor than the faster of torch.nn.RNN and the vendor's products."""

    def goal(self) -> str:
        return f">= {self.limit:g} x"

    def figure(self, run: dict[str, Any]) -> tuple[str, bool] | None:
        found = [one for one in run.get("rnn", []) if one["case"] == self.case]
        if not found:
            return None
        others = [one for one in found[0]["contestants"] if one["name"] in (VENDOR, PRODUCTS)]
        best = min(others, key=lambda one: one["ratio"][1])
        low, ratio, high = best["ratio"]
        return f"{ratio:.2f} x [{low:.2f}, {high:.2f}] ({best['name']})", ratio >= self.limit


RNN_GPU_GOALS: tuple[RnnFaster, ...] = (
    RnnFaster("rnn-128", "RNN n = 128, B = 32, dense", 2.0),
    RnnFaster("rnn-650-3-layers", "RNN n = 650, 3 layers, B = 20, T = 35, dense", 3.0),
    RnnFaster("rnn-650-3-layers-10", "RNN n = 650, 3 layers, B = 20, T = 35, 90 % masked", 4.0),
    *(RnnFaster(f"rnn-4096-{share}-blocks-{side}", f"RNN n = 4096, B = 200, {share} % of blocks of {side}",
                max(2.0, 70 / share)) for share in (10, 2) for side in (32, 64)),
    RnnFaster("rnn-4096-2-unstructured", "RNN n = 4096, B = 20, 98 % masked, unstructured", 3.0),
)
