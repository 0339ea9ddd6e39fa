"""SparseRNN whose hidden weight is walked by a layout of its mask: which form it takes, the same results, when layouts
are made, and the order of the neurons. Here the form is forced, and the reference of blocked_rnn runs on the CPU."""
from __future__ import annotations

import copy
import io
import re

import pytest
import torch

import moduli_kernels as mk
from moduli_kernels.ops import blocked_rnn as blocked_rnn_op
from moduli_kernels.rnn import crossovers, layer, masked_module, ordered_module
from tests.support.penalty_cases import BACKENDS, on_device
from tests.support.rnn_cases import Run, assert_same, draw, draw_mask, net_of, plain_rnn, quiet, run

pytestmark = [on_device, *quiet]
ops = torch.ops.moduli_kernels


# --- which form ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("case", "form"), [
    ((650, 20, 0.02), "masked"), ((1024, 20, 0.001), "masked"),  # W stays on the chip, few bytes
    ((2048, 20, 0.02), "blocks"), ((2048, 20, 0.02, 0, 83886), "blocks"),
    ((4096, 20, 0.02, 0, 335544), "blocks"), ((4096, 200, 0.02, 328, 0), "blocks"),
    ((4096, 200, 0.1), "blocks"), ((4096, 200, 0.1, 1638, 0), "blocks"),  # in full blocks, but not one by one
    ((4096, 200, 0.1, 0, 1677722), "masked"), ((2048, 20, 1.0), "masked"), ((4096, 0, 0.02), "masked")])
def test_rule(case, form):
    assert crossovers.hidden_form(*case) == form


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_where_kernels_are(backend, monkeypatch):
    monkeypatch.setattr(crossovers, "hidden_form", lambda *_: "blocks")
    made = []
    monkeypatch.setattr(ordered_module, "lay_out_blocks", lambda *_, **__: made.append(1))
    with mk.backend(backend):
        kind = torch.get_default_device().type
        assert layer.walks_blocks(kind, torch.float32) == (backend == "triton")
        assert not layer.walks_blocks(kind, torch.float64)
        net = net_of(4, 40, dtype=torch.float64)
        net(draw(5, 3, 4, dtype=torch.float64)), net.explain()
    assert not made


def test_the_rule_sees_the_layout(laid_out, monkeypatch):
    net, asked = net_of(4, 40), []
    monkeypatch.setattr(crossovers, "hidden_form", lambda *case: asked.append(case) or (
        "blocks" if len(asked) == 1 else "masked"))
    net(draw(5, 3, 4))
    density = masked_module.kept_share(net.weight_hh_l0_mask)
    assert asked == [(40, 3, density), (40, 3, density, len(laid_out[0].kept), len(laid_out[0].strays))]
    assert layout_of(net) is None and len(laid_out) == 1


def layout_of(net: mk.SparseRNN):
    """What the next call with a batch of 3 walks the first hidden weight by."""
    return net._layout("weight_hh_l0", net.weight_hh_l0, 3, {})


def test_explain(laid_out):
    net, mask = net_of(4, 40, 2), torch.zeros(40, 40, dtype=torch.bool)
    mask[:8, :8] = mask[39, :3] = True
    net.set_mask("weight_hh_l0", mask)
    net.set_mask("weight_hh_l1", None)
    with torch.no_grad():
        net.weight_hh_l1.fill_(0.1)
    told = ("  layer 0: sparse; weight_ih_l0 without a mask, weight_hh_l0 4.19 % kept, in 1 blocks of 32 x 32 and 3 "
            "stray weights, in the order {}\n"
            "  layer 1: sparse; weight_ih_l1 without a mask, weight_hh_l1 without a mask")
    assert net.explain().endswith(told.format("of the neurons"))
    net.set_order("weight_hh_l0", torch.arange(39, -1, -1))
    assert net.explain().endswith(told.format("set by set_order"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crossovers, "hidden_form", lambda *_: "masked")
        assert "weight_hh_l0 4.19 % kept, as one matrix with its mask\n" in net.explain()
    net.path = "dense"
    assert "weight_hh_l0 4.19 % kept\n" in net.explain() and len(laid_out) == 2


# --- the same results ---------------------------------------------------------------------------------------------

SETTINGS = {
    "plain": {}, "two layers": {"num_layers": 2}, "both directions": {"num_layers": 2, "bidirectional": True},
    "batch_first": {"batch_first": True, "nonlinearity": "relu"}, "no bias": {"bias": False},
    "leak": {"leak": 0.3, "bidirectional": True},
}


def masked_run(net: mk.SparseRNN, *arguments) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crossovers, "hidden_form", lambda *_: "masked")
        return run(net, *arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", SETTINGS)
def test_as_the_masked_form(laid_out, monkeypatch, case, packed, backend):
    net = net_of(4, 40, densities=(0.5, 0.2), dtype=torch.float64, **SETTINGS[case])
    for name in net._hidden_names():
        net.set_order(name, torch.randperm(40))
    x = draw(*((3, 5) if net.batch_first else (5, 3)), 4, dtype=torch.float64)
    hx = draw(len(net._all_weights), 3, 40, seed=1, dtype=torch.float64)
    lengths = torch.tensor([2, 5, 3], device="cpu") if packed else None
    called, flat = [], blocked_rnn_op.flat
    monkeypatch.setattr(blocked_rnn_op, "flat", lambda layout: called.append(layout) or flat(layout))
    with mk.backend(backend):
        want, got = masked_run(net, x, hx, lengths), run(net, x, hx, lengths)
        assert len(called) == len(laid_out) == len(net._all_weights)
        assert_same(net, got, want, 1e-12)
        if net.leak == 1:
            assert_same(net, got, run(plain_rnn(net), x, hx, lengths), 1e-10)
        with torch.no_grad():
            assert lengths is not None or torch.equal(net(x, hx)[0], got.output)
    assert len(laid_out) == len(net._all_weights)


def test_only_h_n_and_only_some_gradients(laid_out):
    net, x = net_of(4, 40, dtype=torch.float64), draw(5, 3, 4, dtype=torch.float64)
    net.bias_hh_l0.requires_grad_(False)
    net.weight_ih_l0.requires_grad_(False)
    net(x)[1].sum().backward()
    its = plain_rnn(net)
    its(x)[1].sum().backward()
    assert net.weight_ih_l0.grad is None and net.bias_hh_l0.grad is None
    assert torch.allclose(net.bias_ih_l0.grad, its.bias_ih_l0.grad)
    assert torch.allclose(net.weight_hh_l0.grad, its.weight_hh_l0.grad * net.weight_hh_l0_mask)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at the first dual number
def test_refusals_are_those_of_the_masked_form(laid_out):
    net, x = net_of(4, 40), draw(5, 3, 4).requires_grad_()
    grad, = torch.autograd.grad(net(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once, got a second derivative"):
        grad.sum().backward()
    forward = pytest.raises(NotImplementedError, match="no forward-mode derivative")
    with forward, torch.autograd.forward_ad.dual_level():
        net(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(NotImplementedError, match="does not work under torch.func transforms"):
        torch.func.grad(lambda x: net(x)[0].sum())(x.detach())


def test_autocast_and_16_bit_weights(laid_out):
    net, x = net_of(4, 40), draw(5, 3, 4)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        output = net(x)[0]
    assert output.dtype == torch.bfloat16 and torch.allclose(output.float(), plain_rnn(net)(x)[0], atol=0.02)
    torch.autograd.grad(output.float().sum(), list(net.parameters()))
    net.bfloat16()
    assert net(x.bfloat16())[0].dtype == torch.bfloat16 and len(laid_out) == 1


# --- when layouts are made ----------------------------------------------------------------------------------------

def test_once_a_version_of_mask_and_order(laid_out):
    net, x = net_of(4, 40, 2), draw(5, 3, 4)
    for change, count in (
            (lambda: None, 2), (lambda: net.weight_hh_l0_mask.logical_not_(), 3),
            (lambda: net.set_order("weight_hh_l1", torch.arange(39, -1, -1)), 4),
            (lambda: net.set_order("weight_hh_l1", torch.randperm(40)), 5),
            (lambda: net.set_order("weight_hh_l1", None), 6),
            (lambda: net.set_mask("weight_hh_l1", None), 6), (lambda: net.double().float(), 6),
            (lambda: net.set_mask("weight_hh_l1", draw_mask(40, 40, density=0.5)), 7)):
        change()
        for size in (3, 2):
            net(x[:, :size])
            net.explain()
        assert len(laid_out) == count
    with torch.no_grad():
        net(x)
    assert len(laid_out) == 7


def test_a_pruner_that_changes_the_mask_in_place(laid_out):
    net = net_of(4, 40, densities=(None, None))
    net.set_order("weight_hh_l0", torch.randperm(40))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    pruner, x = mk.MagnitudePruner([(net, "weight_hh_l0")], optimizer=optimizer), draw(5, 3, 4)
    for k, sparsity in enumerate((0.0, 0.5, 0.9)):
        pruner.step_to(sparsity)
        for _ in range(2):
            assert torch.allclose(net(x)[0], plain_rnn(net)(x)[0], atol=1e-6)
            optimizer.zero_grad()
            net(x)[0].square().sum().backward()
            optimizer.step()
        assert net.weight_hh_l0[~net.weight_hh_l0_mask].eq(0).all()
        assert len(laid_out) == k + 1
        layout = laid_out[-1]
        assert int(layout.kept.sum()) + len(layout.strays) == int(net.weight_hh_l0_mask.sum())


def test_torch_prune(laid_out):
    """Its mask is of floats, and stays one tensor."""
    net, mask = mk.SparseRNN(4, 40, path="sparse"), draw_mask(40, 40, density=0.3)
    torch.nn.utils.prune.custom_from_mask(net, "weight_hh_l0", mask)
    for _ in range(2):
        assert torch.allclose(net(draw(5, 3, 4))[0], net.to_rnn()(draw(5, 3, 4))[0], atol=1e-6)
    assert len(laid_out) == 1 and int(laid_out[0].kept.sum()) + len(laid_out[0].strays) == int(mask.sum())


def test_inference_mode(laid_out):
    """A layout that was made there serves training later, also one of a mask of inference mode."""
    with torch.inference_mode():
        net = net_of(4, 40)
        net(draw(5, 3, 4))
    assert len(laid_out) == 1
    net = net_of(4, 40)
    with torch.inference_mode():
        net(draw(5, 3, 4))
    net(draw(5, 3, 4))[0].sum().backward()
    assert len(laid_out) == 2 and net.weight_hh_l0.grad.any()


def test_recording_a_cuda_graph(laid_out, monkeypatch):
    """No layout is taken, since the mask may change between replays; the op reads the mask itself."""
    net, x, recording = net_of(4, 40), draw(5, 3, 4), [True]
    monkeypatch.setattr(ordered_module, "capturing", lambda _: recording[0])
    assert layout_of(net) is None and net(x) is not None
    recording[0] = False
    net(x)
    assert layout_of(net) is laid_out[0]
    recording[0] = True
    assert layout_of(net) is None and torch.allclose(net(x)[0], plain_rnn(net)(x)[0], atol=1e-6)
    assert len(laid_out) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_not_in_a_compiled_graph(laid_out):
    """Its mask may change in place."""
    net, x = net_of(4, 40), draw(5, 3, 4)
    with torch._dynamo.config.patch(allow_rnn=True):
        torch._dynamo.reset()
        output = torch.compile(net, fullgraph=True, backend="eager")(x)[0]
        torch._dynamo.reset()
    assert not laid_out and torch.allclose(output, net(x)[0], atol=1e-6)


# --- the order of the neurons -------------------------------------------------------------------------------------

HOW = "manifold_order(points, manifold) gives one."
WANTED = "order must be an int64 permutation (6,) of the neurons or None"
BAD_ORDERS = {
    "name": ("weight_ih_l0", torch.arange(6), ValueError,
             "name must be a hidden weight of this SparseRNN, got 'weight_ih_l0'; it has weight_hh_l0, weight_hh_l1."),
    "list": ("weight_hh_l0", [0, 1], TypeError, f"{WANTED}, got a list; {HOW}"),
    "dtype": ("weight_hh_l0", torch.arange(6, dtype=torch.int32), TypeError, f"{WANTED}, got torch.int32; {HOW}"),
    "shape": ("weight_hh_l0", torch.arange(5), ValueError, f"{WANTED}, got torch.int64 (5,); {HOW}"),
    "twice": ("weight_hh_l1", torch.zeros(6, dtype=torch.int64), ValueError,
              f"{WANTED}, got entries that repeat or lie outside; {HOW}"),
}


@pytest.mark.parametrize("case", BAD_ORDERS)
def test_orders_that_do_not_fit(case):
    name, order, error, message = BAD_ORDERS[case]
    net = mk.SparseRNN(4, 6, 2)
    with pytest.raises(error) as caught:
        net.set_order(name, order)
    assert str(caught.value) == message and not list(net.buffers())


def test_set_order_and_take_it_away():
    net, points = mk.SparseRNN(4, 6), mk.ManifoldEmbedding(6, mk.manifold("torus")).points
    order = mk.manifold_order(points, "torus")
    net.set_order("weight_hh_l0", order)
    assert torch.equal(net.weight_hh_l0_order, order) and net.weight_hh_l0_order.data_ptr() != order.data_ptr()
    assert "weight_hh_l0_order" in net.state_dict() and net.double().weight_hh_l0_order.dtype == torch.int64
    net.set_order("weight_hh_l0", None)
    net.set_order("weight_hh_l0", None)
    assert not list(net.buffers()) and net.state_dict().keys() == torch.nn.RNN(4, 6).state_dict().keys()


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_with_an_order(assign):
    net, order = net_of(4, 6, 2), torch.tensor([3, 1, 0, 5, 2, 4])
    net.set_order("weight_hh_l1", order)
    state, other = net.state_dict(), mk.SparseRNN(4, 6, 2)
    outer = torch.nn.Sequential(other)
    outer.load_state_dict({f"0.{key}": value.clone() for key, value in state.items()}, assign=assign)
    assert torch.equal(other.weight_hh_l1_order, order) and torch.equal(other.weight_hh_l1_mask, net.weight_hh_l1_mask)
    assert other.state_dict().keys() == state.keys()
    with pytest.raises(RuntimeError, match="Missing key.*weight_hh_l1_order"):
        net.load_state_dict({key: value for key, value in state.items() if not key.endswith("_order")})


@pytest.mark.parametrize(("order", "came"), [
    (torch.arange(5), "torch.int64 (5,)"), (torch.arange(6.0), "torch.float32 (6,)"), (3, "a int"),
    (torch.ones(6, dtype=torch.int64), "entries that repeat or lie outside")])
def test_saved_orders_that_do_not_fit(order, came):
    net = mk.SparseRNN(4, 6)
    message = (f"weight_hh_l0_order must be an int64 permutation (6,) of the neurons, got {came}; save the state_dict "
               "of a net with the same sizes, ordered by set_order.")
    with pytest.raises(RuntimeError, match=re.escape(message)):
        net.load_state_dict(net.state_dict() | {"weight_hh_l0_order": order})
    assert not list(net.buffers())


def test_copies_pickles_and_other_nets(laid_out):
    net, x = net_of(4, 40), draw(5, 3, 4)
    net.set_order("weight_hh_l0", torch.randperm(40))
    want, buffer = net(x)[0], io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    twins = (copy.deepcopy(net), torch.load(buffer, weights_only=False), mk.SparseRNN.from_rnn(net, path="sparse"))
    for twin in twins:
        assert torch.equal(twin.weight_hh_l0_order, net.weight_hh_l0_order) and torch.equal(twin(x)[0], want)
        twin.set_order("weight_hh_l0", None)
    assert len(laid_out) == 4 and "weight_hh_l0_order" in net.state_dict()
    assert "weight_hh_l0_order" not in mk.SparseRNN.from_rnn(net.to_rnn()).state_dict()
    assert torch.allclose(net.compress()(x)[0], want, atol=1e-6)
