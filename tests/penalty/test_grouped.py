"""The penalties of several weights in one call: those of single calls, whatever serves them; Regularization uses it."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moduli_kernels as mk
from moduli_kernels.penalty import grouped
from moduli_kernels.penalty.function import checked
from tests.support.penalty_cases import (
    INHIBITORS,
    KERNELS,
    draw_points,
    draw_weight,
    needs_kernels,
    on_device,
    relative_error,
)

pytestmark = [on_device, needs_kernels]


@pytest.fixture(autouse=True)
def kernels():
    """Those that are put to the test."""
    with mk.backend(KERNELS):
        yield


def layer(weight: Tensor, rows: Tensor, cols: Tensor | None = None, *, manifold="torus", inhibitor=None, power=1.0,
          blocks=1, reduction="mean", strength=1.0) -> grouped.Layer:
    what, rows, cols = checked(weight, rows, cols, manifold, inhibitor, power, blocks, None, reduction, strength)
    return grouped.Layer(weight, rows, cols, what)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def check(layers: list[tuple[tuple[Tensor, ...], dict]], factors: list[float] | None = None, tolerance: float = 1e-6,
          **common) -> None:
    """Sum, values and gradients of calls (tensors, settings) are those of single calls. factors: the loss is the sum of
    the values times them; None: the total."""
    common = {"manifold": "torus"} | common
    leaves = list({id(t): t for tensors, _ in layers for t in tensors if t is not None and t.requires_grad}.values())

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, leaves)) if leaves else []

    singles = [mk.moduli_penalty(*tensors, **settings, **common) for tensors, settings in layers]
    weights = [1.0] * len(layers) if factors is None else factors
    wanted = gradients(sum(f * single for f, single in zip(weights, singles)))
    total, values = grouped.penalties([layer(*tensors, **settings, **common) for tensors, settings in layers])
    assert total.shape == () and values.shape == (len(layers),) and total.dtype == values.dtype == singles[0].dtype
    assert total.requires_grad == values.requires_grad == bool(leaves)
    assert relative_error(values, torch.stack(singles)) <= tolerance
    assert relative_error(total, torch.stack(singles).double().sum()) <= tolerance
    loss = total if factors is None else sum(f * value for f, value in zip(factors, values))
    for got, want in zip(gradients(loss), wanted):
        assert got.dtype == want.dtype and relative_error(got, want) <= (tolerance if got.dtype.itemsize > 2 else 4e-3)


def three(trained: bool = True, dtype: torch.dtype = torch.float32, manifold="torus"):
    points_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for seed, n in enumerate((33, 16, 40)):
        points = draw_points(manifold, n, seed, points_dtype)
        yield (leaf(draw_weight(n, n, seed=seed, dtype=dtype)), leaf(points) if trained else points), {}


@pytest.mark.parametrize("factors", [None, [1.0, -2.0, 0.5]], ids=["total", "values"])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_like_single_calls(dtype, trained, factors):
    check(list(three(trained, dtype)), factors)


@pytest.mark.parametrize("name", [name for name in INHIBITORS if name != "callable"])
def test_inhibitors(name):
    check(list(three(manifold="mixed")), manifold="mixed", inhibitor=INHIBITORS[name], power=1.5, tolerance=1e-5)


def test_shapes_and_settings_differ():
    """Gates, convolutions, rectangles, strides, reductions and strengths in one call."""
    rows, cols = leaf(draw_points("torus", 12, 1)), leaf(draw_points("torus", 21, 2))
    check([
        ((leaf(draw_weight(12, 21)), rows, cols), {"strength": 0.3}),
        ((leaf(draw_weight(36, 12)), rows), {"blocks": 3, "reduction": "sum"}),
        ((leaf(draw_weight(12, 21, 3)), rows, cols), {}),
        ((leaf(draw_weight(12, 40))[:, 19:], rows, cols), {"strength": 2.0}),
        ((leaf(draw_weight(21, 12)).T, rows, cols), {}),
    ], [1.0, 0.1, 2.0, 3.0, -1.0])


def test_shared_embeddings():
    """The row points of a layer are the column points of the next."""
    a, b, c = (leaf(draw_points("torus", n, n)) for n in (10, 20, 30))
    check([((leaf(draw_weight(20, 10)), b, a), {}), ((leaf(draw_weight(30, 20)), c, b), {}),
           ((leaf(draw_weight(20, 20)), b), {})])


def test_tied_weights():
    weight, points = leaf(draw_weight(20, 20)), leaf(draw_points("torus", 20))
    check([((weight, points), {}), ((weight, points), {"strength": 3.0}), ((weight, draw_points("torus", 20, 5)), {})])


def test_frozen_and_trained():
    """What needs no gradient gets none: weights alone, points alone, one side of them, nothing."""
    rows, cols = (draw_points("torus", n, n) for n in (14, 9))
    weight = draw_weight(14, 9)
    check([((leaf(weight), rows, cols), {}), ((weight, leaf(rows), cols), {}), ((weight, rows, leaf(cols)), {}),
           ((weight, rows, cols), {}), ((leaf(weight), leaf(rows), leaf(cols)), {})], [1.0, 2.0, 3.0, 4.0, 5.0])


def test_no_gradient():
    layers = [((weight.detach(), points.detach()), settings) for (weight, points), settings in three()]
    check(layers)
    with torch.no_grad():
        assert not grouped.penalties([layer(*tensors) for tensors, _ in three()])[0].requires_grad


def test_a_layer_without_entries():
    empty = leaf(torch.empty(0, 0)), leaf(torch.empty(0, 2))
    check([*three(), (empty, {})])
    check([(empty, {}), (empty, {})])


def test_many_layers():
    """More than a launch takes."""
    check([((leaf(draw_weight(9 + i, 7, seed=i)), leaf(draw_points("torus", 9 + i, i)),
             leaf(draw_points("torus", 7, 50 + i))), {"strength": 1.0 + i}) for i in range(11)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_repeated_backward(dtype):
    layers = [tensors for tensors, _ in three(dtype=dtype)]
    leaves = [t for tensors in layers for t in tensors]
    total, values = grouped.penalties([layer(*tensors) for tensors in layers])
    loss = 2 * total + 3 * values[1]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    assert all(relative_error(b, a) <= (1e-6 if a.dtype.itemsize > 2 else 4e-3) for a, b in zip(first, again))
    total, values = grouped.penalties([layer(*tensors) for tensors in layers])
    assert torch.autograd.grad(values[1], leaves, allow_unused=True)[2].any()


def test_no_second_derivative():
    (weight, points), _ = next(three())
    total, _ = grouped.penalties([layer(weight, points), layer(weight, points)])
    gradient, = torch.autograd.grad(total, weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("need_points", [True, False])
def test_opcheck(need_points):
    layers = [layer(*(t.detach() for t in tensors)) for tensors, _ in three()]
    run = grouped.OpRunner(layers)
    weights, rows, cols, _ = zip(*layers)
    arguments, needs = run.arguments((*weights, *rows, *cols)), ([True, False, True], [need_points] * 3)
    ops = torch.ops.moduli_kernels
    torch.library.opcheck(ops.penalties_with_grads.default, (*arguments, *needs))
    torch.library.opcheck(ops.penalties_grads.default, (torch.rand(3), *arguments, *needs))
    torch.library.opcheck(ops.scale_penalties_grads_.default, ([torch.rand(4), torch.rand(5)], torch.rand(3), [2, 0]))


# --- Regularization -----------------------------------------------------------------------------------------

def model() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([nn.LSTM(3, 9, num_layers=2), nn.GRU(4, 12, bidirectional=True), nn.RNNCell(3, 7)])


@pytest.fixture
def calls(monkeypatch):
    """How many weights each shared call had; the kernels that share launches are taken to serve this device."""
    made: list[int] = []
    penalties = grouped.penalties
    monkeypatch.setattr(grouped, "penalties", lambda layers: made.append(len(layers)) or penalties(layers))
    monkeypatch.setattr(grouped.backends, "active", lambda device: "triton")
    return made


def gradients(loss: Tensor, *modules: nn.Module) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, [p for m in modules for p in m.parameters()], allow_unused=True))


def assert_same(got: list[Tensor | None], want: list[Tensor | None]) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None) and (a is None or relative_error(a, b) <= 1e-6)


@pytest.mark.parametrize("trainable", [True, False])
def test_regularization(calls, monkeypatch, trainable):
    net = model()
    reg = mk.regularize(net, trainable=trainable, strength=0.1)
    total, losses = reg(), reg.losses()
    assert calls == [5, 5] and list(losses) == [name for name, _ in reg.items()]
    shared = gradients(3 * total, net, reg), gradients(losses["0.weight_hh_l1"] * 2, net, reg)
    monkeypatch.setattr(grouped, "share_launches", lambda *_: False)
    one_by_one = reg()
    assert calls == [5, 5] and relative_error(total, one_by_one) <= 1e-6
    assert_same(shared[0], gradients(3 * one_by_one, net, reg))
    for name, loss in reg.losses().items():
        assert losses[name].shape == () and relative_error(losses[name], loss) <= 1e-6
    alone = gradients(reg.losses()["0.weight_hh_l1"] * 2, net, reg)
    assert_same([g for g in shared[1] if g is not None and g.any()], [g for g in alone if g is not None])


def test_one_by_one(calls, monkeypatch):
    """Other kernels, one weight, controls, compute dtypes and settings that differ, what only PyTorch knows."""
    net = model()
    one, two_dtypes = nn.RNN(3, 5), nn.ModuleList([nn.RNN(3, 5), nn.RNN(3, 5, dtype=torch.float64)])
    mk.regularize(one)()
    mk.regularize(net).matched()()
    mk.regularize(two_dtypes)()
    mixed = mk.regularize(net)
    mixed.regularizers["2_weight_hh"].power = 2.0
    mixed()
    hooked, seen = mk.regularize(net), []
    hooked.regularizers["2_weight_hh"].register_forward_hook(lambda *_: seen.append(1))
    hooked()
    assert calls == [] and seen == [1]
    monkeypatch.setattr(grouped.backends, "active", lambda device: "reference")
    mk.regularize(net)()
    assert calls == []


def test_errors_are_those_of_single_calls(calls):
    net = model()
    reg = mk.regularize(net)
    net[2].weight_hh = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match="weight must have shape"):
        reg()
