"""What the tests of the recurrent nets share: masks, the nn.RNN that they are compared with, and how."""
from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import moduli_kernels as mk
from tests.support.penalty_cases import generator, relative_error

# torch's own: the reference makes compressed weights whole by torch.sparse_csr; cuDNN and weights one by one
quiet = [pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state"),
         pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")]
PATHS = ("sparse", "dense")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers on every device."""
    drawn = torch.randn(*shape, generator=generator(seed, "cpu"), dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


def draw_mask(*shape: int, density: float, seed: int = 0) -> Tensor:
    drawn = torch.rand(*shape, generator=generator(seed, "cpu"), device="cpu") < density
    return drawn.to(torch.get_default_device())


def net_of(*sizes: int, densities: tuple[float | None, float | None] = (None, 0.3), seed: int = 0,
           **settings) -> mk.SparseRNN:
    """A SparseRNN with random masks on all input weights and on all hidden weights; None: no mask."""
    torch.manual_seed(seed)
    net = mk.SparseRNN(*sizes, **{"path": "sparse", **settings})
    for k, name in enumerate(weight_names(net)):
        density = densities[name.startswith("weight_hh")]
        if density is not None:
            net.set_mask(name, draw_mask(*getattr(net, name).shape, density=density, seed=seed + k))
    return net


def weight_names(net: nn.RNN) -> list[str]:
    return [name for name in net._flat_weights_names if name.startswith("weight")]


def plain_rnn(net: mk.SparseRNN, dtype: torch.dtype | None = None) -> nn.RNN:
    """torch's nn.RNN with the same weights, the masked ones 0, put together without the package's help."""
    names = ("num_layers", "nonlinearity", "bias", "batch_first", "dropout", "bidirectional")
    plain = nn.RNN(net.input_size, net.hidden_size, **{name: getattr(net, name) for name in names})
    plain = plain.to(net.weight_hh_l0.device, dtype or net.weight_hh_l0.dtype).train(net.training)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            weight, mask = getattr(net, name), getattr(net, f"{name}_mask", None)
            parameter.copy_(weight if mask is None else weight.masked_fill(~mask, 0))
    return plain


class Run(NamedTuple):
    """output (the data of a packed one), h_n, gradients of input, hx and each parameter; None where not asked for."""

    output: Tensor
    h_n: Tensor
    x: Tensor
    hx: Tensor | None
    weights: dict[str, Tensor]


def run(net: nn.RNN, x: Tensor, hx: Tensor | None = None, lengths: Tensor | None = None, seed: int = 9) -> Run:
    """Forward, and backward from random gradients of output and h_n. lengths: x is packed first, in any order."""
    dtype = net.weight_hh_l0.dtype
    x = x.detach().to(dtype).requires_grad_()
    hx = None if hx is None else hx.detach().to(dtype).requires_grad_()
    given = x if lengths is None else pack_padded_sequence(x, lengths, net.batch_first, enforce_sorted=False)
    output, h_n = net(given, hx)
    output = output.data if isinstance(output, PackedSequence) else output
    loss = sum((tensor * draw(*tensor.shape, seed=seed + k).to(dtype)).sum() for k, tensor in enumerate((output, h_n)))
    parameters = dict(net.named_parameters())
    inputs = [x, *([] if hx is None else [hx]), *parameters.values()]
    grads = iter(torch.autograd.grad(loss, inputs))
    return Run(output.detach(), h_n.detach(), next(grads), None if hx is None else next(grads),
               dict(zip(parameters, grads)))


def assert_same(net: mk.SparseRNN, got: Run, want: Run, tolerance: float) -> None:
    """want: of plain_rnn(net), whose gradients know no mask. Masked gradients must be exactly 0."""
    errors = {}
    pairs = {name: (getattr(got, name), getattr(want, name)) for name in ("output", "h_n", "x", "hx")}
    for name, gradient in want.weights.items():
        mask = getattr(net, f"{name}_mask", None)
        if mask is not None:
            gradient = gradient.masked_fill(~mask, 0)
            assert got.weights[name][~mask].eq(0).all(), name
        pairs[name] = (got.weights[name], gradient)
    for name, (mine, its) in pairs.items():
        assert (mine is None) == (its is None) and (mine is None or mine.shape == its.shape), name
        if mine is not None and not relative_error(mine, its) <= tolerance:
            errors[name] = relative_error(mine, its)
    assert not errors, f"relative errors {errors}, allowed {tolerance}"
