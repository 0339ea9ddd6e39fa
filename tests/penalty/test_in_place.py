"""accumulate_penalty_grad_ against backward, and proximal_step_ against the formula of its docstring."""
from __future__ import annotations

import pytest
import torch

import moduli_kernels as mk
from moduli_kernels.penalty import in_place
from tests.support.penalty_cases import (
    BACKENDS,
    INHIBITORS,
    MANIFOLDS,
    draw_points,
    draw_weight,
    generator,
    on_device,
    penalty_and_gradients,
    relative_error,
)

pytestmark = [on_device, pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")]
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with mk.backend(request.param):
        yield request.param


def draw_mask(*shape: int, density: float = 0.1) -> torch.Tensor:
    return torch.rand(*shape, generator=generator(3)) < density


def accumulated(weight, rows, cols=None, *, before=None, points_before=None, **settings):
    """.grad of weight, rows, cols after accumulate_penalty_grad_, and the value."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (weight, rows, cols)]
    if before is not None:
        leaves[0].grad = before.clone()
    if points_before is not None:
        leaves[1].grad = points_before.clone()
    value = mk.accumulate_penalty_grad_(*leaves, **settings)
    assert not value.requires_grad
    return value, *(None if t is None else t.grad for t in leaves)


CASES = {
    "square": {"shape": (70, 70), "shared": True},
    "one_tile": {"shape": (16, 16), "shared": True},
    "rectangular": {"shape": (33, 70)},
    "blocks": {"shape": (60, 33), "blocks": 3},
    "kernels": {"shape": (9, 12, 2, 3)},
    "masked": {"shape": (33, 70), "mask": 0.1},
    "masked_square": {"shape": (40, 40), "mask": 0.1, "shared": True},
    "half_masked": {"shape": (33, 70), "mask": 0.5},
    "masked_kernels": {"shape": (9, 12, 5), "mask": 0.3},
    "nothing": {"shape": (0, 5)},
}


def make(name, dtype=torch.float32, manifold="torus"):
    case = CASES[name]
    shape, blocks = case["shape"], case.get("blocks", 1)
    points = torch.float64 if dtype == torch.float64 else torch.float32
    rows = draw_points(manifold, shape[0] // blocks, dtype=points)
    cols = None if case.get("shared") else draw_points(manifold, shape[1], 1, dtype=points)
    settings = {"manifold": MANIFOLDS[manifold], "blocks": blocks, "strength": 0.7}
    if "mask" in case:
        settings["mask"] = draw_mask(*shape, density=case["mask"])
    return draw_weight(*shape, dtype=dtype), rows, cols, settings


@pytest.mark.parametrize("dtype", CLOSE, ids=lambda d: str(d).split(".")[-1])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("has_grad", [True, False])
def test_accumulate_as_backward(case, dtype, has_grad):
    weight, rows, cols, settings = make(case, dtype)
    want = penalty_and_gradients(weight, rows, cols, **settings)
    before = draw_weight(*weight.shape, seed=9, dtype=dtype) if has_grad else None
    points_before = torch.ones_like(rows) if has_grad else None
    value, dweight, drows, dcols = accumulated(weight, rows, cols, before=before, points_before=points_before,
                                               **settings)
    assert relative_error(value, want.value) <= 1e-6
    assert relative_error(dweight, want.weight + (before if has_grad else 0)) <= CLOSE[dtype]
    assert relative_error(drows, want.rows + (points_before if has_grad else 0)) <= 1e-5
    assert (dcols is None) == (cols is None) and (cols is None or relative_error(dcols, want.cols) <= 1e-5)


@pytest.mark.parametrize("manifold", MANIFOLDS)
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_accumulate_on_every_manifold(manifold, power):
    weight, rows, _, settings = make("square", torch.float64, manifold)
    want = penalty_and_gradients(weight, rows, power=power, **settings)
    before = draw_weight(70, 70, seed=9, dtype=torch.float64)
    _, dweight, drows, _ = accumulated(weight, rows, before=before, power=power, **settings)
    assert relative_error(dweight, want.weight + before) <= 1e-12 and relative_error(drows, want.rows) <= 1e-12


@pytest.mark.parametrize("layout", ["transposed", "wide"])
def test_accumulate_into_gradients_of_other_strides(layout):
    weight, rows, _, settings = make("square")
    leaf = weight.requires_grad_()
    leaf.grad = torch.ones(70, 70).t() if layout == "transposed" else torch.ones(70, 90)[:, :70]
    into = leaf.grad
    mk.accumulate_penalty_grad_(leaf, rows, **settings)
    want = penalty_and_gradients(weight, rows, **settings)
    assert leaf.grad is into and relative_error(into, want.weight + 1) <= 1e-5


def test_accumulate_only_where_gradients_are_wanted():
    weight, rows, cols, settings = make("rectangular")
    value = mk.accumulate_penalty_grad_(weight, rows, cols.requires_grad_(), **settings)
    want = penalty_and_gradients(weight, rows, cols, **settings)
    assert weight.grad is None and rows.grad is None
    assert relative_error(cols.grad, want.cols) <= 1e-5 and relative_error(value, want.value) <= 1e-6


def test_accumulate_into_compressed_gradients():
    mask = draw_mask(40, 30)
    weight = (draw_weight(40, 30) * mask).to_sparse_csr()
    rows, cols = draw_points("torus", 40), draw_points("torus", 30, 1)
    leaf = weight.detach().requires_grad_()
    for times in (1, 2):
        mk.accumulate_penalty_grad_(leaf, rows, cols, manifold="torus")
        want = penalty_and_gradients(weight.to_dense(), rows, cols, manifold="torus", mask=mask).weight
        assert leaf.grad.layout == torch.sparse_csr
        assert in_place.can_take_in_place(leaf.grad, leaf)  # so that the second time adds in place
        assert relative_error(leaf.grad.to_dense(), times * want) <= 1e-5


def test_accumulate_into_compressed_gradients_with_indices_of_their_own():
    mask = draw_mask(40, 30)
    weight = (draw_weight(40, 30) * mask).to_sparse_csr()
    rows, cols = draw_points("torus", 40), draw_points("torus", 30, 1)
    leaf = weight.detach().requires_grad_()
    leaf.grad = weight.detach().clone()
    mk.accumulate_penalty_grad_(leaf, rows, cols, manifold="torus")
    want = penalty_and_gradients(weight.to_dense(), rows, cols, manifold="torus", mask=mask).weight + weight.to_dense()
    assert relative_error(leaf.grad.to_dense(), want) <= 1e-5


def test_accumulate_moves_the_version_counter():
    weight, rows, _, settings = make("square")
    weight.requires_grad_().grad = torch.zeros(70, 70)
    version = weight.grad._version
    mk.accumulate_penalty_grad_(weight, rows, **settings)
    assert weight.grad._version > version and weight._version == 0


def test_accumulate_refuses_what_is_no_leaf():
    weight, rows, _, settings = make("square")
    message = "weight must be a leaf to have its .grad added to, got the result of MulBackward0"
    with pytest.raises(ValueError, match=message):
        mk.accumulate_penalty_grad_(weight.requires_grad_() * 2, rows, **settings)


def proximal(weight, rows, cols=None, *, step, manifold="torus", inhibitor=None, blocks=1, mask=None, strength=1.0,
             reduction="mean"):
    """By the formula, in float64."""
    w = weight.double()
    inhibitor = inhibitor or mk.DifferenceOfGaussians()
    m = mk.manifold(manifold) if isinstance(manifold, str) else manifold
    f = inhibitor(m.distance(rows.double(), (rows if cols is None else cols).double())).repeat(blocks, 1)
    threshold = step * strength * f / (f.numel() if reduction == "mean" else 1)
    kept = torch.ones_like(w, dtype=torch.bool) if mask is None else mask
    inner = w[:1, :1].numel() if w.numel() else 1
    flat, flat_kept = w.reshape(*w.shape[:2], inner), kept.reshape(*w.shape[:2], inner)
    norm = torch.where(flat_kept, flat, 0).norm(dim=2)
    factor = torch.where(norm > 0, (1 - threshold / norm).clamp(min=0), 0)
    return torch.where(flat_kept, flat * factor[..., None], flat).reshape(w.shape)


@pytest.mark.parametrize("dtype", CLOSE, ids=lambda d: str(d).split(".")[-1])
@pytest.mark.parametrize("case", CASES)
def test_proximal_step(case, dtype):
    weight, rows, cols, settings = make(case, dtype)
    entries = max(1, weight.shape[0] * weight.shape[1])
    settings["step"] = 0.01 * entries  # thresholds about 0.5: some weights vanish
    want = proximal(weight, rows, cols, **settings)
    got = weight.clone()
    assert mk.proximal_step_(got, rows, cols, **settings) is None
    assert relative_error(got, want) <= CLOSE[dtype]
    if case == "square":
        assert 0.1 < (got == 0).float().mean() < 0.9
    if "mask" in settings:
        assert torch.equal(got[~settings["mask"]], weight[~settings["mask"]])


@pytest.mark.parametrize("inhibitor", ["dog", "diffusion", "sinusoid", "ricker", "constant", "tabulated"])
@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_proximal_step_everywhere(manifold, inhibitor):
    f, m = INHIBITORS[inhibitor], MANIFOLDS[manifold]
    weight, points = draw_weight(37, 37, dtype=torch.float64), draw_points(m, 37, dtype=torch.float64)
    want = proximal(weight, points, manifold=m, inhibitor=f, step=0.01, reduction="sum")
    mk.proximal_step_(weight, points, manifold=m, inhibitor=f, step=0.01, reduction="sum")
    assert relative_error(weight, want) <= 1e-11


@pytest.mark.parametrize("strides", ["transposed", "wide"])
def test_proximal_step_in_place_whatever_the_strides(strides):
    points = draw_points("torus", 30)
    base = draw_weight(30, 50)
    weight = base[:, :30].t() if strides == "transposed" else base[:, :30]
    want = proximal(weight, points, step=9.0, strength=0.5)
    rest = base[:, 30:].clone()
    mk.proximal_step_(weight, points, manifold="torus", step=9.0, strength=0.5)
    assert relative_error(weight, want) <= 1e-6 and torch.equal(base[:, 30:], rest)


def test_proximal_step_of_compressed_rows():
    mask = draw_mask(40, 30)
    dense, rows, cols = draw_weight(40, 30) * mask, draw_points("torus", 40), draw_points("torus", 30, 1)
    weight = dense.to_sparse_csr()
    mk.proximal_step_(weight, rows, cols, manifold="torus", step=20.0)
    assert relative_error(weight.to_dense(), proximal(dense, rows, cols, step=20.0, mask=mask)) <= 1e-5


def test_proximal_step_of_a_parameter_that_requires_grad():
    weight = torch.nn.Parameter(draw_weight(20, 20))
    version = weight._version
    mk.proximal_step_(weight, draw_points("torus", 20), manifold="torus", step=1.0)
    assert weight._version > version and weight.requires_grad and weight.is_leaf


def test_proximal_step_negative_coefficients_push_away_from_zero():
    f = mk.TabulatedInhibitor(torch.cos, 25.0)
    points = draw_points("torus", 12)
    assert (f(mk.manifold("torus").distance(points, points)) < 0).any()
    weight = draw_weight(12, 12, dtype=torch.float64)
    weight[0] = 0
    want = proximal(weight, points.double(), inhibitor=f, step=9.0)
    mk.proximal_step_(weight, points.double(), manifold="torus", inhibitor=f, step=9.0)
    assert relative_error(weight, want) <= 1e-6 and not weight[0].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_proximal_step_keeps_what_is_not_finite(bad):
    weight, points = draw_weight(20, 20), draw_points("torus", 20)
    weight[3, 4] = bad
    points[7] = float("nan")
    mk.proximal_step_(weight, points, manifold="torus", step=1.0)
    assert weight[3, 4].isnan() if bad != bad else weight[3, 4] == bad
    assert weight[7].isnan().all() and weight[:, 7].isnan().all()
    assert weight[[0, 1, 2]][:, [0, 1, 2]].isfinite().all()


@pytest.mark.parametrize("step, words", [(-1.0, "step must be >= 0, got -1.0; pass the learning rate."),
                                         (float("nan"), "step must be"), ("1", "step must be")])
def test_proximal_step_refuses(step, words):
    with pytest.raises((ValueError, TypeError), match=words.replace(".", r"\.")):
        mk.proximal_step_(draw_weight(5, 5), draw_points("torus", 5), manifold="torus", step=step)
