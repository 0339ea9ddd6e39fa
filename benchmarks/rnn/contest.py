"""A case of the RNN on the CPU: ours is checked against torch.nn.RNN in float64, then all contestants take turns."""
from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moduli_kernels import SparseRNN

from ..harness.contest import Contest
from ..harness.measuring import relative_error
from .cases import ACCURACY, VERIFIED_STEPS, RnnCase

OURS, OURS_SPARSE, PEER = "ours", "ours, sparse path", "torch.nn.RNN"


class RnnContest(Contest):
    """SparseRNN with path "auto" and "sparse", torch.nn.RNN, and for one layer forward PyTorch's sparse product.

    Attributes:
        nets: name -> net.
        steps: name -> a call that takes one step.
        errors: name -> relative error of the sparse path, of the output and of each weight's gradient.
    """

    SLOW = 1.0
    SLOW_ROUNDS = 3

    def __init__(self, case: RnnCase) -> None:
        super().__init__(seed=0)
        self.case = case
        self.x, self.grad = case.data()
        rnn = case.rnn()
        self.nets: dict[str, nn.RNN] = {
            OURS: self._ours(rnn, "auto"), PEER: rnn, OURS_SPARSE: self._ours(rnn, "sparse")}
        self.steps: dict[str, Callable[[], Any]] = {name: self._step(net) for name, net in self.nets.items()}
        if not case.training and case.density is not None and case.layers == 1:
            self.steps["torch.sparse_csr products"] = self._sparse_products(rnn)
        self.errors: dict[str, float] = {}

    def names(self) -> list[str]:
        return list(self.steps)

    def _ours(self, rnn: nn.RNN, path: str) -> SparseRNN:
        """Makes a SparseRNN with the weights of `rnn` and the case's masks."""
        ours = SparseRNN.from_rnn(rnn, path=path)
        for name, mask in self.case.masks().items():
            ours.set_mask(name, mask)
        return ours

    def _step(self, net: nn.RNN) -> Callable[[], None]:
        def step() -> None:
            if not self.case.training:
                with torch.no_grad():
                    net(self.x)
                return
            net.zero_grad()
            net(self.x)[0].backward(self.grad)

        return step

    def _sparse_products(self, rnn: nn.RNN) -> Callable[[], Tensor]:
        """Loops over PyTorch's sparse product, the strongest form at hand that skips masked weights."""
        w_hh, w_ih = rnn.weight_hh_l0.detach().to_sparse_csr(), rnn.weight_ih_l0.detach()
        bias = (rnn.bias_ih_l0 + rnn.bias_hh_l0).detach()
        activation = torch.relu if self.case.nonlinearity == "relu" else torch.tanh

        def step() -> Tensor:
            inputs = self.x @ w_ih.t() + bias
            h = torch.zeros(self.case.n, self.case.batch)
            output = torch.empty(self.case.steps, self.case.batch, self.case.n)
            for t in range(self.case.steps):
                h = activation(inputs[t].t() + w_hh @ h)
                output[t] = h.t()
            return output

        return step

    def verify(self) -> None:
        """Raises AssertionError where ours is wrong over the first steps; `errors` keeps what was found."""
        x, grad = self.x[:VERIFIED_STEPS], self.grad[:VERIFIED_STEPS]
        truth = _results(copy.deepcopy(self.nets[PEER]).double(), x.double(), grad.double())
        masks = self.case.masks()
        found = _results(self.nets[OURS_SPARSE], x, grad)
        for name, expected in truth.items():
            if name in masks:
                expected = expected * masks[name]
            self.errors[name] = relative_error(found[name], expected)
        wrong = {name: error for name, error in self.errors.items() if not error <= ACCURACY}
        assert not wrong, f"{self.case.name}: off by {wrong}, relative to torch.nn.RNN in float64; nothing is timed."

    def take_turn(self, name: str) -> None:
        start = time.perf_counter()
        self.steps[name]()
        self.times[name][self.round] = time.perf_counter() - start

    def record(self) -> dict[str, Any]:
        case = self.case
        with torch.set_grad_enabled(case.training):
            path = self.nets[OURS].explain(case.batch, case.steps).split(":")[0]
        return {
            "case": case.name, "n": case.n, "batch": case.batch, "steps": case.steps, "inputs": case.inputs,
            "layers": case.layers, "nonlinearity": case.nonlinearity, "density": case.density,
            "training": case.training, "path": path, "rounds": self.round,
            "others_cpu": self.others_cpu(), "errors": self.errors,
            "contestants": [self.summary(name) for name in self.names()],
        }


def _results(net: nn.RNN, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Returns the output, and the gradients of the weights by name."""
    net.zero_grad()
    output = net(x)[0]
    output.backward(grad)
    found = {"output": output.detach()} | {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    return found
