"""Weights that are no plain Parameters: from_rnn, to_rnn, compress, explain, tune and masks use the weights that a
forward pass uses, gradients reach what they are computed from, and what can't be supported is refused in words."""
from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import moduli_kernels as mk
from moduli_kernels import backends
from tests.support.penalty_cases import needs_kernels, on_device, relative_error
from tests.support.rnn_cases import draw, draw_mask, quiet

pytestmark = [on_device, *quiet, pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*:FutureWarning")]

ALL_PATHS = ("auto", "sparse", "dense")
N = 40


class Thresholded(nn.Module):
    """A parametrization of one's own: small weights are 0."""

    def __init__(self, least: float = 0.14):
        super().__init__()
        self.least = least

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(weight.abs() < self.least, 0, weight)


class Scored(nn.Module):
    """A parametrization with a Parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Parameter(draw(N, N, seed=9))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scores.sigmoid()


def own(net: nn.Module, name: str) -> None:
    parametrize.register_parametrization(net, name, Thresholded())


def two(net: nn.Module, name: str) -> None:
    parametrize.register_parametrization(net, name, Scored())
    parametrize.register_parametrization(net, name, Thresholded(0.05))


def pruned(net: nn.Module, name: str) -> None:
    prune.custom_from_mask(net, name, draw_mask(N, N, density=0.3))


COMPUTED = {
    "orthogonal": lambda net, name: parametrizations.orthogonal(net, name),
    "weight_norm": lambda net, name: parametrizations.weight_norm(net, name),
    "spectral_norm": lambda net, name: parametrizations.spectral_norm(net, name),
    "one's own": own, "two with scores": two,
    "old spectral_norm": lambda net, name: spectral_norm(net, name),
    "old weight_norm": lambda net, name: weight_norm(net, name),
    "torch's prune": pruned,
}


def nn_rnn(kind: str, names: tuple[str, ...] = ("weight_hh_l0",), cls=nn.RNN, **settings) -> nn.RNN:
    torch.manual_seed(0)
    net = cls(4, N, **settings)
    for name in names:
        COMPUTED[kind](net, name)
    return net.eval()  # in training spectral_norm makes a step at each read


def moved(net: nn.Module) -> None:
    """What a step of an optimizer does: attributes that hooks have computed are out of date afterwards."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * draw(*parameter.shape, seed=4))


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("path", ALL_PATHS)
def test_from_rnn_computes_what_rnn_does(kind, path):
    rnn, x = nn_rnn(kind), draw(5, 3, 4)
    rnn(x)
    moved(rnn)
    before = {name: tensor.clone() for name, tensor in rnn.state_dict().items()}
    for copy in (False, True):
        net = mk.SparseRNN.from_rnn(rnn, path=path, copy=copy)
        assert torch.allclose(net(x)[0], rnn(x)[0], atol=1e-5)
        assert isinstance(net._parameters["weight_hh_l0"], nn.Parameter) and net.weight_hh_l0.requires_grad
        assert [name for name, _ in net.named_parameters()] == [name for name, _ in nn.RNN(4, N).named_parameters()]
    assert all(torch.equal(rnn.state_dict()[name], tensor) for name, tensor in before.items())


def test_weights_of_the_second_layer_and_of_the_other_direction():
    rnn, x = nn_rnn("orthogonal", ("weight_hh_l1", "weight_hh_l0_reverse"), num_layers=2, bidirectional=True), draw(
        5, 3, 4)
    net = mk.SparseRNN.from_rnn(rnn)
    assert torch.allclose(net(x)[0], rnn(x)[0], atol=1e-5)
    assert net.weight_hh_l0 is rnn.weight_hh_l0 and net.weight_hh_l1_reverse is rnn.weight_hh_l1_reverse


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["spectral_norm", "old spectral_norm"])
def test_reading_makes_no_step_of_the_power_iteration(kind, training):
    rnn = nn_rnn(kind, cls=mk.SparseRNN).train(training)
    rnn(draw(5, 3, 4))
    before = {name: buffer.clone() for name, buffer in rnn.named_buffers()}
    mk.SparseRNN.from_rnn(rnn), rnn.to_rnn(), rnn.compress(), rnn.explain(), rnn.tune(draw(5, 3, 4))
    assert before and all(torch.equal(dict(rnn.named_buffers())[name], b) for name, b in before.items())


def test_extra_parameters_whose_names_begin_like_a_weights():
    rnn = nn.RNN(4, N)
    for name in ("weight_hh_l0_scores", "weight_hh_l00", "weight_ih_l0_mask_logits"):
        rnn.register_parameter(name, nn.Parameter(torch.ones(N, N)))
    x, net = draw(5, 3, 4), mk.SparseRNN.from_rnn(rnn)
    assert len(list(net.parameters())) == 4 and torch.allclose(net(x)[0], rnn(x)[0], atol=1e-6)
    net = mk.SparseRNN(4, N)
    net.register_parameter("weight_hh_l0_scores", nn.Parameter(torch.ones(N, N)))
    assert net._hidden_names() == ["weight_hh_l0"] and "scores" not in net.explain()
    assert torch.allclose(net.to_rnn()(x)[0], net(x)[0], atol=1e-6)
    with pytest.raises(ValueError, match="name must be a weight of this SparseRNN, got 'weight_hh_l0_scores'"):
        net.set_mask("weight_hh_l0_scores", torch.ones(N, N, dtype=torch.bool))


@pytest.mark.parametrize("kind", COMPUTED)
def test_to_rnn_and_compress_use_what_a_forward_pass_uses(kind):
    net, x = nn_rnn(kind, cls=mk.SparseRNN), draw(5, 3, 4)
    net(x)
    moved(net)
    plain, small = net.to_rnn(), net.compress()
    with torch.no_grad():
        want = net(x)[0]
        assert torch.allclose(plain(x)[0], want, atol=1e-5) and torch.allclose(small(x)[0], want, atol=1e-5)
        assert torch.allclose(small.to_sparse_rnn()(x)[0], want, atol=1e-5)
    assert type(plain) is nn.RNN and not list(plain.buffers()) and all(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("path", ALL_PATHS)
def test_gradients_reach_what_a_weight_is_computed_from(kind, path):
    net, rnn, x = nn_rnn(kind, cls=mk.SparseRNN), nn_rnn(kind), draw(5, 3, 4)
    net.path = path
    rnn.load_state_dict(net.state_dict())
    for each in (net, rnn):
        each(x)
        moved(each)
        each.zero_grad()
        each(x)[0].square().sum().backward()
    for (name, mine), its in zip(net.named_parameters(), rnn.parameters()):
        assert relative_error(mine.grad, its.grad) <= 1e-4, name


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_weights_stay_frozen(frozen):
    rnn = nn_rnn("weight_norm").requires_grad_(not frozen)
    for net in (mk.SparseRNN.from_rnn(rnn), mk.SparseRNN.from_rnn(rnn).to_rnn()):
        assert all(p.requires_grad != frozen for p in net.parameters())


def test_a_tensor_that_something_unknown_writes_is_refused():
    rnn = nn.RNN(4, N)
    weight = rnn.weight_hh_l0
    del rnn.weight_hh_l0
    rnn.register_parameter("raw", weight)
    rnn.weight_hh_l0 = weight.detach() * 0.5
    with pytest.raises(ValueError, match="weight_hh_l0 of RNN must be a Parameter or what .* make of one"):
        mk.SparseRNN.from_rnn(rnn)
    net, x = mk.SparseRNN(4, N), draw(5, 3, 4)
    weight = net.weight_hh_l0
    del net.weight_hh_l0
    net.raw = weight
    net.weight_hh_l0 = weight.detach() * 0.5
    for refused in (net.to_rnn, net.compress):
        with pytest.raises(ValueError, match="weight_hh_l0 of SparseRNN must be a Parameter or what"):
            refused()
    assert net(x)[0].isfinite().all() and net.explain() and net.tune(x)  # these use the tensor as it is


# --- masks on computed weights ------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["orthogonal", "weight_norm", "one's own", "two with scores", "old weight_norm"])
@pytest.mark.parametrize("path", ALL_PATHS)
def test_a_mask_on_a_computed_weight_works_forward_and_backward(kind, path):
    net, x, mask = nn_rnn(kind, cls=mk.SparseRNN), draw(5, 3, 4), draw_mask(N, N, density=0.3, seed=3)
    net.path = path
    net(x)
    net.set_mask("weight_hh_l0", mask)
    other = nn_rnn(kind, cls=mk.SparseRNN)
    for parameter, its in zip(other.parameters(), net.parameters()):
        assert torch.equal(parameter, its)  # the mask writes nothing
    other(x)
    weights = {name: getattr(other, name) for name in other._flat_weights_names}
    weights["weight_hh_l0"] = torch.where(mask, weights["weight_hh_l0"], 0)
    want = torch.func.functional_call(nn.RNN(4, N), weights, (x,))[0]
    assert torch.allclose(net(x)[0], want, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(net(x)[0], want, atol=1e-5)
        for form in (net.to_rnn(), net.compress(), mk.SparseRNN.from_rnn(net)):
            assert torch.allclose(form(x)[0], want, atol=1e-5)
    net(x)[0].square().sum().backward()
    found = torch.autograd.grad(want.square().sum(), list(other.parameters()))
    for (name, mine), its in zip(net.named_parameters(), found):
        assert relative_error(mine.grad, its) <= 1e-4, name
    again = nn_rnn(kind, cls=mk.SparseRNN)
    again(x)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.weight_hh_l0_mask, mask) and torch.allclose(again(x)[0], want, atol=1e-5)


# --- explain and tune ---------------------------------------------------------------------------------------------

@needs_kernels
@pytest.mark.parametrize("how", ["plain", "one's own"])
def test_explain_counts_zeros_and_says_where_a_mask_would_pay(monkeypatch, how):
    monkeypatch.setattr(backends, "forced", None)
    torch.manual_seed(0)
    net = mk.SparseRNN(4, 512)
    quiet_words = net.explain(32, 50)
    assert quiet_words.endswith("weight_ih_l0 without a mask, weight_hh_l0 without a mask")
    kept = net.weight_hh_l0.detach().abs() > 0.9 / 512**0.5
    if how == "plain":
        with torch.no_grad():
            net.weight_hh_l0.masked_fill_(~kept, 0)
    else:
        parametrize.register_parametrization(net, "weight_hh_l0", Thresholded(0.9 / 512**0.5))
    zeros = 100 * (1 - int(kept.sum()) / kept.numel())
    advice = (f"weight_hh_l0 without a mask, though {zeros:.3g} % of it is 0, which the sparse path would skip after "
              "set_mask('weight_hh_l0', rnn.weight_hh_l0 != 0)")
    assert net.explain(32, 50).endswith(f"weight_ih_l0 without a mask, {advice}")
    net.set_mask("weight_hh_l0", net.weight_hh_l0 != 0)
    assert "though" not in net.explain(32, 50) and f"{100 - zeros:.3g} % kept" in net.explain(32, 50)
    net.set_mask("weight_hh_l0", None)
    net.path = "dense"
    assert "though" not in net.explain(32, 50)


@pytest.mark.parametrize("kind", COMPUTED)
def test_explain_and_tune_of_computed_weights(kind):
    net, x = nn_rnn(kind, cls=mk.SparseRNN).train(), draw(5, 3, 4)
    net(x)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured, words = net.tune(x), net.explain()
    assert measured.training and set(measured.seconds) == {"dense", "sparse"} and words.startswith(measured.path)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in state.items())
    assert all(p.grad is None for p in net.parameters())


