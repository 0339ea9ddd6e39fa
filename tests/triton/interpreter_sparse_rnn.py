"""SparseRNN over blocks and strays by the Triton kernels in the interpreter, compared with torch.nn.RNN in float64.
test_interpreter_rnn.py runs this file in a process with TRITON_INTERPRET=1."""
from __future__ import annotations

import pytest
import torch

import moduli_kernels as mk
from moduli_kernels.rnn import crossovers
from moduli_kernels.triton.rnn import blocked
from tests.support.rnn_cases import assert_same, draw, draw_mask, net_of, plain_rnn, run

pytestmark = [
    pytest.mark.usefixtures("on_triton"),
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning"),
]


@pytest.fixture
def launched(monkeypatch):
    """Lists the launches. Nets take the form in blocks, which nets as small as these would not."""
    names, launches = [], {name: getattr(blocked, name) for name in ("blocked_rnn", "blocked_rnn_grads")}
    monkeypatch.setattr(crossovers, "hidden_form", lambda *_: "blocks")
    for name, launch in launches.items():
        monkeypatch.setattr(blocked, name, lambda *arguments, name=name, launch=launch: (
            names.append(name) or launch(*arguments)))
    return names


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("settings", [{}, {"bidirectional": True, "nonlinearity": "relu"}], ids=str)
def test_as_nn_rnn(launched, settings, packed):
    net = net_of(4, 37, densities=(0.5, None), **settings)
    order = torch.randperm(37)
    for name in net._hidden_names():  # a full block and few entries outside it, in this order
        mask = draw_mask(37, 37, density=0.05)
        mask[:20, :20] = True
        net.set_mask(name, mask[order.argsort()][:, order.argsort()])
        net.set_order(name, order)
    x, hx = draw(3, 3, 4), draw(len(net._all_weights), 3, 37, seed=1)
    lengths = torch.tensor([2, 3, 1]) if packed else None
    assert_same(net, run(net, x, hx, lengths), run(plain_rnn(net, torch.float64), x, hx, lengths), 1e-5)
    assert launched == [name for name in ("blocked_rnn", "blocked_rnn_grads") for _ in net._all_weights]
    layout = net._layout("weight_hh_l0", net.weight_hh_l0, 3, {})
    assert len(layout.kept) and len(layout.strays)
    assert f"in {len(layout.kept)} blocks of 32 x 32 and {len(layout.strays)} stray weights, in the order set by " \
        "set_order" in net.explain()


def test_a_mask_that_changes_in_place(launched):
    net, x = net_of(4, 37), draw(2, 3, 4)
    pruner = mk.MagnitudePruner([(net, "weight_hh_l0")])
    for sparsity in (0.8, 0.99):
        pruner.step_to(sparsity)
        with torch.no_grad():
            assert torch.allclose(net(x)[0], plain_rnn(net)(x)[0], atol=1e-5)
    assert launched == ["blocked_rnn"] * 2


def test_small_nets_are_read_whole(monkeypatch):
    monkeypatch.setattr(blocked, "blocked_rnn", None)
    net = net_of(4, 37)
    assert "as one matrix" in net.explain() and net(draw(2, 3, 4))[0].isfinite().all()
