"""Combines regularizer, pruner and SparseRNN with the other parts of training loops.

These are accumulation, loss scales, autocast, checkpointing, implementations of optimizers, copies, averages and
parametrizations. The plain loop of the examples is tested here too.
"""
from __future__ import annotations

import copy
import io
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import moduli_kernels as mk
from examples import plain_loop
from tests.support.penalty_cases import generator, on_device
from tests.support.rnn_cases import PATHS, draw, plain_rnn, quiet

pytestmark = [on_device, *quiet]


class Net(nn.Module):
    """A recurrent net and a decoder: (steps, batch, 3) -> (batch, 2)."""

    def __init__(self, rnn: type[nn.RNN] = mk.SparseRNN, dtype: torch.dtype = torch.float32, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.decoder = rnn(3, 8, dtype=dtype, **settings), nn.Linear(8, 2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.rnn(x)[0][-1])


class Loop(NamedTuple):
    """Holds the parts of a training loop, which are copied and pickled together."""

    net: Net
    reg: mk.Regularization
    optimizer: torch.optim.Optimizer
    pruner: mk.MagnitudePruner

    def parameters(self) -> list[nn.Parameter]:
        return [*self.net.parameters(), *self.reg.parameters()]

    def targets(self) -> list[tuple[nn.Module, str]]:
        return [(self.net.rnn, "weight_hh_l0"), (self.net.decoder, "weight")]

    def error(self, k: int, batch: slice = slice(None)) -> Tensor:
        """Returns the mean square error over the batch, for the data of the k-th step."""
        x = draw(5, 4, 3, seed=k, dtype=self.net.decoder.weight.dtype)[:, batch]
        return (self.net(x) - x.sum(0)[:, :2].tanh()).square().mean()

    def step(self, k: int) -> float:
        loss = self.error(k) + self.reg()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def assert_masked(self) -> None:
        for module, name in self.targets():
            cut = ~getattr(module, f"{name}_mask")
            assert cut.any() and getattr(module, name)[cut].eq(0).all(), name


def loop_of(make=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), sparsity: float = 0.4, **settings) -> Loop:
    net = Net(**settings)
    reg = mk.regularize(net, manifold="torus", strength=0.2, trainable=True, generator=generator(3))
    optimizer = make([*net.parameters(), *reg.parameters()])
    loop = Loop(net, reg, optimizer, mk.MagnitudePruner([(net.rnn, "weight_hh_l0"), (net.decoder, "weight")],
                                                        optimizer=optimizer))
    loop.pruner.step_to(sparsity)
    return loop


def assert_same(mine: Loop, its: Loop, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    start = loop_of().net.rnn.weight_ih_l0
    assert not torch.allclose(mine.net.rnn.weight_ih_l0.to(start.dtype), start, atol=1e-3)  # it has learned
    for a, b in zip(mine.parameters(), its.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=rtol, atol=atol), (a - b).abs().max()


# --- gradients: accumulated, scaled, in 16 bits, checkpointed -----------------------------------------------------

@pytest.mark.parametrize("penalty", ["once a step", "in each part, scaled with it"])
def test_two_micro_batches_are_one_batch(penalty):
    whole, parts = (loop_of(dtype=torch.float64) for _ in range(2))
    for k in range(6):
        whole.step(k)
        parts.optimizer.zero_grad()
        for batch in (slice(0, 2), slice(2, 4)):
            loss = parts.error(k, batch)
            (loss if penalty == "once a step" else loss + parts.reg()).div(2).backward()
        if penalty == "once a step":
            parts.reg().backward()
        parts.optimizer.step()
    assert_same(parts, whole, rtol=1e-10, atol=1e-12)
    parts.assert_masked()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_loss_scale(path, fused):
    """With GradScaler a power of two changes no gradient, and unscaled gradients are clipped as without it."""
    device = torch.get_default_device().type

    def adam(p):
        return torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, fused=fused)

    scaled, plain = (loop_of(adam, path=path) for _ in range(2))
    scaler = torch.amp.GradScaler(device, init_scale=2.0**12)
    for k in range(6):
        for loop in (scaled, plain):
            loop.optimizer.zero_grad()
        scaler.scale(scaled.error(k) + scaled.reg()).backward()
        (plain.error(k) + plain.reg()).backward()
        if not fused:  # fused optimizers unscale gradients in their step
            scaler.unscale_(scaled.optimizer)
            norms = [nn.utils.clip_grad_norm_(loop.parameters(), 0.05) for loop in (scaled, plain)]
            assert norms[0] > 0.05 and torch.allclose(*norms, rtol=1e-5)
        scaler.step(scaled.optimizer)
        scaler.update()
        plain.optimizer.step()
    assert_same(scaled, plain)
    scaled.assert_masked()
    before = [p.detach().clone() for p in scaled.parameters()]
    scaled.optimizer.zero_grad()
    scaler.scale(scaled.error(0) * float("inf") + scaled.reg()).backward()
    scaler.step(scaled.optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**11 and all(torch.equal(a, b) for a, b in zip(before, scaled.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_training_under_autocast(path, dtype):
    device = torch.get_default_device().type
    loop, exact = (loop_of(lambda p: torch.optim.AdamW(p, lr=0.02), path=path) for _ in range(2))
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8, enabled=dtype == torch.float16)
    losses = []
    for k in range(30):
        if k in (5, 10):
            for each in (loop, exact):
                each.pruner.step_to(0.4 + 0.02 * k)
        with torch.autocast(device, dtype=dtype):
            loss = loop.error(k) + loop.reg()
        loop.optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(loop.optimizer)
        scaler.update()
        losses.append((loss.item(), exact.step(k)))
        loop.assert_masked()
    assert loss.dtype == torch.float32 and all(p.dtype == torch.float32 for p in loop.parameters())
    means = [sum(column) / 5 for rows in (losses[:5], losses[-5:]) for column in zip(*rows)]
    assert means[2] < 0.8 * means[0] and means[2] == pytest.approx(means[3], rel=0.15)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_checkpointed_nets(path, reentrant):
    loop = loop_of(path=path)
    want = torch.autograd.grad(loop.error(0) + loop.reg(), loop.parameters())
    x = draw(5, 4, 3).requires_grad_()  # reentrant checkpoints need it
    output = checkpoint(loop.net, x, use_reentrant=reentrant)
    ((output - x.sum(0)[:, :2].tanh()).square().mean() + loop.reg()).backward()
    for parameter, gradient in zip(loop.parameters(), want):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


OPTIMIZERS = {
    "adam": lambda p, **how: torch.optim.Adam(p, lr=0.02, weight_decay=0.05, **how),
    "adamw": lambda p, **how: torch.optim.AdamW(p, lr=0.02, weight_decay=0.05, amsgrad=True, **how),
    "sgd": lambda p, **how: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True, **how),
}


@pytest.mark.parametrize("how", ["foreach", "fused"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_foreach_and_fused_optimizers(name, how):
    made = {"foreach": False, "fused": False} | {how: True}
    mine, its = loop_of(lambda p: OPTIMIZERS[name](p, **made)), loop_of(lambda p: OPTIMIZERS[name](p, foreach=False))
    for k in range(20):
        for loop in (mine, its):
            loop.pruner.step_to(0.4 if k < 10 else 0.7)  # the second time momentum has built up
            loop.step(k)
    assert_same(mine, its, rtol=1e-4, atol=1e-5)
    mine.assert_masked()
    assert mine.pruner.sparsity == pytest.approx(0.7, abs=0.01)


# --- copies and averages ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("by", ["deepcopy", "pickle"])
def test_a_copy_of_everything_goes_on_alike(by):
    loop = loop_of(lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1))
    for k in range(5):
        loop.step(k)
    if by == "deepcopy":
        twin = copy.deepcopy(loop)
    else:
        torch.save(loop, buffer := io.BytesIO())
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    for each in (loop, twin):
        each.pruner.step_to(0.7)  # this hooks the copies
    losses = [(loop.step(k), twin.step(k)) for k in range(5)]
    assert all(a == b for a, b in losses)
    for a, b in zip(loop.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b
    twin.assert_masked()
    before = loop.reg().item()
    with torch.no_grad():
        twin.net.rnn.weight_hh_l0.mul_(2)
    assert loop.reg().item() == before and twin.reg().item() == pytest.approx(2 * before, rel=1e-5)


@pytest.mark.parametrize(("first", "then"), [(nn.RNN, mk.SparseRNN), (mk.SparseRNN, nn.RNN)])
def test_a_run_goes_on_with_the_other_kind_of_net(first, then):
    """Model, optimizer and masks are saved from one kind and loaded strictly into the other."""
    loop = loop_of(rnn=first)
    for k in range(5):
        loop.step(k)
    torch.save([part.state_dict() for part in loop], buffer := io.BytesIO())
    buffer.seek(0)
    other = loop_of(rnn=then, sparsity=0.0)
    for part, state in zip(other, torch.load(buffer, weights_only=True)):
        part.load_state_dict(state)
    for k in range(5):
        for each in (loop, other):
            each.pruner.step_to(0.7)
            each.step(k)
    assert_same(other, loop)
    other.assert_masked()
    bare = Net(then)  # a model without masks loads the weights alone
    missing = bare.load_state_dict(loop.net.state_dict(), strict=False)
    assert not missing.missing_keys and all(key.endswith("_mask") for key in missing.unexpected_keys)
    assert torch.allclose(bare(draw(5, 4, 3)), loop.net(draw(5, 4, 3)), atol=1e-6)


def test_averages():
    """AveragedModel has the net's masks, and its averages of masked weights are 0."""
    loop, decay = loop_of(sparsity=0.0), 0.8
    average = AveragedModel(loop.net, multi_avg_fn=get_ema_multi_avg_fn(decay))
    average.update_parameters(loop.net)
    by_hand = loop.net.rnn.weight_hh_l0.detach().clone()
    for k in range(10):
        loop.pruner.step_to(0.07 * k)
        loop.step(k)
        average.update_parameters(loop.net)
        by_hand.lerp_(loop.net.rnn.weight_hh_l0.detach(), 1 - decay)
    rnn = average.module.rnn
    assert torch.equal(rnn.weight_hh_l0_mask, loop.net.rnn.weight_hh_l0_mask) and not rnn.weight_hh_l0_mask.all()
    assert torch.allclose(rnn.weight_hh_l0, by_hand * rnn.weight_hh_l0_mask, atol=1e-6)
    assert by_hand[~rnn.weight_hh_l0_mask].ne(0).any()
    x = draw(5, 4, 3)
    want = average.module.decoder(plain_rnn(rnn)(x)[0][-1])
    assert torch.allclose(average(x), want, atol=1e-6)
    for module, name in ((rnn, "weight_hh_l0"), (average.module.decoder, "weight")):
        assert getattr(module, name)[~getattr(module, f"{name}_mask")].eq(0).all()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("path", PATHS)
def test_another_weight_may_be_parametrized(path):
    mine, its = loop_of(path=path), loop_of(path=path)
    parametrize.register_parametrization(mine.net.rnn, "weight_ih_l0", Doubled())
    with torch.no_grad():
        mine.net.rnn.parametrizations.weight_ih_l0.original.div_(2)
    for loop in (mine, its):
        loop.optimizer.param_groups.clear()
        loop.optimizer.add_param_group({"params": [
            p for name, p in loop.net.named_parameters() if "weight_ih" not in name]})
    for k in range(6):
        assert mine.step(k) == pytest.approx(its.step(k), rel=1e-5)
    assert torch.allclose(mine.net.rnn.weight_hh_l0, its.net.rnn.weight_hh_l0, rtol=1e-5, atol=1e-6)
    assert torch.allclose(mine.net.rnn.parametrizations.weight_ih_l0.original.grad,
                          2 * its.net.rnn.weight_ih_l0.grad, rtol=1e-4, atol=1e-6)
    mine.assert_masked()
    assert [name for name, _ in mk.regularize(mine.net).items()] == ["rnn.weight_hh_l0"]


def test_the_plain_loop_of_the_examples(capsys):
    with torch.device("cpu"):
        history = plain_loop.train(epochs=3, batches=15, sparsity=0.75, hold=2)
    errors, penalties, sparsities = zip(*history)
    assert errors[-1] < 0.5 * errors[0] and penalties[-1] < penalties[0]
    assert sparsities == (0, 0.375, 0.75, 0.75, 0.75)
    assert capsys.readouterr().out.splitlines()[-1].endswith("sparsity 75%")
