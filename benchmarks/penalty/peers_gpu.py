"""The contestants on a GPU: those of peers.py, a masked weight in two forms, and a small net in CUDA graphs."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import moduli_kernels as mk
from moduli_kernels import reference

from ..harness import stopwatch
from .cases_gpu import GRAPH, LAYER, LAYERS, MASKED_INTO, MASKED_VALUES, GpuCase
from .peers import Contestant, Peers


class GpuPeers(Peers):
    """In a masked case the dense kernel is `ours`; beside it stand two calls that work on the kept entries only."""

    case: GpuCase

    def all(self) -> list[Contestant]:
        super().all()
        if self.case.kept is not None:
            self._masked()
        return self.made

    def _masked(self) -> None:
        case = self.case
        settings = {"manifold": case.manifold, "inhibitor": case.inhibitor}
        mask = case.mask(self.weight.device)

        def into(me: Contestant) -> Tensor:
            return mk.accumulate_penalty_grad_(me.weight, me.points, mask=mask, **settings)

        def compressed(me: Contestant) -> Tensor:
            value = mk.moduli_penalty(me.weight, me.points, **settings)
            value.backward()
            return value.detach()

        self.add(MASKED_INTO, "masked", into)
        self.made[-1].keeps_grad = True
        self.made[-1].weight.grad = torch.zeros_like(self.weight)
        dense, self.weight = self.weight, torch.where(mask, self.weight, 0).to_sparse_csr()
        self.add(MASKED_VALUES, "masked", compressed)
        self.weight = dense


def small_net(device: str = "cuda") -> dict[str, Callable[[], None]]:
    """Returns name -> a call that takes one forward + backward of a small net's penalty, all weights together."""
    net = nn.RNN(LAYER, LAYER, num_layers=LAYERS, device=device)
    reg = mk.regularize(net, manifold="torus", trainable=True)
    weights = [getattr(net, f"weight_hh_l{k}") for k in range(LAYERS)]
    points = list(reg.parameters())
    leaves = weights + points
    what = reference.Penalty(mk.manifold("torus"), mk.DifferenceOfGaussians(), 1.0, 1, 1 / LAYER**2)

    def formula(*tensors: Tensor) -> Tensor:
        w, e = tensors[:LAYERS], tensors[LAYERS:]
        return sum(reference.penalty_formula(a, b, None, None, what) for a, b in zip(w, e))

    compiled = torch.compile(formula, dynamic=False, fullgraph=True)

    def step(penalty: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for module in (net, reg):
                module.zero_grad()
            penalty().backward()
        return run

    ours, theirs = step(reg), step(lambda: compiled(*leaves))
    return {GRAPH: stopwatch.captured(ours), "ours, as called": ours,
            "per coordinate, under a CUDA graph": stopwatch.captured(theirs), "per coordinate, as called": theirs}
