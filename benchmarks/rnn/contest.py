"""One case of the RNN, measured: checked against torch.nn.RNN in float64, then all contestants take turns."""
from __future__ import annotations

import copy
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moduli_kernels import SparseRNN

from .cases_rnn import ACCURACY, VERIFIED_STEPS, RnnCase
from .contest import cpu_seconds, quartiles, relative_error

SLOW, SLOW_ROUNDS = 1.0, 3  # s; a contestant slower than this sits out after that many rounds


class RnnContest:
    """Use: `verify()`, then per round `others()` and `ours()`, then `record()`."""

    def __init__(self, case: RnnCase):
        self.case = case
        self.x, self.grad = case.data()
        rnn = case.rnn()
        self.nets: dict[str, nn.RNN] = {"ours": self._ours(rnn, "auto"), "torch.nn.RNN": rnn,
                                        "ours, sparse path": self._ours(rnn, "sparse")}
        self.steps: dict[str, Callable[[], Any]] = {name: self._step(net) for name, net in self.nets.items()}
        if not case.training and case.density is not None and case.layers == 1:
            self.steps["torch.sparse_csr products"] = self._sparse_products(rnn)
        self.times: dict[str, dict[int, float]] = defaultdict(dict)
        self.errors: dict[str, float] = {}
        self.round = 0
        self._shuffle = random.Random(0)

    def _ours(self, rnn: nn.RNN, path: str) -> SparseRNN:
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
        """The strongest form at hand that skips masked weights: PyTorch's sparse product, a step at a time."""
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

    # --- correctness -------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """AssertionError where ours is wrong over the first steps; `errors` keeps what was found."""
        x, grad = self.x[:VERIFIED_STEPS], self.grad[:VERIFIED_STEPS]
        truth = _results(copy.deepcopy(self.nets["torch.nn.RNN"]).double(), x.double(), grad.double())
        masks = self.case.masks()
        found = _results(self.nets["ours, sparse path"], x, grad)
        for name, expected in truth.items():
            if name in masks:
                expected = expected * masks[name]
            self.errors[name] = relative_error(found[name], expected)
        wrong = {name: error for name, error in self.errors.items() if not error <= ACCURACY}
        assert not wrong, f"{self.case.name}: off by {wrong}, relative to torch.nn.RNN in float64; nothing is timed."

    # --- time --------------------------------------------------------------------------------------------------

    def others(self) -> None:
        self.round += 1
        turn = [name for name in self.steps if name != "ours"]
        self._shuffle.shuffle(turn)
        for name in turn:
            taken = self.times[name]
            if len(taken) < SLOW_ROUNDS or statistics.median(taken.values()) < SLOW:
                self._time(name)

    def ours(self) -> None:
        self._time("ours")

    def _time(self, name: str) -> None:
        start = time.perf_counter()
        self.steps[name]()
        self.times[name][self.round] = time.perf_counter() - start

    def warm_up(self) -> None:
        self.others()
        self.ours()
        self.times.clear()
        self.round = 0
        self._cpu = cpu_seconds()

    def record(self) -> dict[str, Any]:
        """What the report reads. Times in seconds. ratio: this contestant's time over ours, both of one round."""
        case, ours = self.case, self.times["ours"]
        with torch.set_grad_enabled(case.training):
            path = self.nets["ours"].explain(case.batch, case.steps).split(":")[0]
        now, others = cpu_seconds(), None
        if now is not None and self._cpu is not None and now[0] != self._cpu[0]:
            machine, busy, own = (after - before for after, before in zip(now, self._cpu))
            others = round(max(0.0, busy - own) / machine, 3)
        return {
            "case": case.name, "n": case.n, "batch": case.batch, "steps": case.steps, "inputs": case.inputs,
            "layers": case.layers, "nonlinearity": case.nonlinearity, "density": case.density,
            "training": case.training, "path": path, "rounds": self.round,
            "others_cpu": others, "errors": self.errors,
            "contestants": [{"name": name, "time": quartiles(list(taken.values())),
                             "ratio": quartiles([seconds / ours[r] for r, seconds in taken.items()])}
                            for name, taken in self.times.items()],
        }


def _results(net: nn.RNN, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the weights by name."""
    net.zero_grad()
    output = net(x)[0]
    output.backward(grad)
    found = {"output": output.detach()} | {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    return found
