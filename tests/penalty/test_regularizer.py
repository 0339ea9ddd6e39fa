"""ModuliRegularizer and CoefficientRegularizer: the modules of a training loop, their controls and their
state."""
from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

import moduli_kernels as mk
from tests.support.penalty_cases import (
    BACKENDS,
    INHIBITORS,
    MANIFOLDS,
    bump,
    draw_weight,
    expected,
    generator,
    on_device,
    relative_error,
    tiled_warning,
)

pytestmark = [tiled_warning, on_device]

UNTRAINABLE = "inhibitor should not be monotone where points are trained"


@pytest.fixture(params=BACKENDS)
def either(request):
    with mk.backend(request.param):
        yield request.param


def regularizer(*args, **settings) -> mk.ModuliRegularizer:
    return mk.ModuliRegularizer(*args, generator=generator(), **settings)


# --- the penalty ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("inhibitor", INHIBITORS)
@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_is_the_penalty_of_its_settings(either, manifold, inhibitor):
    reg = regularizer(7, 9, manifold=MANIFOLDS[manifold], inhibitor=INHIBITORS[inhibitor], power=1.5,
                      blocks=2,
                      reduction="sum", strength=0.3)
    weight = draw_weight(14, 9).requires_grad_()
    value = reg(weight)
    value.backward()
    want = expected(weight, reg.rows.points, reg.cols.points, manifold=reg.manifold, inhibitor=reg.inhibitor,
                    power=1.5,
                    blocks=2, reduction="sum", strength=0.3)
    assert relative_error(value, want.value) <= 1e-6 and relative_error(weight.grad, want.weight) <= 1e-5
    assert list(reg.parameters()) == []


def test_defaults():
    reg = regularizer(5)
    assert (reg.manifold, reg.inhibitor) == (mk.FlatTorus((10.0, 10.0)), mk.DifferenceOfGaussians())
    assert (reg.power, reg.blocks, reg.reduction, reg.strength) == (1.0, 1, "mean", 1.0)
    assert reg.cols is reg.rows and not reg.rows.trainable and len(reg.rows) == 5


@pytest.mark.parametrize("shared", [True, False])
def test_trained_points(either, shared):
    reg = regularizer(8, None if shared else 6, trainable=True)
    weight = draw_weight(8, 8 if shared else 6)
    reg(weight).backward()
    want = expected(weight, reg.rows.points, None if shared else reg.cols.points, manifold="torus")
    assert relative_error(reg.rows.points.grad, want.rows) <= 1e-5
    names = [name for name, _ in reg.named_parameters()]
    assert names == (["rows.points"] if shared else ["rows.points", "cols.points"])
    if not shared:
        assert relative_error(reg.cols.points.grad, want.cols) <= 1e-5


def test_training_points_lowers_the_penalty(either):
    reg, weight = regularizer(30, trainable=True), draw_weight(30, 30)
    optimizer = torch.optim.SGD(reg.parameters(), lr=1.0)
    before = reg(weight).item()
    for _ in range(20):
        optimizer.zero_grad()
        reg(weight).backward()
        optimizer.step()
    assert reg(weight).item() < 0.98 * before


def test_mask(either):
    reg, weight = regularizer(6), draw_weight(6, 6)
    mask = weight > 0
    assert relative_error(reg(weight, mask), expected(weight, reg.rows.points, mask=mask).value) <= 1e-6


def test_strength_may_change_between_steps(either):
    reg, weight = regularizer(6), draw_weight(6, 6)
    one = reg(weight)
    reg.strength = 0.5
    assert torch.allclose(reg(weight), one / 2, rtol=1e-6)


def test_settings_of_the_points():
    reg = regularizer(5, 6, manifold="sphere", dtype=torch.float64, trainable=True)
    assert reg.rows.points.dtype == reg.cols.points.dtype == torch.float64
    assert torch.equal(reg.rows.points, regularizer(5, manifold="sphere", dtype=torch.float64).rows.points)
    assert not torch.equal(reg.rows.points, reg.cols.points[:5])
    assert regularizer(5, device="meta").rows.points.device.type == "meta"


# --- shared embeddings ------------------------------------------------------------------------------------

def test_embeddings_shared_between_layers(either):
    """Row points of layer k are column points of layer k + 1; one parameter, both gradients."""
    middle = mk.ManifoldEmbedding(6, "torus", trainable=True, generator=generator())
    first, second = regularizer(middle, 4), regularizer(5, middle)
    net = nn.ModuleList([first, second])
    assert first.rows is second.cols is middle
    assert sum(p.numel() for p in net.parameters()) == 12
    w1, w2 = draw_weight(6, 4), draw_weight(5, 6)
    (first(w1) + second(w2)).backward()
    want = (expected(w1, middle.points, first.cols.points).rows
            + expected(w2, second.rows.points, middle.points).cols)
    assert relative_error(middle.points.grad, want) <= 1e-5


def test_given_embeddings_keep_what_they_are():
    frozen = mk.ManifoldEmbedding(4, "circle")
    reg = mk.ModuliRegularizer(frozen, 3, manifold="circle", trainable=True)
    assert not reg.rows.trainable and reg.cols.trainable


def test_one_embedding_for_rows_and_cols():
    """Given for both, it counts as shared: gradients of rows and columns meet."""
    points = mk.ManifoldEmbedding(5, "torus", trainable=True, generator=generator())
    reg, weight = mk.ModuliRegularizer(points, points), draw_weight(5, 5)
    assert reg.cols is reg.rows
    reg(weight).backward()
    assert relative_error(points.points.grad, expected(weight, points.points).rows) <= 1e-5


# --- coefficients and controls ----------------------------------------------------------------------------

@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_coefficients(manifold):
    reg = regularizer(5, 8, manifold=MANIFOLDS[manifold], inhibitor=mk.Sinusoid(), trainable=True)
    d = MANIFOLDS[manifold].distance(reg.rows.points, reg.cols.points)
    got = reg.coefficients()
    assert got.shape == (5, 8) and not got.requires_grad
    assert torch.allclose(got, mk.Sinusoid()(d), rtol=1e-5, atol=1e-5)
    assert torch.equal(regularizer(5).coefficients(), regularizer(5).coefficients().T)


@pytest.mark.parametrize("settings",
                         [{}, {"reduction": "sum", "strength": 0.2}, {"power": 2.0}, {"blocks": 3}], ids=str)
def test_coefficients_say_what_the_penalty_costs(settings):
    """The same penalty, entry by entry: a CoefficientRegularizer of the coefficients."""
    reg = regularizer(6, 7, **settings)
    weight = draw_weight(reg.blocks * 6, 7)
    dense = mk.CoefficientRegularizer(reg.coefficients().repeat(reg.blocks, 1), reg.power, reg.reduction,
                                      reg.strength)
    assert relative_error(dense(weight), reg(weight).double()) <= 1e-6


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("power", [1.0, 2.5])
def test_matched_is_a_constant_of_equal_mean(blocks, power):
    reg = regularizer(20, 30, power=power, blocks=blocks, reduction="sum", strength=0.3)
    control = reg.matched()
    assert control.coefficients.dim() == 0
    assert float(control.coefficients) == pytest.approx(float(reg.coefficients().double().mean()), rel=1e-6)
    assert (control.power, control.reduction, control.strength) == (power, "sum", 0.3)
    ones = torch.ones(blocks * 20, 30)
    assert relative_error(control(ones), reg(ones).double()) <= 1e-6


@pytest.mark.parametrize("blocks", [1, 4])
def test_shuffled_is_the_same_coefficients_elsewhere(blocks):
    reg = regularizer(20, 30, blocks=blocks)
    control, again, other = (reg.shuffled(generator(seed)) for seed in (1, 1, 2))
    assert control.coefficients.shape == (blocks * 20, 30)
    for block in control.coefficients.chunk(blocks):
        assert torch.equal(block.flatten().sort().values, reg.coefficients().flatten().sort().values)
        assert torch.equal(block, control.coefficients[:20])
    moved = (control.coefficients[:20] != reg.coefficients()).float().mean()
    assert moved > 0.95
    assert torch.equal(control.coefficients, again.coefficients)
    assert not torch.equal(control.coefficients, other.coefficients)
    ones = torch.ones(blocks * 20, 30)
    assert relative_error(control(ones), reg(ones).double()) <= 1e-6


def test_controls_do_not_follow_the_points():
    reg = regularizer(6, trainable=True)
    control = reg.shuffled(generator())
    before = control.coefficients.clone()
    with torch.no_grad():
        reg.rows.points.add_(1.3)
    assert torch.equal(control.coefficients, before) and list(control.parameters()) == []


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_coefficient_regularizer(power, reduction):
    """strength * sum or mean of c_ij |w_ij|^l, its gradient, and the L2 norm over kernels."""
    c, weight = draw_weight(4, 5, seed=3).abs(), draw_weight(4, 5, 2, 3, dtype=torch.float64)
    reg = mk.CoefficientRegularizer(c, power, reduction, 0.7)
    want = 0.7 * (c.double() * weight.square().sum((2, 3)).sqrt() ** power).sum() / (20 if reduction == "mean"
                                                                                     else 1)
    assert reg(weight).dtype == torch.float64 and relative_error(reg(weight), want) <= 1e-12
    flat = weight[:, :, 0, 0].float().requires_grad_()
    reg(flat).backward()
    gradient = 0.7 * c * power * flat.abs() ** (power - 1) * flat.sign() / (20 if reduction == "mean" else 1)
    assert torch.allclose(flat.grad, gradient, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_coefficient_regularizer_in_16_bits(dtype):
    """Summed in float32: 66 * 300 * 300 is beyond float16."""
    weight = torch.ones(300, 300, dtype=dtype).requires_grad_()
    value = mk.CoefficientRegularizer(torch.tensor(66.0), reduction="sum")(weight)
    value.backward()
    assert value.dtype == torch.float32 and value.item() == 66.0 * 90_000
    assert weight.grad.dtype == dtype and bool((weight.grad == 66).all())


def test_coefficient_regularizer_of_zero_kernels_has_finite_gradients():
    weight = torch.zeros(3, 4, 2, requires_grad=True)
    mk.CoefficientRegularizer(torch.ones(3, 4))(weight).backward()
    assert torch.equal(weight.grad, torch.zeros(3, 4, 2))


def test_coefficient_regularizer_of_nothing():
    assert float(mk.CoefficientRegularizer(torch.ones(0, 4))(torch.ones(0, 4))) == 0


# --- state ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("trainable", [False, True])
def test_state_dict_round_trip(trainable):
    saved = regularizer(5, 4, trainable=trainable)
    other = mk.ModuliRegularizer(5, 4, trainable=trainable, generator=generator(1))
    assert not torch.equal(saved.rows.points, other.rows.points)
    buffer = io.BytesIO()
    torch.save(saved.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    weight = draw_weight(5, 4)
    assert torch.equal(saved(weight), other(weight))


def test_safetensors_round_trip(tmp_path):
    """Points, shared ones too, and the settings, all of which are tensors in the state dict."""
    saved = regularizer(5, trainable=True)
    other = mk.ModuliRegularizer(5, trainable=True, generator=generator(1))
    save_model(saved, str(tmp_path / "model.safetensors"))
    load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(saved.rows.points, other.rows.points)
    different = mk.ModuliRegularizer(5, trainable=True, power=2.0)
    with pytest.raises(ValueError, match="power of the saved regularizer must equal this one's 2.0, got 1.0"):
        load_model(different, str(tmp_path / "model.safetensors"))


TABLE = mk.TabulatedInhibitor(bump, 8.0, 64)
OTHER_TABLE = mk.TabulatedInhibitor(lambda d: bump(d) + 1e-9, 8.0, 64)


@pytest.mark.parametrize("saved,mine,message", [
    ({"manifold": "torus"}, {"manifold": "klein"},
     "manifold of the saved regularizer must equal this one's 'KleinBottle(width=10.0, height=10.0)', got "
     "'FlatTorus(periods=(10.0, 10.0))'; build the regularizer with the saved setting."),
    ({"inhibitor": mk.Sinusoid()}, {"inhibitor": mk.Sinusoid(mu=3.0)},
     "inhibitor of the saved regularizer must equal this one's 'Sinusoid(c=10.0, mu=3.0)', got "
     "'Sinusoid(c=10.0, mu=2.0)'; build the regularizer with the saved setting."),
    ({"power": 1.0}, {"power": 1.5},
     "power of the saved regularizer must equal this one's 1.5, got 1.0; build the regularizer with the "
     "saved setting."),
], ids=["manifold", "inhibitor", "power"])
def test_refuses_the_state_of_another(saved, mine, message):
    points = torch.zeros(3, 2)
    one = mk.ModuliRegularizer(mk.ManifoldEmbedding(3, saved.get("manifold", "torus"), points=points),
                               **saved)
    other = mk.ModuliRegularizer(mk.ManifoldEmbedding(3, mine.get("manifold", "torus"), points=points),
                                 **mine)
    with pytest.raises(ValueError) as error:
        other.load_state_dict(one.state_dict())
    assert str(error.value) == message


def test_refuses_another_table():
    """Tables print alike; a digest of their values tells them apart."""
    one, same = (mk.ModuliRegularizer(3, inhibitor=f) for f in (TABLE, mk.TabulatedInhibitor(bump, 8.0, 64)))
    other = mk.ModuliRegularizer(3, inhibitor=OTHER_TABLE)
    same.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="inhibitor of the saved regularizer must equal"):
        other.load_state_dict(one.state_dict())


def test_strength_is_state_and_blocks_are_not():
    """Blocks follow from the weight."""
    one, other = regularizer(3, strength=1.0), mk.ModuliRegularizer(3, strength=2.0, blocks=2)
    other.load_state_dict(one.state_dict())
    assert (other.strength, other.blocks) == (1.0, 2)


@pytest.mark.parametrize("inhibitor", INHIBITORS)
def test_deepcopy_and_pickle(inhibitor):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", UNTRAINABLE)
        reg = regularizer(5, inhibitor=INHIBITORS[inhibitor], trainable=True, power=1.5, strength=0.4)
    weight = draw_weight(5, 5)
    value = reg(weight)
    for copied in (copy.deepcopy(reg), pickle.loads(pickle.dumps(reg))):
        assert torch.equal(copied(weight), value) and copied.inhibitor == reg.inhibitor
        assert copied.cols is copied.rows and copied.rows is not reg.rows
        with torch.no_grad():
            copied.rows.points.add_(1.0)
        assert torch.equal(reg(weight), value)
    control = reg.shuffled(generator())
    assert torch.equal(pickle.loads(pickle.dumps(control))(weight), control(weight))


def test_moves_as_modules_do():
    reg = regularizer(5, 4, trainable=True).double()
    assert reg.rows.points.dtype == torch.float64
    assert reg(draw_weight(5, 4, dtype=torch.float64)).dtype == torch.float64
    assert regularizer(5).to("meta").rows.points.device.type == "meta"
    half = regularizer(5).half()  # a model moved to float16 as a whole
    assert half(draw_weight(5, 5, dtype=torch.float16)).dtype == torch.float32


def test_what_is_printed():
    assert repr(regularizer(3)) == (
        "ModuliRegularizer(\n"
        "  FlatTorus(periods=(10.0, 10.0)), DifferenceOfGaussians(c=100.0, sigma1=0.25, sigma2=5.0, "
        "zero_min=True), power=1.0, blocks=1, reduction='mean', strength=1.0, cols=rows\n  (rows): "
        "ManifoldEmbedding(3, FlatTorus(periods=(10.0, 10.0)), trainable=False)\n)")
    assert repr(mk.CoefficientRegularizer(torch.ones(2, 3), 2.0)) == (
        "CoefficientRegularizer(coefficients=(2, 3), power=2.0, reduction='mean', strength=1.0)")


# --- the untrainable warning ------------------------------------------------------------------------------

MONOTONE_TABLE = mk.TabulatedInhibitor(lambda d: 1 - torch.exp(-d), 8.0, 64)


@pytest.mark.parametrize("inhibitor", [mk.Diffusion(), mk.Constant(2.0), MONOTONE_TABLE], ids=repr)
def test_warns_of_an_untrainable_inhibitor(inhibitor):
    message = (f"inhibitor should not be monotone where points are trained, got {inhibitor}: every neuron "
               "is drawn to one point (or none moves) and the penalty becomes plain L_l; use "
               "DifferenceOfGaussians, Sinusoid or RickerWavelet, or frozen points.")
    trained = mk.ManifoldEmbedding(3, "torus", trainable=True)
    for make in (lambda: mk.ModuliRegularizer(3, inhibitor=inhibitor, trainable=True),
                 lambda: mk.ModuliRegularizer(trained, inhibitor=inhibitor),
                 lambda: mk.ModuliRegularizer(4, trained, inhibitor=inhibitor)):
        with pytest.warns(UserWarning) as caught:
            make()
        assert [str(w.message) for w in caught] == [message]
        assert caught[0].filename == __file__  # it points at the caller's line


@pytest.mark.parametrize("inhibitor", [None, mk.Sinusoid(), mk.RickerWavelet(), TABLE, bump],
                         ids=lambda inhibitor: "callable" if inhibitor is bump else repr(inhibitor))
def test_no_warning_without_need(inhibitor):
    mk.ModuliRegularizer(3, inhibitor=inhibitor, trainable=True)
    mk.ModuliRegularizer(3, inhibitor=mk.Diffusion())


def test_a_training_loop(either):
    """The README's: task loss plus penalty lowers W where f is high, and leaves nothing behind between
    steps."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 40, bias=False)
    reg = regularizer(40, strength=0.05)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    x = draw_weight(64, 40)
    target = x @ draw_weight(40, 40, seed=4).T / 10
    first = None
    for _ in range(30):
        optimizer.zero_grad()
        penalty = reg(layer.weight)
        first = first or penalty.item()
        ((layer(x) - target).square().mean() + penalty).backward()
        optimizer.step()
    costly = reg.coefficients() > 60
    assert reg(layer.weight).item() < first
    assert layer.weight[costly].abs().mean() < layer.weight[~costly].abs().mean()
    assert math.isfinite(penalty.item())
