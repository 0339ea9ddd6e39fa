"""moduli_penalty: value and gradients against the float64 reference and against loops; what it accepts and
returns."""
from __future__ import annotations

import math
import mmap

import numpy as np
import pytest
import torch

import moduli_kernels as mk
from tests.support.penalty_cases import (
    BACKENDS,
    DEVICE,
    INHIBITORS,
    KERNELS,
    MANIFOLDS,
    POWERS,
    TOLERANCE,
    VARIANTS,
    assert_close,
    bump,
    draw_points,
    draw_weight,
    expected,
    generator,
    needs_kernels,
    on_a_grid,
    on_device,
    penalty_and_gradients,
    relative_error,
    tiled_warning,
)

pytestmark = [tiled_warning, on_device]


@pytest.fixture
def kernels():
    """By force: nothing here passes because the fallback ran."""
    with mk.backend(KERNELS):
        yield


@pytest.fixture(params=BACKENDS)
def either(request):
    with mk.backend(request.param):
        yield request.param


# --- accuracy ---------------------------------------------------------------------------------------------

@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("inhibitor", INHIBITORS)
@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_accuracy(kernels, manifold, inhibitor, power, dtype):
    weight = draw_weight(37, 53, dtype=dtype)
    rows, cols = draw_points(manifold, 37, 1, dtype), draw_points(manifold, 53, 2, dtype)
    settings = {"manifold": MANIFOLDS[manifold], "inhibitor": INHIBITORS[inhibitor], "power": power}
    assert_close(penalty_and_gradients(weight, rows, cols, **settings),
                 expected(weight, rows, cols, **settings),
                 *TOLERANCE[dtype])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("inhibitor", INHIBITORS)
@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_accuracy_16_bit(kernels, manifold, inhibitor, power, dtype):
    """At most 2 x (value) and 3 x (gradients) the error of the plain formula computed in that dtype; and, as
    the sums are float32 inside, a value of float32 accuracy and gradients off by their one rounding."""
    f, m = INHIBITORS[inhibitor], MANIFOLDS[manifold]
    leaves = [t.requires_grad_() for t in (draw_weight(37, 53, dtype=dtype), draw_points(m, 37, 1, dtype),
                                           draw_points(m, 53, 2, dtype))]
    plain = (f(m.distance(*leaves[1:])) * leaves[0].abs().pow(power)).mean()
    plain_errors = torch.autograd.grad(plain, leaves, allow_unused=True)

    settings = {"manifold": m, "inhibitor": f, "power": power}
    ours, want = penalty_and_gradients(*leaves, **settings), expected(*leaves, **settings)
    assert [g.dtype for g in ours] == [torch.float32, dtype, dtype, dtype]
    assert relative_error(ours.value, want.value) <= min(1e-6, 2 * relative_error(plain, want.value))
    for name, theirs in zip(("weight", "rows", "cols"), plain_errors):
        error = relative_error(getattr(ours, name), getattr(want, name))
        peer = 0 if theirs is None else relative_error(theirs, getattr(want, name))
        assert error <= 3 * peer, name
        # gradients of a mean are near it
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        rounding = smallest / 2 * getattr(want,
                                          name).numel() ** 0.5 / float(getattr(want,
                                                                               name).norm().clamp(min=1e-30))
        assert error <= 1.01 * torch.finfo(dtype).eps / 2 + rounding + 1e-5, name


@needs_kernels
@pytest.mark.parametrize("power", [1.0, 2.7])
@pytest.mark.parametrize("manifold", ["torus", "sphere", "product"])
@pytest.mark.parametrize("inhibitor", VARIANTS)
def test_accuracy_of_variants(kernels, manifold, inhibitor, power):
    weight = draw_weight(37, 53)
    rows, cols = draw_points(manifold, 37, 1), draw_points(manifold, 53, 2)
    settings = {"manifold": MANIFOLDS[manifold], "inhibitor": VARIANTS[inhibitor], "power": power}
    assert_close(penalty_and_gradients(weight, rows, cols, **settings),
                 expected(weight, rows, cols, **settings),
                 *TOLERANCE[torch.float32])


@pytest.mark.parametrize("inhibitor", [name for name in INHIBITORS | VARIANTS if name != "callable"])
def test_every_coefficient(either, inhibitor):
    """f and its slope one by one, which norms average: on a line and with |w| = 1, dW is f(d) and dE
    df/dd."""
    f = (INHIBITORS | VARIANTS)[inhibitor]
    d = torch.cat([torch.logspace(-4, 0, 500), torch.linspace(1, 16, 4001)])
    got = penalty_and_gradients(torch.ones(1, len(d)), torch.zeros(1, 1), d[:, None],
                                manifold=mk.Euclidean(1),
                                inhibitor=f, reduction="sum")
    exact = d.double().requires_grad_()
    f_exact = f(exact)
    slope, = torch.autograd.grad(f_exact.sum(), exact, create_graph=True)
    bend = torch.autograd.grad(slope.sum(), exact)[0] if slope.requires_grad else torch.zeros_like(exact)
    # d itself is rounded on the way (to mu d, to table steps): that turns f by f' d and f' by f'' d
    for name, g, want, turn in (("f", got.weight[0], f_exact, slope), ("df/dd", got.cols[:, 0], slope, bend)):
        allowed = 4 * torch.finfo(torch.float32).eps * (want.abs().max()
                                                        + (turn * exact).abs()).clamp(min=1e-30)
        excess = ((g - want).abs() / allowed).detach()
        assert excess.max() <= 1, f"{name} off by {excess.max():.1f} x the allowed at {d[excess.argmax()]}"


def test_every_angle(either):
    """Sphere: angles from 0 to pi within 3e-7, where acos of a rounded product loses 1e-4."""
    angle = torch.cat([torch.logspace(-6, -1, 200), torch.linspace(0, math.pi, 2001),
                       math.pi - torch.logspace(-6, -1, 200)])
    rows, cols = torch.tensor([[1.0, 0.0]]), torch.stack([angle.cos(), angle.sin()], 1)
    got = penalty_and_gradients(torch.ones(1, len(cols)), rows, cols, manifold=mk.Sphere(1, 1.0),
                                inhibitor=mk.Diffusion(1.0, 1.0), reduction="sum")
    exact = torch.atan2(cols[:, 1].double(), cols[:, 0].double()).abs()
    assert (got.weight[0] - exact).abs().max() <= 3e-7


@pytest.mark.parametrize("power", [1.0, 1.5])
@pytest.mark.parametrize("inhibitor", INHIBITORS)
@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_accuracy_of_the_fallback(manifold, inhibitor, power):
    weight, rows = draw_weight(41, 41), draw_points(manifold, 41, 1)
    settings = {"manifold": MANIFOLDS[manifold], "inhibitor": INHIBITORS[inhibitor], "power": power}
    with mk.backend("reference"):
        assert_close(penalty_and_gradients(weight, rows, **settings), expected(weight, rows, **settings),
                     *TOLERANCE[torch.float32])


@needs_kernels
@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_accuracy_at_size(kernels, manifold):
    """Shared points: the diagonal has distance 0, and row and column parts of dE meet in one gradient."""
    n = 650
    weight, rows = draw_weight(n, n), draw_points(manifold, n, 1)
    settings = {"manifold": MANIFOLDS[manifold]}
    assert_close(penalty_and_gradients(weight, rows, **settings), expected(weight, rows, **settings),
                 *TOLERANCE[torch.float32])


@needs_kernels
@pytest.mark.parametrize("blocks,masked", [(1, False), (1, True), (4, False)])
def test_accuracy_past_the_caches(kernels, blocks, masked):
    """A gradient of 16 MB and more is written past the caches."""
    n = 2080
    weight = draw_weight(n, n)
    rows, cols = (on_a_grid(draw_points("torus", m, seed)) for m, seed in ((n // blocks, 1), (n, 2)))
    mask = torch.rand(n, n, generator=generator()) < 0.3 if masked else None
    settings = {"manifold": "torus", "blocks": blocks, "mask": mask, "power": 1.0 if blocks == 1 else 2.0}
    assert_close(penalty_and_gradients(weight, rows, cols, **settings),
                 expected(weight, rows, cols, **settings),
                 *TOLERANCE[torch.float32])


def test_empty_is_poisoned_for_the_kernels():
    """The fixture in conftest.py reaches the kernels' own outputs: each is filled once it is allocated."""
    weight, rows = draw_weight(8, 8).requires_grad_(), draw_points("torus", 8).requires_grad_()
    assert torch.empty(3).isnan().all()
    with torch.profiler.profile() as profile:
        mk.moduli_penalty(weight, rows, manifold="torus")
    names = [event.name for event in profile.events()]
    if "moduli_kernels::penalty_with_grads" in names and mk.backends.active(DEVICE) == "cpp":
        assert names.count("aten::fill_") >= names.count("aten::empty") >= 3


# --- the definition ---------------------------------------------------------------------------------------

def looped_value(weight, rows, cols, f, power, blocks, mask) -> float:
    """sum f(d_ij) |w_bij|^l on a torus of periods 10, in Python loops."""
    total = 0.0
    weight, mask = weight.cpu(), None if mask is None else mask.cpu()
    weight = weight.double().flatten(2).numpy() if weight.dim() > 2 else weight.double()[..., None].numpy()
    kept = np.ones_like(weight, dtype=bool) if mask is None else mask.numpy().reshape(weight.shape)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            x, y = rows[row % len(rows)].double(), cols[column].double()
            delta = [min((a - b) % 10.0, (b - a) % 10.0) for a, b in zip(x.tolist(), y.tolist())]
            size = math.sqrt(sum(w * w for w, k in zip(weight[row, column], kept[row, column]) if k))
            total += f(math.hypot(*delta)) * size**power
    return total


def difference_of_gaussians(d: float) -> float:
    at = math.log(20) / (4 - 0.2)
    return 100 * (math.exp(-at / 5) - math.exp(-4 * at)) - 100 * (math.exp(-d * d / 5) - math.exp(-4 * d * d))


@pytest.mark.parametrize("kernel", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("power", [1.0, 2.5])
def test_value_is_the_formula(either, power, masked, blocks, kernel):
    weight = draw_weight(blocks * 4, 5, *kernel)
    rows, cols = draw_points("torus", 4, 1), draw_points("torus", 5, 2)
    mask = torch.rand(weight.shape, generator=generator()) < 0.6 if masked else None
    want = looped_value(weight, rows, cols, difference_of_gaussians, power, blocks, mask)
    settings = {"manifold": "torus", "power": power, "blocks": blocks, "mask": mask}
    got = mk.moduli_penalty(weight, rows, cols, reduction="sum", **settings)
    assert float(got) == pytest.approx(want, rel=1e-6)
    mean = mk.moduli_penalty(weight, rows, cols, strength=0.25, **settings)
    assert float(mean) == pytest.approx(0.25 * want / (blocks * 20), rel=1e-6)


@pytest.mark.parametrize("kernel", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("manifold", ["torus", "klein", "product"])
def test_gradients_of_blocks_kernels_masks(either, manifold, masked, blocks, kernel):
    weight = draw_weight(blocks * 17, 23, *kernel)
    weight[0] = 0
    rows, cols = draw_points(manifold, 17, 1), draw_points(manifold, 23, 2)
    mask = torch.rand(weight.shape, generator=generator()) < 0.4 if masked else None
    for power in (1.0, 2.0, 2.7):
        settings = {"manifold": MANIFOLDS[manifold], "power": power, "blocks": blocks, "mask": mask,
                    "reduction": "sum", "strength": -0.3}
        got = penalty_and_gradients(weight, rows, cols, **settings)
        assert_close(got, expected(weight, rows, cols, **settings), *TOLERANCE[torch.float32])
        if masked:
            assert not got.weight[~mask].any()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("blocks", [1, 2])
def test_sparse_csr_weight(either, blocks, dtype):
    """Its pattern is the mask (a stored zero counts as kept), its gradient has the same pattern."""
    dense = draw_weight(blocks * 9, 14, dtype=dtype)
    mask = torch.rand(dense.shape, generator=generator()) < 0.3
    mask[3] = False
    weight = torch.where(mask, dense, 0).to_sparse_csr().requires_grad_()
    rows, cols = draw_points("torus", 9, 1, dtype).requires_grad_(), draw_points("torus", 14, 2,
                                                                                 dtype).requires_grad_()
    value = mk.moduli_penalty(weight, rows, cols, manifold="torus", blocks=blocks)
    value.backward()
    want = expected(dense, rows, cols, manifold="torus", blocks=blocks, mask=mask)
    assert weight.grad.layout == torch.sparse_csr
    assert torch.equal(weight.grad.col_indices(), weight.col_indices())
    assert torch.equal(weight.grad.crow_indices(), weight.crow_indices())
    assert relative_error(value, want.value) <= TOLERANCE[dtype][0]
    for got, wanted in ((weight.grad.to_dense(), want.weight), (rows.grad, want.rows),
                        (cols.grad, want.cols)):
        assert relative_error(got, wanted) <= TOLERANCE[dtype][1]


def test_defaults(either):
    """inhibitor None is the experiments' difference of Gaussians, reduction mean, power 1, strength 1."""
    weight, rows = draw_weight(11, 11), draw_points("torus", 11)
    explicit = mk.moduli_penalty(weight, rows, rows, manifold=mk.FlatTorus((10.0, 10.0)), power=1.0, blocks=1,
                                 inhibitor=mk.DifferenceOfGaussians(100.0, 0.25, 5.0), mask=None,
                                 reduction="mean",
                                 strength=1.0)
    assert torch.equal(mk.moduli_penalty(weight, rows, manifold="torus"), explicit)


# --- what goes in and comes out ---------------------------------------------------------------------------

@pytest.mark.parametrize("weight_dtype,result",
                         [(torch.float64, torch.float64), (torch.float32, torch.float32),
                                                 (torch.bfloat16, torch.float32),
                                                 (torch.float16, torch.float32)],
                         ids=str)
@pytest.mark.parametrize("points_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtypes(either, weight_dtype, result, points_dtype):
    """The value's dtype follows the weight; each gradient has its tensor's."""
    weight, rows = draw_weight(6, 6, dtype=weight_dtype), draw_points("torus", 6, dtype=points_dtype)
    got = penalty_and_gradients(weight, rows, manifold="torus")
    assert (got.value.dtype, got.weight.dtype, got.rows.dtype) == (result, weight_dtype, points_dtype)
    assert got.value.dim() == 0
    rounded = rows.to(result)
    assert relative_error(got.value,
                          expected(weight, rounded, manifold="torus").value) <= TOLERANCE[result][0]


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_costs_nothing(either, shape, reduction):
    weight, rows, cols = torch.empty(shape), draw_points("torus", shape[0]), draw_points("torus", shape[1])
    got = penalty_and_gradients(weight, rows, cols, manifold="torus", reduction=reduction)
    assert float(got.value) == 0
    for gradient, tensor in zip(got[1:], (weight, rows, cols)):
        assert gradient.shape == tensor.shape and not gradient.any()


@pytest.mark.parametrize("view",
                         ["rows", "columns", "transposed", "every_other_column", "expanded_rows", "offset"])
def test_strides(either, view):
    """Any row stride is read in place, other strides through one copy: same numbers, gradient in the right
    places."""
    base = draw_weight(24, 40)
    take = {"rows": lambda w: w[::2, :20], "columns": lambda w: w[:12, 7:27],
            "transposed": lambda w: w[:20, :12].T,
            "every_other_column": lambda w: w[:12, ::2], "expanded_rows": lambda w: w[:1, :20].expand(12, 20),
            "offset": lambda w: w.flatten()[3:243].view(12, 20)}[view]
    leaf = base.clone().requires_grad_()
    rows, cols = draw_points("torus", 12, 1), draw_points("torus", 20, 2)
    value = mk.moduli_penalty(take(leaf), rows, cols, manifold="torus")
    value.backward()
    other = base.clone().requires_grad_()
    want = expected(take(other).contiguous(), rows, cols, manifold="torus")
    take(other).backward(want.weight.float())
    assert relative_error(value, want.value) <= 1e-6
    assert relative_error(leaf.grad, other.grad.double()) <= 1e-6


def test_strides_of_points_masks_and_images(either):
    """Points and masks of any strides; a channels-last kernel keeps its layout in the gradient."""
    weight = draw_weight(6, 10, 3, 3).to(memory_format=torch.channels_last)
    rows = draw_points("torus6", 12, 1)[::2, 1:3]
    cols = draw_points("torus", 1, 2).expand(10, 2)
    mask = (torch.rand(10, 6, 3, 3, generator=generator()) < 0.5).transpose(0, 1)
    got = penalty_and_gradients(weight, rows, cols, manifold="torus", mask=mask)
    assert_close(got, expected(weight, rows, cols, manifold="torus", mask=mask), *TOLERANCE[torch.float32])
    assert got.weight.is_contiguous(memory_format=torch.channels_last)


def test_tables_with_equal_samples_are_one_function(either):
    weight, rows = draw_weight(9, 9), draw_points("torus", 9)
    table = mk.TabulatedInhibitor(bump, 8.0, 64)
    again = mk.TabulatedInhibitor.from_values(list(table.values), 8.0)
    assert again == table
    assert torch.equal(mk.moduli_penalty(weight, rows, manifold="torus", inhibitor=table),
                       mk.moduli_penalty(weight, rows, manifold="torus", inhibitor=again))


@needs_kernels
def test_rows_beyond_2_31_elements(kernels):
    """Row strides that 32 bits cannot hold. The storage is never touched but where the rows lie: it takes no
    memory."""
    rows, columns, stride = 3, 20, 2**30 + 5
    try:
        storage = mmap.mmap(-1, 2 * (2 * stride + columns))  # 4.3 GB; a page comes when it is touched
    except OSError:
        pytest.skip("4.3 GB of address space are not to be had")
    weight = torch.frombuffer(storage, dtype=torch.bfloat16).to(DEVICE).as_strided((rows, columns), (stride, 1))
    weight.copy_(draw_weight(rows, columns))
    points = draw_points("torus", rows, 1), draw_points("torus", columns, 2)
    assert_close(penalty_and_gradients(weight, *points, manifold="torus"),
                 expected(weight.clone(), *points, manifold="torus"), 1e-6,
                 torch.finfo(torch.bfloat16).eps / 2)
