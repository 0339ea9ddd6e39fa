"""What a recurrent net returns may be changed in place before the backward pass, as torch.nn.RNN's output may: the
gradients are those of the undisturbed output, to the last bit, and nothing is kept alive for it."""
from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.checkpoint import checkpoint

import moduli_kernels as mk
from moduli_kernels.ops.masked_rnn import ChangeableOutput
from moduli_kernels.rnn import crossovers, ordered_module
from tests.support.penalty_cases import BACKENDS, on_device
from tests.support.rnn_cases import PATHS, draw, draw_mask, net_of, quiet

pytestmark = [on_device, *quiet]

SETTINGS = {
    "plain": {}, "leak": {"leak": 0.3}, "relu": {"nonlinearity": "relu"}, "two layers": {"num_layers": 2},
    "both directions": {"num_layers": 2, "bidirectional": True}, "batch_first": {"batch_first": True},
    "no bias": {"bias": False}, "float64": {"dtype": torch.float64},
}
FORMS = ("masked", "blocked")


@pytest.fixture
def form(monkeypatch):
    """Has masked hidden weights be read as one matrix with its mask, or in blocks, which the reference can on a CPU."""
    def choose(name: str) -> None:
        monkeypatch.setattr(crossovers, "hidden_form", lambda *_: {"masked": "masked", "blocked": "blocks"}[name])
        monkeypatch.setattr(ordered_module, "walks_blocks", lambda *_: name == "blocked")
    return choose


# What is done to the output (or the output and h_n), and the same out of place. Each takes and returns both.
def padded(output: Tensor, h_n: Tensor) -> tuple[Tensor, Tensor]:
    output[-1] = 0
    return output, h_n


def without_gradients(output: Tensor, h_n: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        output.mul_(3)
    return output, h_n


CHANGES = {
    "+=": (lambda o, h: (o.add_(1.5), h), lambda o, h: (o + 1.5, h)),
    "+= itself": (lambda o, h: (o.add_(o.detach().clone()), h), lambda o, h: (o + o.detach(), h)),
    "relu_": (lambda o, h: (o.relu_(), h), lambda o, h: (o.relu(), h)),
    "dropout in place": (lambda o, h: (nn.functional.dropout(o, 1.0, inplace=True), h), lambda o, h: (o * 0, h)),
    "a padded step": (padded, lambda o, h: (torch.cat([o[:-1], torch.zeros_like(o[-1:])]), h)),
    "through a view": (lambda o, h: (o.view(-1)[::2].mul_(2), h), lambda o, h: (o.reshape(-1)[::2] * 2, h)),
    "h_n": (lambda o, h: (o, h.mul_(2)), lambda o, h: (o, h * 2)),
    "both": (lambda o, h: (o.tanh_(), h.relu_()), lambda o, h: (o.tanh(), h.relu())),
}


def gradients(net: nn.Module, change, times: int = 1, *arguments) -> list[Tensor]:
    output, h_n = change(*net(*arguments))
    loss = sum((each * draw(*each.shape, seed=k).to(each.dtype)).sum() for k, each in enumerate((output, h_n)))
    leaves = [*net.parameters(), *[a for a in arguments if isinstance(a, Tensor)]]
    for time in range(times):
        found = torch.autograd.grad(loss, leaves, retain_graph=time + 1 < times)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chosen", FORMS)
@pytest.mark.parametrize("change", CHANGES)
def test_gradients_are_those_of_the_undisturbed_output(form, backend, chosen, change):
    form(chosen)
    inside, outside = CHANGES[change]
    for case in SETTINGS:
        net = net_of(4, 40, densities=(0.5, 0.3), **{**SETTINGS[case], "path": "sparse"})
        hx = draw(len(net._all_weights), 3, 40, dtype=net.weight_hh_l0.dtype).requires_grad_()
        x = draw(*((3, 5) if net.batch_first else (5, 3)), 4, dtype=hx.dtype).requires_grad_()
        if net.batch_first and change == "through a view":
            continue  # a view of it needs equal strides
        with mk.backend(backend):
            for mine, its in zip(gradients(net, inside, 1, x, hx), gradients(net, outside, 1, x, hx)):
                assert torch.equal(mine, its), case


@pytest.mark.parametrize("chosen", FORMS)
@pytest.mark.parametrize("change", ["+=", "relu_"])
def test_twice_with_retain_graph(form, chosen, change):
    form(chosen)
    inside, outside = CHANGES[change]
    net, x = net_of(4, 40), draw(5, 3, 4).requires_grad_()
    for mine, its in zip(gradients(net, inside, 3, x), gradients(net, outside, 1, x)):
        assert torch.equal(mine, its)


def test_a_change_between_two_backward_passes():
    net, x = net_of(4, 40), draw(5, 3, 4)
    output, _ = net(x)
    loss = output.sum()
    first = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    output.detach().mul_(2)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, list(net.parameters()))))


@pytest.mark.parametrize("path", [*PATHS, "auto"])
def test_as_nn_rnn_on_every_path(path):
    net, x, more = net_of(4, 40, path=path), draw(5, 3, 4), draw(5, 3, 40)
    plain = net.to_rnn()
    for each in (net, plain):
        out, _ = each(x)
        out += more
        out[2:] = 0
        out.relu_().square().sum().backward()
    for name, parameter in plain.named_parameters():
        want = parameter.grad * net.weight_hh_l0_mask if name == "weight_hh_l0" else parameter.grad
        assert torch.allclose(net.get_parameter(name).grad, want, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("chosen", FORMS)
@pytest.mark.parametrize("even", [False, True])
def test_the_data_of_a_packed_sequence(form, chosen, even):
    form(chosen)
    net = net_of(4, 40, 2, bidirectional=True)
    packed = pack_sequence([draw(3 if even else n, 4, seed=n) for n in (2, 4, 1)], enforce_sorted=False)

    def data(change):
        def changed(output: PackedSequence, h_n: Tensor) -> tuple[Tensor, Tensor]:
            return change(output.data, h_n)
        return changed

    for name in ("+=", "relu_", "both"):
        for mine, its in zip(*(gradients(net, data(change), 1, packed) for change in CHANGES[name])):
            assert torch.equal(mine, its)


@pytest.mark.parametrize("chosen", FORMS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(form, chosen, reentrant):
    form(chosen)
    net, x = net_of(4, 40, 2), draw(5, 3, 4).requires_grad_()

    def block(x: Tensor) -> Tensor:
        out, _ = net(x)
        out += 1
        out[-1] = 0
        return out

    found = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        net.zero_grad()
        x.grad = None
        out = run(x)
        out *= 2
        out.sum().backward()
        found.append([leaf.grad.clone() for leaf in (x, *net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_hooks_for_saved_tensors():
    net, x = net_of(4, 40), draw(5, 3, 4).requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        mine = gradients(net, CHANGES["relu_"][0], 1, x)
    assert all(torch.equal(a, b) for a, b in zip(mine, gradients(net, CHANGES["relu_"][1], 1, x)))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_under_torch_compile(compiler, backend):
    net, x = net_of(4, 40), draw(5, 3, 4)

    def model(x: Tensor) -> Tensor:
        out, h_n = net(x)
        out += 1
        return out.relu_() + h_n

    with mk.backend(backend), torch._dynamo.config.patch(allow_rnn=True):
        torch._dynamo.reset()
        mine = torch.autograd.grad(torch.compile(model, backend=compiler)(x).sum(), list(net.parameters()))
        torch._dynamo.reset()
        want = torch.autograd.grad(model(x).sum(), list(net.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(mine, want))


def test_cells_and_steps():
    cell, x = mk.SparseRNNCell(4, 6, leak=0.5), draw(5, 3, 4)
    cell.set_mask("weight_hh", draw_mask(6, 6, density=0.5))

    def loop(change) -> list[Tensor]:
        h, loss = None, 0.0
        for x_t in x:
            h = change(cell(x_t, h))
            loss = loss + h.square().sum()
        return torch.autograd.grad(loss, list(cell.parameters()))

    def step(change) -> list[Tensor]:
        h = change(mk.masked_rnn_step(x[0], draw(3, 6), *cell.parameters(), mask_hh=cell.weight_hh_mask))
        return torch.autograd.grad(h.square().sum(), list(cell.parameters()))

    for run in (loop, step):
        assert all(torch.equal(a, b) for a, b in zip(run(lambda h: h.mul_(2).add_(1)), run(lambda h: h * 2 + 1)))


@pytest.mark.parametrize("what", ["weight_hh_l0", "x"])
def test_a_change_of_what_went_in_is_an_error_as_in_nn_rnn(what):
    net = net_of(4, 6)
    for each in (net, net.to_rnn()):
        x = draw(5, 3, 4)
        loss = each(x)[0].sum()
        with torch.no_grad():
            (x if what == "x" else getattr(each, what)).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_bias_that_changes_matters_only_where_the_output_has_changed_too():
    net, x = net_of(4, 6), draw(5, 3, 4)
    want = torch.autograd.grad(net(x)[0].sum(), list(net.parameters()))
    output = net(x)[0]
    with torch.no_grad():
        net.bias_hh_l0.add_(1)
    got = torch.autograd.grad(output.sum(), list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    output = net(x)[0]
    with torch.no_grad():
        net.bias_hh_l0.sub_(1)
    with pytest.raises(RuntimeError, match="output and a bias have both been modified by an inplace operation"):
        (output.add_(1)).sum().backward()


# --- what is kept alive -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("settings", [{}, {"leak": 0.5}, {"num_layers": 2, "bidirectional": True}])
def test_nothing_is_kept_alive_and_there_is_no_cycle(monkeypatch, changed, settings):
    made, init = [], ChangeableOutput.__init__

    def noted(self, output, *rest) -> None:
        init(self, output, *rest)
        made.extend(weakref.ref(each) for each in (self, output))

    monkeypatch.setattr(ChangeableOutput, "__init__", noted)
    net, x = net_of(4, 6, **settings), draw(5, 3, 4)
    gc.collect()
    gc.disable()
    try:
        output, h_n = net(x)
        if changed:
            output.relu_()
            h_n.add_(1)
        made += [weakref.ref(output), weakref.ref(h_n)]
        assert len(made) == 2 * len(net._all_weights) + 2
        del output, h_n
        assert all(reference() is None for reference in made)
    finally:
        gc.enable()


def test_the_output_is_not_copied():
    """What backward needs of it is the output's own memory."""
    saved = []
    net, x = net_of(4, 64), draw(20, 8, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output, _ = net(x)
    assert any(t.data_ptr() == output.data_ptr() and t.shape == output.shape for t in saved)
    assert sum(t.numel() for t in saved if t.dim() == 3) == output.numel() + x.numel()
