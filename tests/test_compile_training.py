"""torch.compile of training steps: net, loss and penalty in one graph, its backward and the optimizer, over steps in
which weights, masks and the strength change. What breaks a graph or compiles again is counted, and so is whose fault it
is.

    step                                                 graphs   compilations
    forward + penalty (backward by autograd)             1        1, and 1 more once the strength changes
    forward + penalty + backward (trace_autograd_ops)    1        1
    the same + an update written out                     1        1
    optimizer.step                                       torch's own break in it; none after its first two steps
"""
from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import moduli_kernels as mk
from tests.support.penalty_cases import generator, needs_kernels, on_device
from tests.support.rnn_cases import PATHS, draw, quiet

# torch's own, on the way
pytestmark = [on_device, *quiet, pytest.mark.filterwarnings("ignore::DeprecationWarning"),
              pytest.mark.filterwarnings("ignore::FutureWarning")]

STEPS = 10


@pytest.fixture(autouse=True)
def compiler():
    """Fresh, and with leave to take an nn.RNN into a graph."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch._dynamo.reset()


class Training(nn.Module):
    """Net and penalty; calling it gives the loss. (steps, batch, 4), (batch, 2) -> 0-d."""

    def __init__(self, path: str = "sparse", layers: int = 2, trainable: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.decoder = mk.SparseRNN(4, 8, layers, path=path), nn.Linear(8, 2)
        self.reg = mk.regularize(self.rnn, manifold="torus", strength=0.3, trainable=trainable, generator=generator(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.decoder(self.rnn(x)[0][-1]), y) + self.reg()

    def targets(self) -> list[tuple[nn.Module, str]]:
        return [(self.rnn, "weight_hh_l0"), (self.rnn, "weight_ih_l0"), (self.decoder, "weight")]

    def set_strength(self, value: float) -> None:
        for _, regularizer in self.reg.items():
            regularizer.strength = value


def batch(k: int) -> tuple[Tensor, Tensor]:
    return draw(5, 3, 4, seed=k), draw(3, 2, seed=100 + k)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def run(training: Training, step, make=sgd, strengths=None) -> list[float]:
    """Steps with masks that the pruner changes in place; step(optimizer, x, y) -> loss does one but for zeroing."""
    optimizer = make(training.parameters())
    pruner = mk.MagnitudePruner(training.targets(), optimizer=optimizer)
    losses = []
    for k in range(STEPS):
        pruner.step_to(0.08 * k)
        if strengths is not None:
            training.set_strength(strengths[k])
        optimizer.zero_grad()
        losses.append(step(optimizer, *batch(k)).item())
        for module, name in training.targets():
            assert getattr(module, name)[~getattr(module, f"{name}_mask")].eq(0).all()
    assert pruner.sparsity > 0.7
    return losses


def eager(training: Training):
    def step(optimizer, x, y):
        loss = training(x, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def assert_as_eager(training: Training, step, **settings) -> None:
    """Losses and parameters of the same steps, uncompiled."""
    twin = copy.deepcopy(training)
    before = [p.detach().clone() for p in training.parameters()]
    losses, wanted = run(training, step, **settings), run(twin, eager(twin), **settings)
    assert losses == pytest.approx(wanted, rel=1e-4)
    for mine, its, start in zip(training.parameters(), twin.parameters(), before, strict=True):
        assert torch.allclose(mine, its, rtol=1e-3, atol=1e-5) and not torch.allclose(mine, start, atol=1e-4)


def compiled_loss(training: Training, counter: CompileCounterWithBackend, **options):
    loss_of = torch.compile(training, fullgraph=True, backend=counter, **options)

    def step(optimizer, x, y):
        loss = loss_of(x, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


# --- the loss compiled: backward by autograd, with the pruner's hooks ---------------------------------------------

@pytest.mark.parametrize("path", PATHS)
def test_one_graph_and_one_compilation_for_all_steps(path):
    training, counter = Training(path), CompileCounterWithBackend("aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_as_eager(training, compiled_loss(training, counter))
    assert counter.frame_count == 1
    assert torch._dynamo.explain(training)(*batch(0)).graph_break_count == 0


@needs_kernels  # the reference is laid out step by step, which takes inductor long
def test_by_inductor():
    training, counter = Training(layers=1, trainable=False), CompileCounterWithBackend("inductor")
    assert_as_eager(training, compiled_loss(training, counter))
    assert counter.frame_count == 1


@needs_kernels
def test_a_strength_that_changes():
    """torch.compile takes a number of a module for a constant until it sees it change (with dynamic=True as well): one
    compilation more, at the first change."""
    training, counter = Training(), CompileCounterWithBackend("aot_eager")
    strengths = [0.1 * k for k in range(1, STEPS + 1)]
    assert_as_eager(training, compiled_loss(training, counter), strengths=strengths)
    assert counter.frame_count == 2


def test_a_strength_in_a_tensor():
    """Outside the penalty it costs a step of backward's scaling, and no compilation."""
    training, counter = Training(), CompileCounterWithBackend("aot_eager")
    scaled = torch.compile(lambda strength: strength * training.reg(), fullgraph=True, backend=counter)
    for k in range(4):
        strength = torch.tensor(0.1 * k)
        got, want = (torch.autograd.grad(value, training.rnn.weight_hh_l0)[0]
                     for value in (scaled(strength), strength * training.reg()))
        assert torch.allclose(got, want, rtol=1e-5)
    assert counter.frame_count == 1 and want.any()


def test_masks_and_weights_loaded_between_steps():
    """load_state_dict copies in place."""
    training, counter = Training(), CompileCounterWithBackend("aot_eager")
    mk.MagnitudePruner(training.targets()).step_to(0.3)
    loss_of = torch.compile(training, fullgraph=True, backend=counter)
    other = copy.deepcopy(training)
    mk.MagnitudePruner(other.targets()).step_to(0.8)
    first = loss_of(*batch(0)).item()
    training.load_state_dict(other.state_dict())
    assert loss_of(*batch(0)).item() == pytest.approx(other(*batch(0)).item(), rel=1e-5) != first
    assert counter.frame_count == 1


# --- backward in the graph as well --------------------------------------------------------------------------------

@pytest.fixture
def autograd_traced():
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch cannot take backward() into a graph")
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield


@pytest.mark.parametrize("path", PATHS)
def test_forward_and_backward_in_one_graph(autograd_traced, path):
    """torch leaves hooks on parameters out of such a graph: gradients of masked weights of other modules than SparseRNN
    are not 0 there. The pruner's hook on the optimizer still holds the weights at 0."""
    training, counter = Training(path), CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def gradients(x, y):
        loss = training(x, y)
        loss.backward()
        return loss.detach()

    def step(optimizer, x, y):
        loss = gradients(x, y)
        for name in ("weight_hh_l0", "weight_ih_l0"):
            assert getattr(training.rnn, name).grad[~getattr(training.rnn, f"{name}_mask")].eq(0).all()
        optimizer.step()
        return loss

    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_as_eager(training, step)
    assert counter.frame_count == 1


def test_a_whole_step_in_one_graph(autograd_traced):
    """With the update written out: torch's optimizers break graphs (below)."""
    training, counter = Training(), CompileCounterWithBackend("aot_eager")
    parameters = [*training.parameters()]

    @torch.compile(fullgraph=True, backend=counter)
    def whole(x, y):
        loss = training(x, y)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients):
                parameter.sub_(0.1 * gradient)
            for module, name in training.targets():
                getattr(module, name).mul_(getattr(module, f"{name}_mask"))
        return loss.detach()

    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_as_eager(training, lambda optimizer, x, y: whole(x, y), make=lambda p: torch.optim.SGD(p, lr=0.1))
    assert counter.frame_count == 1


# --- the optimizer ------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": sgd,
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_compiled_optimizer(name):
    """Its state appears at the first step; then nothing is compiled again, whatever the masks do."""
    training, counter = Training(), CompileCounterWithBackend("aot_eager")
    loss_counter, seen, steps = CompileCounterWithBackend("aot_eager"), [], {}
    loss_of = torch.compile(training, fullgraph=True, backend=loss_counter)

    def step(optimizer, x, y):
        loss = loss_of(x, y)
        loss.backward()
        steps.setdefault(optimizer, torch.compile(optimizer.step, backend=counter))()
        seen.append(counter.frame_count)
        return loss.detach()

    assert_as_eager(training, step, make=OPTIMIZERS[name])
    assert loss_counter.frame_count == 1 and len(steps) == 1
    assert (seen[0] > 0) == (name != "adamw_fused")  # torch compiles nothing of a fused step
    assert seen[2:] == [seen[1]] * (STEPS - 2)


def test_the_only_break_of_a_whole_step_is_in_torchs_optimizer(autograd_traced):
    """torch.optim.Optimizer.step calls torch._dynamo.graph_break() around itself."""
    training = Training()
    optimizer = torch.optim.SGD(training.parameters(), lr=0.1)

    def whole(x, y):
        training(x, y).backward()
        optimizer.step()

    breaks = torch._dynamo.explain(whole)(*batch(0)).break_reasons
    assert breaks and all("torch/optim/" in each.user_stack[-1].filename.replace("\\", "/")
                          or each.user_stack[-1].line == "optimizer.step()" for each in breaks), breaks
