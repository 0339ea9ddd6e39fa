"""Regularizer, pruner and SparseRNN among what training loops are made of: accumulation, loss scales, autocast,
checkpointing, optimizers' implementations, copies, averages, parametrizations, TensorBoard; the plain loop of the
examples; and what earlier releases saved."""
from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from data import make_release_file as saved
from penalty_cases import generator, on_device
from rnn_cases import PATHS, draw, plain_rnn, quiet, weight_names
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import moduli_kernels as mk
from examples import plain_loop
from moduli_kernels import plots
from moduli_kernels.histograms import add_histograms, kept_by_distance

pytestmark = [on_device, *quiet]


class Net(nn.Module):
    """(steps, batch, 3) -> (batch, 2)."""

    def __init__(self, rnn: type[nn.RNN] = mk.SparseRNN, dtype: torch.dtype = torch.float32, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.decoder = rnn(3, 8, dtype=dtype, **settings), nn.Linear(8, 2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.rnn(x)[0][-1])


class Loop(NamedTuple):
    """What a training loop holds; they are copied and pickled together."""

    net: Net
    reg: mk.Regularization
    optimizer: torch.optim.Optimizer
    pruner: mk.MagnitudePruner

    def parameters(self) -> list[nn.Parameter]:
        return [*self.net.parameters(), *self.reg.parameters()]

    def targets(self) -> list[tuple[nn.Module, str]]:
        return [(self.net.rnn, "weight_hh_l0"), (self.net.decoder, "weight")]

    def error(self, k: int, batch: slice = slice(None)) -> Tensor:
        """Mean square over the batch, of the k-th step's data."""
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
    """GradScaler: a power of two changes no gradient, and unscaled ones are clipped as without it."""
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
        if not fused:  # fused optimizers unscale in their step
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
            loop.pruner.step_to(0.4 if k < 10 else 0.7)  # cut with momentum built up
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
        each.pruner.step_to(0.7)  # hooks the copies
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
    """Model and optimizer, saved in one and loaded strictly into the other; masks as well."""
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
    bare = Net(then)  # a model without masks takes the weights alone
    missing = bare.load_state_dict(loop.net.state_dict(), strict=False)
    assert not missing.missing_keys and all(key.endswith("_mask") for key in missing.unexpected_keys)
    assert torch.allclose(bare(draw(5, 4, 3)), loop.net(draw(5, 4, 3)), atol=1e-6)


def test_averages():
    """AveragedModel copies buffers, so masks are the net's. What its average keeps at a masked weight counts as 0."""
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
    assert torch.allclose(rnn.weight_hh_l0, by_hand, atol=1e-6) and rnn.weight_hh_l0[~rnn.weight_hh_l0_mask].ne(0).any()
    x = draw(5, 4, 3)
    want = average.module.decoder(plain_rnn(rnn)(x)[0][-1])
    assert torch.allclose(average(x), want, atol=1e-6)
    mk.MagnitudePruner([(rnn, "weight_hh_l0"), (average.module.decoder, "weight")])  # sets them to 0
    assert rnn.weight_hh_l0[~rnn.weight_hh_l0_mask].eq(0).all()


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


# --- kept connections by distance, in TensorBoard -----------------------------------------------------------------

@pytest.mark.parametrize("case", ["mask", "weight", "blocks", "columns", "kernel"])
def test_kept_by_distance_is_a_brute_force_histogram(case):
    rows, cols, blocks, bins = 300, 40 if case in ("columns", "kernel") else 300, 3 if case == "blocks" else 1, 12
    m = mk.manifold("sphere")
    points, others = (m.sample(n, generator=generator(n), dtype=torch.float64) for n in (rows, cols))
    others = points if rows == cols else others
    d = m.distance(points, others).repeat(blocks, 1)
    weight = torch.where(d < 4, draw(blocks * rows, cols, dtype=torch.float64), 0)
    weight[:5] = 0
    mask = {"mask": weight != 0, "kernel": weight[:, :, None] * torch.tensor([0, 1.0, 0])}.get(case, weight)
    got = kept_by_distance(mask, points, m, cols=None if rows == cols else others, bins=bins, blocks=blocks)
    pairs, edges = np.histogram(d.cpu(), bins, (0, d.max().item()))
    kept = np.histogram(d[weight != 0].cpu(), bins, (0, d.max().item()))[0]
    assert np.allclose(got.edges, edges) and got.counts.tolist() == pairs.tolist()
    assert np.array_equal((got.fraction * got.counts).round(), kept) and 0.1 < kept.sum() / pairs.sum() < 0.4


def test_kept_by_distance_is_what_the_plot_draws():
    m, points = mk.manifold("torus"), mk.manifold("torus").sample(70, generator=generator())
    mask = m.distance(points, points) < 2.5
    got = kept_by_distance(mask, points, "torus", bins=9)
    drawn = plots.plot_kept_against_distance(mask, points, m, mk.DifferenceOfGaussians(), bins=9).lines[0].get_data()
    enough = got.counts >= plots.MIN_PAIRS
    assert enough.sum() > 5 and np.allclose((got.edges[1:] + got.edges[:-1]) / 2, drawn[0])
    assert np.array_equal(got.fraction[enough], drawn[1][enough])


def test_nothing_as_large_as_the_weight_is_made():
    class Line(mk.Euclidean):
        largest = 0

        def squared_distance(self, x, y):
            Line.largest = max(Line.largest, len(x) * len(y))
            return super().squared_distance(x, y)

    points = 10 * torch.rand(1500, 1, generator=generator())
    kept_by_distance(torch.ones(1500, 1500, dtype=torch.bool), points, Line(1))
    assert 0 < Line.largest <= 256 * 1500


def test_a_bin_without_connections_has_no_fraction():
    got = kept_by_distance(torch.eye(2) > 0, torch.tensor([[0.0], [3.0]]), mk.Euclidean(1), bins=4)
    assert got.counts.tolist() == [2, 0, 0, 2] and got.edges.tolist() == [0, 0.75, 1.5, 2.25, 3]
    assert got.fraction[[0, 3]].tolist() == [1, 0] and got.fraction[1:3].isnan().all()


@pytest.mark.parametrize(("mask", "settings", "error", "message"), [
    ([[1]], {}, TypeError, "mask must be a tensor (rows, columns), got a list"),
    (torch.ones(4), {}, ValueError, "mask must have shape (blocks*R, C) with blocks=1"),
    (torch.ones(4, 4), {"blocks": 3}, ValueError, "mask must have shape (blocks*R, C) with blocks=3"),
    (torch.ones(4, 5), {}, ValueError, "cols must be the points of the 5 columns, got None"),
    (torch.ones(5, 5), {}, ValueError, "points must have shape (5, 2)"),
    (torch.ones(4, 4), {"bins": 0}, ValueError, "bins must be an integer of at least 1, got 0"),
    (torch.eye(4).to_sparse(), {}, TypeError, "mask must be dense, got torch.sparse_coo; pass mask.to_dense()."),
])
def test_kept_by_distance_refuses(mask, settings, error, message):
    with pytest.raises(error, match=re.escape(message)):
        kept_by_distance(mask, torch.rand(4, 2), "torus", **settings)


def test_tensorboard_histograms(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    net = nn.ModuleDict({"gru": nn.GRU(3, 20), "rnn": mk.SparseRNN(20, 20)})
    reg, pruner = mk.regularize(net), mk.MagnitudePruner([(net["rnn"], "weight_hh_l0")])
    pruner.step_to(0.8)
    with torch.no_grad():
        net["rnn"].weight_hh_l0.fill_(1)  # the mask counts, not what stands there
    with SummaryWriter(str(tmp_path)) as writer:
        add_histograms(writer, reg, 7, pruner=pruner, bins=5)
        with pytest.raises(TypeError, match="got a CoefficientRegularizer for gru.weight_hh_l0; pass the"):
            add_histograms(writer, reg.matched(), 8)
    events = EventAccumulator(str(tmp_path), size_guidance={HISTOGRAMS: 0}).Reload()
    assert sorted(events.Tags()["histograms"]) == [
        f"kept {what} by distance/{name}.weight_hh_l0" for what in ("connections", "share") for name in ("gru", "rnn")]
    (number,) = events.Histograms("kept connections by distance/rnn.weight_hh_l0")
    (share,) = events.Histograms("kept share by distance/rnn.weight_hh_l0")
    points = dict(reg.items())["rnn.weight_hh_l0"].rows.points
    want = kept_by_distance(net["rnn"].weight_hh_l0_mask, points, "torus", bins=5)
    assert number.step == 7 and sum(number.histogram_value.bucket) == 80  # 20 % of 400
    assert number.histogram_value.bucket_limit == want.edges[1:].tolist()
    assert share.histogram_value.bucket == want.fraction.tolist()
    (gates,) = events.Histograms("kept connections by distance/gru.weight_hh_l0")
    assert sum(gates.histogram_value.bucket) == gates.histogram_value.num == 3 * 400
    assert events.Scalars("sparsity")[0].value == pytest.approx(0.8)


def test_the_plain_loop_of_the_examples(capsys):
    with torch.device("cpu"):
        history = plain_loop.train(epochs=3, batches=15, sparsity=0.75, hold=2)
    errors, penalties, sparsities = zip(*history)
    assert errors[-1] < 0.5 * errors[0] and penalties[-1] < penalties[0]
    assert sparsities == (0, 0.375, 0.75, 0.75, 0.75)
    assert capsys.readouterr().out.splitlines()[-1].endswith("sparsity 75%")


# --- what earlier releases saved ----------------------------------------------------------------------------------

RELEASES = sorted(Path(__file__).with_name("data").glob("release_*.pt"))


@pytest.mark.parametrize("file", [*RELEASES, None], ids=lambda file: file.stem if file else "this one")
def test_what_a_release_saved_loads_and_computes_the_same(file, tmp_path):
    if file is None:
        torch.save(saved.state(), file := tmp_path / f"release_{mk.__version__}.pt")
    state = torch.load(file, weights_only=True, map_location=torch.get_default_device())
    assert file.name == f"release_{state['version']}.pt" and file.stat().st_size < 50_000
    torch.manual_seed(1)  # other points and weights than the saved ones, before they are loaded
    made, rnns = saved.regularizers(), saved.nets()
    assert state["regularizers"].keys() <= made.keys() and state["nets"].keys() <= rnns.keys()
    for name, expected in state["penalties"].items():
        weight = saved.weight_for(made[name], state["weight"])
        drawn = made[name](weight).item()
        made[name].load_state_dict(state["regularizers"][name])
        assert made[name](weight).item() == pytest.approx(expected, rel=1e-5)
        assert name == "constant" or drawn != pytest.approx(expected, rel=1e-5)
    for name, net in rnns.items():
        net.load_state_dict(state["nets"][name])
        output = net(state["x"])[0] if name == "rnn" else net(state["x"][0])
        assert torch.allclose(output, state["outputs"][name], atol=1e-5)
    assert not rnns["rnn"].weight_hh_l0_mask.all() and not rnns["cell"].weight_hh_mask.all()
    assert all(not getattr(rnns["rnn"], name)[~getattr(rnns["rnn"], f"{name}_mask")].any()
               for name in weight_names(rnns["rnn"]) if "hh" in name)
    (tmp_path / "rnn.safetensors").write_bytes(bytes(state["compressed"].tolist()))
    small = mk.CompressedRNN.load(tmp_path / "rnn.safetensors", torch.get_default_device())
    assert torch.allclose(small(state["x"])[0], state["outputs"]["rnn"], atol=1e-5)
    model = nn.ModuleDict({"rnn": nn.RNN(3, saved.N), "head": nn.Linear(saved.N, 2)})
    pruner = mk.MagnitudePruner([(model["rnn"], "weight_hh_l0")])
    reg = mk.regularize(model, targets=[(model["rnn"], "weight_hh_l0"), (model["head"], "weight")])
    for part, key in ((model, "model"), (pruner, "pruner"), (reg, "regularization")):
        part.load_state_dict(state[key])
    assert reg().item() == pytest.approx(state["penalty"], rel=1e-5) and pruner.sparsity == 0.5
