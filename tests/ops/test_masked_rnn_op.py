"""The ops masked_rnn and masked_rnn_grads: opcheck, gradcheck, and derivatives that are refused."""
from __future__ import annotations

import itertools

import pytest
import torch

import moduli_kernels as mk
from moduli_kernels.reference.rnn import Step
from moduli_kernels.rnn import layer
from tests.support.penalty_cases import BACKENDS, needs_kernels, on_device
from tests.support.rnn_cases import draw, draw_mask, net_of, quiet

ops = torch.ops.moduli_kernels
pytestmark = [on_device, *quiet, pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")]

STEPS, BATCH, INPUTS, HIDDEN = 4, 3, 5, 6
CASES = {
    "plain": {}, "no_bias": {"bias": False}, "masked": {"masked": True}, "leak": {"leak": 0.3, "masked": True},
    "relu": {"nonlinearity": "relu"}, "reverse": {"reverse": True, "masked": True},
    "lengths": {"lengths": True, "masked": True}, "ordered": {"ordered": True, "masked": True},
    "all": {"leak": 0.3, "masked": True, "lengths": True, "reverse": True}, "empty_batch": {"batch": 0, "masked": True},
}


def tensors(batch: int = BATCH, bias: bool = True, masked: bool = False, lengths: bool = False, dtype=torch.float64,
            ordered: bool = False, requires_grad: bool = False, **_) -> tuple:
    """x, h, weights, biases, masks, nothing compressed, lengths, orders."""
    shapes = [(STEPS, batch, INPUTS), (batch, HIDDEN), (HIDDEN, INPUTS), (HIDDEN, HIDDEN), (HIDDEN,), (HIDDEN,)]
    floating = [draw(*shape, seed=k, dtype=dtype).requires_grad_(requires_grad) for k, shape in enumerate(shapes)]
    masks = [draw_mask(*shape, density=0.4, seed=k) for k, shape in enumerate(shapes[2:4])] if masked else [None, None]
    ends = torch.tensor([4, 2, 1][:batch]) if lengths else None
    orders = [torch.arange(n).flip(0) for n in (INPUTS, HIDDEN)] if ordered else [None, None]
    return *floating[:4], *(floating[4:] if bias else (None, None)), *masks, None, None, None, None, ends, *orders


def step(nonlinearity: str = "tanh", leak: float = 1.0, reverse: bool = False, **_) -> Step:
    return Step(nonlinearity, leak, reverse)


@needs_kernels
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(case, dtype):
    settings = {**CASES[case], "dtype": dtype}
    torch.library.opcheck(ops.masked_rnn.default, (*tensors(**settings, requires_grad=True), *step(**settings), True))
    torch.library.opcheck(ops.masked_rnn.default, (*tensors(**settings), *step(**settings), False))


@needs_kernels
@pytest.mark.parametrize("case", CASES)
def test_opcheck_of_the_gradients(case):
    """No autograd of their own: they are called where autograd is off."""
    given, its_step = tensors(**CASES[case]), step(**CASES[case])
    x, h, w_ih, w_hh, _, _, mask_ih, mask_hh, *_, lengths, order_x, order_h = given
    output, _, activations = ops.masked_rnn(*given, *its_step, True)
    given_back = draw(*output.shape, seed=8, dtype=x.dtype), draw(*h.shape, seed=9, dtype=x.dtype)
    needs = [(True,) * 5, (False,) * 5, *(tuple(k == j for k in range(5)) for j in range(5))]
    for each, grads in [*((each, given_back) for each in needs), (needs[0], (None, given_back[1]))]:
        torch.library.opcheck(ops.masked_rnn_grads.default, (
            *grads, x, h, w_ih, w_hh, mask_ih, mask_hh, lengths, order_x, order_h, output, activations, *its_step,
            *each),
            test_utils=("test_schema", "test_faketensor"))


@needs_kernels
def test_opcheck_of_compressed_weights():
    """Indices of torch.sparse_csr in place of masks; without gradients."""
    x, h, w_ih, w_hh, *rest = tensors()
    weights, indices = [], []
    for k, weight in enumerate((w_ih, w_hh)):
        small = (weight * draw_mask(*weight.shape, density=0.4, seed=k)).to_sparse_csr()
        weights.append(small.values().clone())
        indices += [small.crow_indices().clone(), small.col_indices().clone()]
    given = (x, h, *weights, *rest[:4], *indices, None, None, None, "tanh", 1.0, False, False)
    torch.library.opcheck(ops.masked_rnn.default, given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_gradcheck(backend, case):
    given, its_step = tensors(**CASES[case], requires_grad=True), step(**CASES[case])
    leaves = [t for t in given[:6] if t is not None]
    masks, (lengths, order_x, order_h) = given[6:8], given[-3:]

    def run(x, h, w_ih, w_hh, b_ih=None, b_hh=None):
        weights = layer.Weights(w_ih, w_hh, b_ih, b_hh, *masks, order_x=order_x, order_h=order_h)
        return layer.masked_rnn(x, h, weights, lengths, its_step)

    with mk.backend(backend):
        assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)))
def test_only_the_gradients_that_are_needed(backend, needed):
    """Inputs, hidden weights and the second bias, in every combination: the same numbers as all together."""
    given = tensors(masked=True, requires_grad=True)
    picked = [t for t, need in zip((given[0], given[3], given[5]), needed) if need]
    with mk.backend(backend):
        everything = torch.autograd.grad(*loss_of(given))
        for tensor in given[:6]:
            tensor.requires_grad_(any(tensor is p for p in picked))
        if not picked:
            assert not loss_of(given)[0].requires_grad
            return
        got = torch.autograd.grad(loss_of(given)[0], picked)
    want = [grad for grad, tensor in zip(everything, given[:6]) if any(tensor is p for p in picked)]
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def loss_of(given: tuple) -> tuple[torch.Tensor, tuple]:
    weights = layer.Weights(*given[2:8])
    output, _ = layer.masked_rnn(given[0], given[1], weights, None, step())
    return output.square().sum(), given[:6]


@pytest.mark.parametrize("backend", BACKENDS)
def test_biases_do_not_share_a_gradient(backend):
    net = net_of(4, 6)
    with mk.backend(backend):
        first, second = torch.autograd.grad(net(draw(5, 3, 4))[0].sum(), [net.bias_ih_l0, net.bias_hh_l0])
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)


# --- what is refused ----------------------------------------------------------------------------------------------

REFUSED = {
    "second": ("the masked RNN is differentiable once, got a second derivative (double backward); use path='dense' "
               "(needs leak=1 and no cuDNN), or leave it out of what you differentiate twice."),
    "forward": ("the masked RNN has no forward-mode derivative, got a dual tensor; use backward(), or path='dense' "
                "(needs leak=1)."),
    "functorch": ("the masked RNN does not work under torch.func transforms (grad, vmap, jvp, ...), got one; use "
                  "backward(), or path='dense' (needs leak=1)."),
}


def second(net, x):
    x.requires_grad_()
    gradient, = torch.autograd.grad(net(x)[0].sum(), x, create_graph=True)
    gradient.square().sum().backward()


def forward(net, x):
    with torch.autograd.forward_ad.dual_level():
        net(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def functorch(net, x):
    torch.func.grad(lambda x: net(x)[0].sum())(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("derivative", [second, forward, functorch])
def test_derivatives_that_are_refused(backend, derivative):
    with mk.backend(backend), pytest.raises(NotImplementedError) as error:
        derivative(net_of(4, 6), draw(5, 3, 4))
    assert str(error.value) == REFUSED[derivative.__name__]


@pytest.mark.parametrize("derivative", [second, functorch])
def test_the_dense_path_has_them(derivative):
    derivative(net_of(4, 6, path="dense"), draw(5, 3, 4))


def test_a_second_graph_alone_is_no_error():
    """create_graph=True, where only another part of the loss is differentiated twice."""
    net, x = net_of(4, 6), draw(5, 3, 4).requires_grad_()
    gradient, = torch.autograd.grad(net(x)[0].sum() + x.pow(3).sum(), x, create_graph=True)
    assert gradient.requires_grad and gradient.isfinite().all()
