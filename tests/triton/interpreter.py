"""The Triton kernels in Triton's interpreter, on CPU tensors, compared with the float64 reference. test_interpreter.py
runs this file in a process of its own; by hand:

    TRITON_INTERPRET=1 python -m pytest tests/triton/interpreter.py

The interpreter truncates where it should round to bfloat16, so 16-bit gradients may be off by one unit in the last
place.
"""
from __future__ import annotations

import itertools
import random

import numpy
import pytest
import torch
from torch import Tensor

import moduli_kernels as mk
from moduli_kernels import backends
from moduli_kernels.geometry import encoding
from moduli_kernels.ops.penalty import PenaltyArguments
from moduli_kernels.triton import manifolds, math as triton_math
from moduli_kernels.triton.penalty import dense, tiles
from tests.support.penalty_cases import (
    INHIBITORS,
    MANIFOLDS,
    TOLERANCE,
    VARIANTS,
    Result,
    assert_close,
    draw_points,
    draw_weight,
    expected,
    on_a_grid,
    penalty_and_gradients,
    relative_error,
)

# NumPy warns about what is right here: log2(0), and inf - inf and 0 / 0 of poisoned points
pytestmark = [
    pytest.mark.usefixtures("on_triton"),
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning"),
]

EVERY_INHIBITOR = {name: f for name, f in (INHIBITORS | VARIANTS).items() if name != "callable"}
MAIN_INHIBITORS = tuple(name for name in INHIBITORS if name != "callable")
POWERS = (1.0, 1.5, 2.0, 3.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NEEDED = ("all", "shared", "weight", "points", "value")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 4 rows x 1 vector and few programs, so that small weights have many tiles, blocks, strips and groups."""
    def use(programs: int, prefetch: bool = False, repeat: int = 1):
        tile = tiles.Tile(1, repeat, programs, prefetch)
        monkeypatch.setattr(tiles, "OVERRIDES", dict.fromkeys(tiles.TABLE[9], tile))
    monkeypatch.setattr(tiles, "FEWEST_ROWS", 4)
    return use


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_within_ulps(got: Tensor, want: Tensor, ulps: float) -> None:
    """Asserts that 16-bit numbers are within so many units in the last place of the float64 ones. The error of float32
    is allowed on top, because the terms of the default inhibitor cancel where it is smallest."""
    bits, lowest = (11, -13) if got.dtype == torch.float16 else (8, -125)
    exponent = torch.frexp(want.where(want != 0, torch.finfo(torch.float64).tiny)).exponent.clamp(min=lowest)
    allowed = ulps * torch.ldexp(torch.ones_like(want), exponent - bits) + 1e-6 * want.abs().max()
    worst = ((got.double() - want).abs() / allowed).max()
    assert worst <= 1, f"{float(worst)} x {ulps} ulp"


def check(weight: Tensor, rows: Tensor, cols: Tensor | None = None, *, grad: float = 1.0, **settings) -> Result:
    """Compares value and all gradients with the reference, within the tolerance of the weight's dtype."""
    assert backends.active("cpu") == "triton"
    got = penalty_and_gradients(weight, rows, cols, grad=grad, **settings)
    want = expected(weight, rows, cols, grad=grad, **settings)
    tolerance = TOLERANCE[got.value.dtype]
    assert got.value.dtype == got.rows.dtype == compute_dtype(weight.dtype) and got.weight.dtype == weight.dtype
    if weight.dtype in TOLERANCE:
        assert_close(got, want, *tolerance)
    else:
        assert_close(got._replace(weight=None), want._replace(weight=None), *tolerance)
        assert_within_ulps(got.weight, want.weight, 1 if grad == 1 else 2)  # made, then scaled
    return got


# --- the cross -------------------------------------------------------------------------------------------

def pairwise(*choices) -> list[tuple]:
    """Few cases that together hold every pair of choices of every two arguments, found greedily."""
    def pairs(case):
        return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}

    draw = random.Random(0)
    missing = set().union(*map(pairs, itertools.product(*choices)))
    cases = []
    while missing:
        seed = draw.choice(sorted(missing, key=repr))
        candidates = []
        for _ in range(30):
            case = [draw.choice(c) for c in choices]
            case[seed[0]], case[seed[2]] = seed[1], seed[3]
            candidates.append(tuple(case))
        best = max(candidates, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        cases.append(best)
    return cases


@pytest.mark.parametrize(("manifold", "inhibitor", "power", "dtype", "need"),
                         pairwise(tuple(MANIFOLDS), MAIN_INHIBITORS, POWERS, DTYPES, NEEDED), ids=str)
def test_every_pair_of_choices(manifold, inhibitor, power, dtype, need):
    m, f = MANIFOLDS[manifold], INHIBITORS[inhibitor]
    rows = on_a_grid(draw_points(m, 37, 1, compute_dtype(dtype)))
    cols = None if need == "shared" else on_a_grid(draw_points(m, 70, 2, compute_dtype(dtype)))
    weight = draw_weight(37, 37 if cols is None else 70, dtype=dtype)
    weight[3, 5] = 0
    settings = {"manifold": m, "inhibitor": f, "power": power, "strength": 3.0, "reduction": "sum"}
    if need in ("all", "shared"):
        check(weight, rows, cols, **settings)
        return
    want, tolerance = expected(weight, rows, cols, **settings), TOLERANCE[compute_dtype(dtype)]
    leaves = [weight.requires_grad_(need == "weight"), rows.requires_grad_(need == "points"),
              cols.requires_grad_(need == "points")]
    value = mk.moduli_penalty(*leaves, **settings)
    assert relative_error(value, want.value) <= tolerance[0]
    if need == "weight":
        value.backward()
        if dtype in TOLERANCE:
            assert relative_error(weight.grad, want.weight) <= tolerance[1]
        else:
            assert_within_ulps(weight.grad, want.weight, 1)
        assert rows.grad is None and cols.grad is None
    if need == "points":
        value.backward()
        for got, w in ((rows.grad, want.rows), (cols.grad, want.cols)):
            assert relative_error(got, w) <= tolerance[1]
        assert weight.grad is None


# --- shapes ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(1, 1), (63, 63), (130, 130), (257, 257), (1, 257), (257, 1), (130, 63), (32, 128)],
                         ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes(shape, dtype):
    cols = on_a_grid(draw_points("torus", shape[1], 2))
    check(draw_weight(*shape, dtype=dtype), on_a_grid(draw_points("torus", shape[0], 1)), cols, manifold="torus")


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize(("programs", "shape"), [(1, (32, 96)), (3, (30, 70)), (1000, (8, 64)), (4, (256, 32))],
                         ids=str)
def test_strips_and_groups(small_tiles, programs, shape, prefetch):
    """One program for everything, ragged ends, one tile a program, and more rows than a strip has slots for."""
    small_tiles(programs, prefetch)
    rows, cols = (on_a_grid(draw_points("torus", n, n)) for n in shape)
    check(draw_weight(*shape), rows, cols, manifold="torus")


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)], ids=str)
def test_empty(shape):
    got = penalty_and_gradients(torch.ones(shape), torch.rand(shape[0], 2), torch.rand(shape[1], 2), manifold="torus")
    assert got.value == 0 and all(not g.any() for g in got[1:])
    assert [tuple(g.shape) for g in got[1:]] == [shape, (shape[0], 2), (shape[1], 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [64, 70])
def test_row_strides(columns, dtype):
    """Columns of a wider matrix, one of them at an offset that is not a multiple of 16 bytes."""
    wide = draw_weight(40, 200, dtype=dtype)
    for start in (0, 3, 64):
        check(wide[:, start:start + columns], draw_points("sphere", 40, 1), draw_points("sphere", columns, 2),
              manifold="sphere")


def test_offsets_beyond_32_bits(tmp_path):
    """The rows are 2^30 + 64 elements apart, in a file that is mostly a hole."""
    stride, shape = 2**30 + 64, (4, 64)
    file = numpy.memmap(tmp_path / "weight", dtype=numpy.int16, mode="w+", shape=(3 * stride + 64,))
    weight = torch.from_numpy(file).view(torch.bfloat16).as_strided(shape, (stride, 1))
    weight.copy_(draw_weight(*shape, dtype=torch.bfloat16))
    arguments = {"manifold": "torus", "reduction": "sum"}
    rows, cols = draw_points("torus", 4, 1), draw_points("torus", 64, 2)
    assert relative_error(mk.moduli_penalty(weight, rows, cols, **arguments),
                          expected(weight, rows, cols, **arguments).value) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("blocks", [3, 4])
def test_gate_blocks(blocks, masked, dtype):
    weight = draw_weight(blocks * 33, 70, dtype=dtype)
    mask = draw_weight(blocks * 33, 70, seed=1) > 0.5 if masked else None
    check(weight, on_a_grid(draw_points("klein", 33, 1)), on_a_grid(draw_points("klein", 70, 2)), manifold="klein",
          blocks=blocks, mask=mask, power=1.5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("kernel", [(3,), (3, 2)], ids=str)
def test_convolutions(kernel, power, masked):
    weight = draw_weight(33, 20, *kernel)
    weight[2, 3] = 0
    mask = draw_weight(33, 20, *kernel, seed=1) > 0 if masked else None
    if masked:
        mask[4, 5] = False
    check(weight, draw_points("sphere", 33, 1), draw_points("sphere", 20, 2), manifold="sphere", power=power, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("power", POWERS)
def test_masks(power, dtype):
    mask = draw_weight(40, 70, seed=1) > 1
    got = check(draw_weight(40, 70, dtype=dtype), draw_points("s3", 40, 1, compute_dtype(dtype)),
                draw_points("s3", 70, 2, compute_dtype(dtype)), manifold="s3", power=power, mask=mask)
    assert not got.weight[~mask].any()


# --- singular points -------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("inhibitor", EVERY_INHIBITOR)
def test_identical_points(inhibitor, dtype):
    """They cost f(0) and have no force between them. The product has a factor of every kind."""
    cols = draw_points("product", 19, 1, dtype)
    rows = torch.cat([cols[:5], draw_points("product", 6, 2, dtype)])
    got = check(draw_weight(11, 19, dtype=dtype), rows, cols, manifold=MANIFOLDS["product"],
                inhibitor=EVERY_INHIBITOR[inhibitor])
    assert all(t.isfinite().all() for t in got)


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_all_neurons_at_one_point(manifold):
    rows = draw_points(manifold, 1).repeat(9, 1)
    got = penalty_and_gradients(draw_weight(9, 9), rows, manifold=MANIFOLDS[manifold])
    f = mk.DifferenceOfGaussians()(torch.zeros(()))
    assert float(got.value) == pytest.approx(float(f * draw_weight(9, 9).abs().mean()), rel=1e-6)
    assert torch.equal(got.rows, torch.zeros_like(rows))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.0, -2.5])
@pytest.mark.parametrize("manifold", ["sphere", "s3"])
def test_antipodes(manifold, scale, dtype):
    """x and -x exactly, with equal or other length, have distance pi r, and no direction is preferred."""
    rows = torch.eye(MANIFOLDS[manifold].ambient_dim, dtype=dtype) * 3
    cols = torch.cat([-scale * rows, draw_points(manifold, 3, 1, dtype)])
    for inhibitor in (mk.DifferenceOfGaussians(), mk.Diffusion()):
        got = check(draw_weight(len(rows), len(cols), dtype=dtype), rows, cols, manifold=manifold, inhibitor=inhibitor)
        assert all(t.isfinite().all() for t in got)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("manifold", [mk.FlatTorus((10.0,)), mk.FlatTorus((10.0, 6.0, 2.5)), mk.KleinBottle(10.0, 6.0)],
                         ids=str)
def test_cut_loci(manifold, dtype):
    """Half a period apart exactly in each coordinate, both ways and periods away, they go the side that the reference
    takes."""
    periods = torch.tensor(getattr(manifold, "periods", (20.0, 6.0)), dtype=dtype)
    multiples = torch.tensor([-2.5, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.5], dtype=dtype)
    rows = torch.tensor([0.0, 1.25, 5.0, 7.5], dtype=dtype)[:, None].repeat(1, len(periods))
    cols = (rows[:, None] + multiples[:, None] * periods).reshape(-1, len(periods))
    for inhibitor in (mk.DifferenceOfGaussians(), mk.Diffusion()):
        check(draw_weight(len(rows), len(cols), dtype=dtype), rows, cols, manifold=manifold, inhibitor=inhibitor)


@pytest.mark.parametrize("period", [10.0, 7.3])
def test_beside_the_cut_locus(period):
    """A few roundings from half a period, the side is that of the rounded difference."""
    ulps = torch.tensor([-64, -16, -4, -2, 2, 4, 16, 64]) * torch.finfo(torch.float32).eps * period / 2
    rows, cols = torch.zeros(1, 1), torch.cat([period / 2 + ulps, -period / 2 + ulps])[:, None]
    got = penalty_and_gradients(torch.ones(1, 16), rows, cols, manifold=mk.FlatTorus((period,)),
                                inhibitor=mk.Diffusion(), reduction="sum")
    want = torch.where(ulps < 0, 1.0, -1.0)
    assert torch.equal(got.cols[:8, 0].sign(), want) and torch.equal(got.cols[8:, 0].sign(), want)


@pytest.mark.parametrize("power", POWERS)
def test_zero_weights(power):
    weight = draw_weight(20, 20)
    weight[::2] = 0
    got = check(weight, draw_points("torus", 20), manifold="torus", power=power)
    assert not got.weight[::2].any()


def test_far_coordinates():
    """Any real coordinate is valid, however many periods away."""
    rows, cols = draw_points("torus", 20, 1, torch.float64), draw_points("torus", 30, 2, torch.float64)
    cols = cols + 10 * torch.arange(-15, 15)[:, None]
    check(draw_weight(20, 30, dtype=torch.float64), rows, cols, manifold="torus")


# --- what is not finite ----------------------------------------------------------------------------------

@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("power", POWERS)
def test_weights_that_are_not_finite(power, dtype, bad):
    weight = draw_weight(20, 40, dtype=dtype)
    weight[3, 7] = bad
    value = mk.moduli_penalty(weight, draw_points("torus", 20, 1), draw_points("torus", 40, 2), manifold="torus",
                              power=power)
    assert value.isnan() if bad != bad else value.isposinf()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("manifold", "inhibitor"),
                         [("torus", name) for name in EVERY_INHIBITOR] + [("product", "dog")])
def test_points_that_are_not_finite(manifold, inhibitor, bad):
    m = MANIFOLDS[manifold]
    rows, cols = draw_points(m, 10, 1), draw_points(m, 12, 2)
    for side in (rows, cols):
        before = float(side[4, -1])
        side[4, -1] = bad
        got = penalty_and_gradients(draw_weight(10, 12), rows, cols, manifold=m, inhibitor=EVERY_INHIBITOR[inhibitor])
        assert got.value.isnan() and (got.rows if side is rows else got.cols)[4].isnan().all()
        side[4, -1] = before


@pytest.mark.parametrize("shape", [(20, 70), (32, 64)], ids=str)
def test_masked_away(shape):
    """Masked entries cost nothing, whatever they are; nor does anything beyond the last column."""
    weight, mask = draw_weight(*shape), torch.ones(shape, dtype=torch.bool)
    rows, cols = draw_points("sphere", shape[0], 1), draw_points("sphere", shape[1], 2)
    weight[3, 7], mask[3, 7] = float("nan"), False
    cols[-1], mask[:, -1] = float("nan"), False
    rows[-1], mask[-1] = float("inf"), False
    value = mk.moduli_penalty(weight, rows, cols, manifold="sphere", mask=mask)
    kept = mk.moduli_penalty(weight.where(mask, 0)[:-1, :-1], rows[:-1], cols[:-1], manifold="sphere",
                             mask=mask[:-1, :-1], reduction="sum")
    assert relative_error(value, kept / mask.numel()) <= 1e-6


# --- repeats, grad, scaling ------------------------------------------------------------------------------

def test_bitwise_repeatable():
    arguments = draw_weight(100, 130), draw_points("sphere", 100, 1), draw_points("sphere", 130, 2)
    first, second = (penalty_and_gradients(*arguments, manifold="sphere") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("grad", [1.0, -3.0, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grad(dtype, grad):
    """float16 makes its gradients after grad is known; the others scale theirs in place."""
    rows = on_a_grid(draw_points("torus", 40, 1, compute_dtype(dtype)))
    check(draw_weight(40, 40, dtype=dtype), rows, manifold="torus", grad=grad)


def test_repeated_backward():
    weight = draw_weight(20, 20).requires_grad_()
    value = mk.moduli_penalty(weight, draw_points("torus", 20), manifold="torus")
    value.backward(torch.tensor(2.0), retain_graph=True)
    first, weight.grad = weight.grad, None
    value.backward(torch.tensor(2.0))
    assert relative_error(weight.grad, first) <= 1e-6


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_scale_grads(factor):
    """Several tensors and dtypes, an empty tensor, and no tensor at all."""
    grads = [torch.ones(n, dtype=d) for n, d in
             ((5000, torch.float32), (0, torch.float32), (7, torch.bfloat16), (1, torch.float16), (30, torch.float32))]
    versions = [g._version for g in grads]
    dense.scale_grads_(grads, torch.tensor(factor))
    dense.scale_grads_([], torch.tensor(factor))
    assert all((g == factor).all() for g in grads) and versions == [g._version for g in grads]
    double = torch.ones(3, dtype=torch.float64)
    dense.scale_grads_([double], torch.tensor(1 / 3, dtype=torch.float64))
    assert (double == torch.tensor(1 / 3, dtype=torch.float64)).all()


def test_large_sums_keep_their_digits():
    """Equal terms are rounded alike, so plain float32 sums would drift."""
    value = mk.moduli_penalty(torch.full((512, 96), 0.3), torch.zeros(512, 2), torch.zeros(96, 2), manifold="torus",
                              inhibitor=mk.Constant(0.7), reduction="sum")
    assert relative_error(value, torch.tensor(float(numpy.float32(0.3)) * 0.7 * 512 * 96)) <= 2e-7


# --- numbers and partitions ----------------------------------------------------------------------------------

def test_doubles_travel_whole():
    values = [1 / 3, 2 * 3.141592653589793 * 5, 1e-9 / 7, 0.0, 100.0]
    sent = triton_math.kernel_numbers(values, torch.float64)
    assert [sum(sent[i:i + 3]) for i in range(0, len(sent), 3)] == values
    assert triton_math.kernel_numbers(values, torch.float32) == tuple(values)


def test_flat_factors_fall_into_runs():
    found = manifolds.factors_of([0, 3, 1, 3, 0, 2, 2, 2], [4.0, 0.0, 0.0, 5.0, 0.0, 7.0, 8.0, 9.0])
    periodic, line, sphere, klein = (
        m.distance for m in (manifolds.FLAT, manifolds.LINE, manifolds.SPHERE, manifolds.KLEIN))
    assert [(f.distance, f.first, f.columns, f.parameter, f.parameters) for f in found.factors] == [
        (periodic, 0, 1, 0, 1), (line, 1, 2, 1, 0), (sphere, 3, 3, 1, 1), (line, 6, 1, 2, 0), (periodic, 7, 1, 2, 1),
        (klein, 8, 2, 3, 2)]
    assert found.parameters == [4.0, 5.0, 7.0, 8.0, 9.0] and found.curved


@pytest.mark.parametrize("tile", [tiles.Tile(8, 4, 512), tiles.Tile(8, 2, 512),
                                  tiles.Tile(4, 1, 1024)], ids=str)
@pytest.mark.parametrize("width", [16, 32, 64])
def test_partitions_cover_the_weight(width, tile):
    for rows, columns in itertools.product((1, 63, 650, 4096, 8192, 50000), repeat=2):
        partition = tiles.partition_of(rows, columns, tile, tile.repeat * width, True)
        strip, block = partition.tiles * tile.rows, partition.group * tile.repeat * width
        assert partition.tiles <= tiles.LANES
        assert (partition.strips - 1) * strip < rows <= partition.strips * strip
        assert (partition.groups - 1) * block < columns <= partition.groups * block


# --- into an existing gradient ---------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "masked"), [((40, 70), False), ((32, 128), False), ((40, 70), True),
                                               ((20, 12, 3), True)], ids=str)
def test_accumulates(shape, masked, dtype):
    """dW is added to grad in the same pass; value and gradients of the points stay the same."""
    weight, before = draw_weight(*shape, dtype=dtype), draw_weight(*shape, seed=1, dtype=dtype)
    rows, cols = (on_a_grid(draw_points("torus", n, n)) for n in shape[:2])
    mask = draw_weight(*shape, seed=2) > 0 if masked else None
    kinds, parameters = encoding.encode_manifold(mk.FlatTorus())
    kind, numbers = encoding.encode_inhibitor(mk.DifferenceOfGaussians())
    arguments = PenaltyArguments(**dict.fromkeys(PenaltyArguments._fields) | {
        "weight": weight, "rows": rows, "cols": cols, "mask": mask, "factors": kinds, "factor_parameters": parameters,
        "inhibitor": kind, "inhibitor_parameters": numbers, "power": 1.0, "blocks": 1, "scale": 0.1})
    grad = before.clone()
    value, drows, dcols = dense.accumulate_penalty_grad_(grad, *arguments, True)
    want = expected(weight, rows, cols, mask=mask, reduction="sum", strength=0.1)
    assert_close(Result(value, None, drows, dcols), want._replace(weight=None), 1e-6, 1e-5)
    if dtype == torch.float32:
        assert relative_error(grad, before.double() + want.weight) <= 1e-6
    else:
        assert_within_ulps(grad, before.double() + want.weight, 1)
    if masked:
        assert torch.equal(grad[~mask], before[~mask])
