"""The contestants on a GPU: those of peers.py, a masked weight in its two forms, and a small net in CUDA graphs."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import moduli_kernels as mk
from moduli_kernels import reference

from .cases_gpu import GRAPH, LAYER, LAYERS, MASKED_INTO, MASKED_VALUES, GpuCase
from .peers import Contestant, Peers


class GpuPeers(Peers):
    """A masked case has the dense kernel as `ours`, and what costs only the kept entries beside it."""

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

        self._add(MASKED_INTO, "masked", into)
        self.made[-1].keeps_grad = True
        self.made[-1].weight.grad = torch.zeros_like(self.weight)
        dense, self.weight = self.weight, torch.where(mask, self.weight, 0).to_sparse_csr()
        self._add(MASKED_VALUES, "masked", compressed)
        self.weight = dense


def small_net(device: str = "cuda") -> dict[str, Callable[[], None]]:
    """name -> one forward + backward of the penalty of a small net, all weights in one call, ready to be timed."""
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
            for leaf in leaves:
                leaf.grad = None
            penalty().backward()
        return run

    ours, theirs = step(reg), step(lambda: compiled(*leaves))
    return {GRAPH: captured(ours), "ours, as called": ours,
            "per coordinate, under a CUDA graph": captured(theirs), "per coordinate, as called": theirs}


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The replay of a CUDA graph of step()."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
