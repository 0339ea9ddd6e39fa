"""SparseRNN, its cell and its ops under torch.compile: one graph, the numbers of eager, masks that change in place, no
compilation again; and what happens without the compiler's leave for RNNs."""
from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import moduli_kernels as mk
from moduli_kernels import backends
from tests.support.penalty_cases import BACKENDS, needs_kernels, on_device
from tests.support.rnn_cases import PATHS, draw, draw_mask, net_of, quiet

# torch's own, on the way
pytestmark = [on_device, *quiet, pytest.mark.filterwarnings("ignore::DeprecationWarning"),
              pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def rnns_allowed():
    """torch.compile takes no nn.RNN into a graph unless it is told to."""
    with torch._dynamo.config.patch(allow_rnn=True):
        yield


@pytest.fixture
def kernels_chosen(monkeypatch):
    """Whatever MODULI_KERNELS_BACKEND the suite runs under."""
    monkeypatch.setattr(backends, "forced", None)


def train(net: mk.SparseRNN, compiled: nn.Module, steps: int = 4) -> None:
    """Training steps of both, with a mask that the pruner changes in place; outputs and gradients must agree."""
    twin = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    pruner = mk.MagnitudePruner([(net, "weight_hh_l0"), (net, "weight_ih_l0")], optimizer=optimizer)
    mk.MagnitudePruner([(twin, "weight_hh_l0"), (twin, "weight_ih_l0")])
    for k in range(steps):
        pruner.step_to(0.25 * k)
        if k == 2:  # what stands at a masked weight does not matter to compiled code either
            with torch.no_grad():
                net.weight_hh_l0.masked_fill_(~net.weight_hh_l0_mask, math.nan)
        twin.load_state_dict(net.state_dict())
        x, hx = draw(5, 3, 4, seed=k), draw(len(net._all_weights), 3, 6, seed=k)
        results = [each(x, hx) for each in (compiled, twin)]
        grads = [torch.autograd.grad(output.square().sum() + h_n.sum(), list(each.parameters()))
                 for each, (output, h_n) in zip((net, twin), results)]
        for mine, its in zip((*results[0], *grads[0]), (*results[1], *grads[1])):
            assert torch.allclose(mine, its, rtol=1e-4, atol=1e-5)
        if k == 2:
            pruner.apply()
        optimizer.zero_grad()
        compiled(x, hx)[0].square().sum().backward()
        optimizer.step()
        assert net.weight_hh_l0[~net.weight_hh_l0_mask].eq(0).all()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("path", PATHS)
def test_training_in_one_graph(rnns_allowed, path, compiler):
    net = mk.SparseRNN(4, 6, 2, path=path, bidirectional=path == "sparse")
    counter = CompileCounterWithBackend(compiler)
    train(net, torch.compile(net, fullgraph=True, backend=counter))
    assert counter.frame_count == 1


@pytest.mark.parametrize("settings", [{"leak": 0.3}, {"nonlinearity": "relu", "bias": False}, {"path": "auto"}])
def test_other_settings(rnns_allowed, settings):
    net = mk.SparseRNN(4, 6, **{"path": "sparse", **settings})
    counter = CompileCounterWithBackend("aot_eager")
    train(net, torch.compile(net, fullgraph=True, backend=counter))
    assert counter.frame_count == 1


def test_the_reference(rnns_allowed):
    net = mk.SparseRNN(4, 6, leak=0.3)
    with mk.backend("reference"):
        train(net, torch.compile(net, fullgraph=True, backend="aot_eager"), steps=3)


@pytest.mark.parametrize("path", ["auto", *PATHS])
def test_the_path_in_a_graph_is_that_of_eager_mode(rnns_allowed, path):
    net, called = mk.SparseRNN(4, 6, path=path), []

    def note(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with mk.backend("reference"):  # with which "auto" is sparse
        torch.compile(net, fullgraph=True, backend=note)(draw(5, 3, 4))
        assert any("rnn_tanh" in name for name in called) == net.explain().startswith("dense") == (path == "dense")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shapes", [[(3, 4, 4)], [(4, 4)], [(4, 4), (2, 6)]], ids=["batch", "one", "one_hx"])
def test_inference_and_kinds_of_input(rnns_allowed, path, shapes):
    net = net_of(4, 6, 2, batch_first=True, path=path).eval()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    arguments = [draw(*shape) for shape in shapes]
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            for mine, its in zip(compiled(*arguments), net(*arguments)):
                assert mine.shape == its.shape and torch.allclose(mine, its, atol=1e-6)


@needs_kernels  # the reference is laid out step by step
@pytest.mark.parametrize("dynamic", [None, True])
def test_batches_and_lengths_that_vary(rnns_allowed, kernels_chosen, dynamic):
    """The second size makes the graph one for all sizes, as torch.compile does by default."""
    net = net_of(4, 6, 2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter, dynamic=dynamic)
    for steps, batch in ((5, 3), (7, 4), (2, 9), (11, 6)):
        assert torch.allclose(compiled(draw(steps, batch, 4))[0], net(draw(steps, batch, 4))[0], atol=1e-6)
    assert counter.frame_count <= 2
    net.path = "auto"  # the path is chosen for the sizes seen before
    assert torch.allclose(compiled(draw(4, 3, 4))[0], net(draw(4, 3, 4))[0], atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_autocast(rnns_allowed, path):
    net = net_of(4, 6, 2, path=path)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        (got, _), (want, _) = compiled(draw(5, 3, 4)), net(draw(5, 3, 4))
        got.float().sum().backward()
    assert got.dtype == want.dtype == torch.bfloat16 and torch.allclose(got.float(), want.float(), atol=0.02)
    exact = torch.autograd.grad(net(draw(5, 3, 4))[0].sum(), list(net.parameters()))
    for parameter, gradient in zip(net.parameters(), exact):
        assert torch.allclose(parameter.grad, gradient, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("path", PATHS)
def test_dropout_is_not_lost(rnns_allowed, path):
    """torch's own form of a traced RNN leaves it out."""
    net = net_of(4, 40, 2, dropout=1.0, path=path)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for mine, its in zip(compiled(draw(5, 3, 4)), net(draw(5, 3, 4))):
        assert torch.allclose(mine, its, atol=1e-6)
    net.dropout = 0.5
    assert not torch.equal(compiled(draw(5, 3, 4))[0], compiled(draw(5, 3, 4))[0])


def test_without_leave_it_runs_outside_the_graph():
    """As nn.RNN does; what it calls is not compiled piece by piece, and no warning is given."""
    model = nn.Sequential(nn.Linear(4, 4), mk.SparseRNN(4, 6, path="sparse"))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    for k in range(3):
        x = draw(5, 3, 4, seed=k)
        assert torch.allclose(compiled(x)[0], model(x)[0], atol=1e-6)
    assert counter.frame_count <= 1
    # torch's words, which name the setting from 2.11 on
    with pytest.raises(torch._dynamo.exc.Unsupported, match="allow_rnn|Dynamo does not support RNN"):
        torch.compile(model, backend="eager", fullgraph=True)(draw(5, 3, 4))


# --- cell and function, which need no leave -----------------------------------------------------------------------

@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loop_over_the_cell(backend):
    cell = mk.SparseRNNCell(4, 6, leak=0.5)
    cell.set_mask("weight_hh", draw_mask(6, 6, density=0.4))

    def loop(x):
        h = None
        for x_t in x:
            h = cell(x_t, h)
        return h

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loop, fullgraph=True, backend=counter)
    with mk.backend(backend):
        for k in range(3):
            x = draw(4, 3, 4, seed=k)
            cell.weight_hh_mask.logical_not_()
            mine, its = (torch.autograd.grad(run(x).square().sum(), list(cell.parameters()))
                         for run in (compiled, loop))
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(mine, its))
    assert counter.frame_count == 1


def test_the_function():
    tensors, mask = (draw(3, 4), draw(3, 6), draw(6, 4), draw(6, 6)), draw_mask(6, 6, density=0.4)
    compiled = torch.compile(mk.masked_rnn_step, fullgraph=True, backend="aot_eager")
    got, want = (step(*tensors, mask_hh=mask) for step in (compiled, mk.masked_rnn_step))
    assert torch.allclose(got, want, atol=1e-6)


@needs_kernels  # the reference makes the weights whole, through a layout that the compiler does not know
def test_the_compressed_net(kernels_chosen):
    small = net_of(4, 30, 2).compress()
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(draw(5, 3, 4))[0], small(draw(5, 3, 4))[0], atol=1e-6)
