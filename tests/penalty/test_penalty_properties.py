"""hypothesis over shapes, strides, dtypes, blocks, kernels, masks, embeddings and what is trained; and the
laws that the penalty obeys whatever its settings."""
from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from torch import Tensor

import moduli_kernels as mk
from tests.support.penalty_cases import (
    BACKENDS,
    INHIBITORS,
    MANIFOLDS,
    POWERS,
    TOLERANCE,
    VARIANTS,
    assert_close,
    draw_points,
    draw_weight,
    examples,
    expected,
    generator,
    on_a_grid,
    on_device,
    penalty_and_gradients,
    relative_error,
    tiled_warning,
)

pytestmark = [tiled_warning, on_device]

COMPILED = [name for name in INHIBITORS | VARIANTS if name != "callable"]
# row chunks hold at least 144
ROWS = st.sampled_from([0, 1, 2, 3, 7, 16, 31, 64, 101, 127, 128, 129, 143, 287, 288, 289])
COLUMNS = st.sampled_from([0, 1, 2, 3, 15, 16, 17, 31, 97, 511, 512, 513, 1025])  # a tile holds 512
VIEWS = ["whole", "rows", "columns", "transposed", "steps", "expanded", "shifted"]
MASKS = ["none", "none", "all", "nothing", "random", "rows"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one call, all so small that the float64 reference is quick."""

    rows: int
    columns: int
    blocks: int
    kernel: tuple[int, ...]


@st.composite
def shapes(draw) -> Shape:
    rows, columns = draw(ROWS), draw(COLUMNS)
    blocks = draw(st.sampled_from([1, 1, 2, 3, 4]))
    kernel = draw(st.sampled_from([(), (), (1,), (3,), (2, 3)]))
    while rows * columns * blocks * math.prod(kernel) > 70_000:
        rows //= 2
    return Shape(rows, columns, blocks, kernel)


def viewed(weight: Tensor, view: str) -> Tensor:
    """The same numbers (but for "expanded") with other strides: a view of a larger or permuted tensor."""
    n, m, *kernel = weight.shape
    if view == "rows":
        return torch.stack([weight, weight.neg()], 1).flatten(0, 1)[::2]
    if view == "columns":
        return torch.cat([weight.neg(), weight, weight.neg()], 1)[:, m:2 * m]
    if view == "transposed":
        return weight.transpose(0, 1).contiguous().transpose(0, 1)
    if view == "steps":
        return torch.stack([weight, weight.neg()], -1)[..., 0]
    if view == "expanded":
        return weight[:1].expand(n, m, *kernel)
    if view == "shifted":
        return torch.cat([weight.flatten(), weight.new_zeros(3)])[1:1 + weight.numel()].view_as(weight)
    return weight


def mask_of(kind: str, shape: torch.Size) -> Tensor | None:
    if kind == "none":
        return None
    if kind in ("all", "nothing"):
        return torch.full(shape, kind == "all")
    mask = torch.rand(shape, generator=generator(5)) < 0.5
    if kind == "rows":
        mask[::2] = False
    return mask


@pytest.mark.parametrize("backend,count", [pytest.param(*BACKENDS[0].values, 250, marks=BACKENDS[0].marks),
                                           ("reference", 60)])
def test_against_the_reference(backend, count):
    @settings(max_examples=examples(count), suppress_health_check=[HealthCheck.too_slow])
    @given(shape=shapes(), view=st.sampled_from(VIEWS), mask=st.sampled_from(MASKS),
           manifold=st.sampled_from([*MANIFOLDS]),
           inhibitor=st.sampled_from(COMPILED), power=st.sampled_from(POWERS),
           dtype=st.sampled_from([*TOLERANCE]),
           shared=st.booleans(), needs=st.tuples(st.booleans(), st.booleans(), st.booleans()),
           reduction=st.sampled_from(["mean", "sum"]), strength=st.sampled_from([1.0, 0.1, -2.0, 0.0]),
           grad=st.sampled_from([1.0, -3.0]))
    @example(shape=Shape(129, 513, 1, ()), view="whole", mask="random", manifold="torus", inhibitor="dog",
             power=1.0,
             dtype=torch.float32, shared=False, needs=(True, True, True), reduction="mean", strength=1.0,
             grad=1.0)
    @example(shape=Shape(0, 5, 4, (3,)), view="whole", mask="all", manifold="mixed", inhibitor="constant",
             power=1.0,
             dtype=torch.float64, shared=False, needs=(True, True, True), reduction="mean", strength=1.0,
             grad=1.0)
    def check(shape, view, mask, manifold, inhibitor, power, dtype, shared, needs, reduction, strength, grad):
        columns = shape.rows if shared else shape.columns
        weight = viewed(draw_weight(shape.blocks * shape.rows, columns, *shape.kernel, dtype=dtype), view)
        rows = on_a_grid(draw_points(manifold, shape.rows, 1)).to(dtype)
        cols = None if shared else on_a_grid(draw_points(manifold, columns, 2)).to(dtype)
        setting = {"manifold": MANIFOLDS[manifold], "inhibitor": (INHIBITORS | VARIANTS)[inhibitor],
                   "power": power,
                   "blocks": shape.blocks, "reduction": reduction, "strength": strength}
        mask = mask_of(mask, weight.shape)
        want = expected(weight, rows, cols, mask=mask, grad=grad, **setting)
        leaves = [None if t is None else t.detach().requires_grad_(need)
                  for t, need in zip((weight, rows, cols), needs)]
        with mk.backend(backend):
            value = mk.moduli_penalty(*leaves, mask=mask, **setting)
            if value.requires_grad:
                value.backward(torch.tensor(grad, dtype=dtype))
        asked = [t is not None and t.requires_grad for t in leaves]
        assert value.requires_grad == any(asked)
        got = want._replace(value=value.detach(), **{
            name: leaf.grad if ask else None
            for name, leaf, ask in zip(("weight", "rows", "cols"), leaves, asked)})
        want = want._replace(**{name: None for name, ask in zip(("weight", "rows", "cols"), asked)
                                if not ask})
        assert_close(got, want, *TOLERANCE[dtype])

    check()


# --- laws -------------------------------------------------------------------------------------------------

@pytest.fixture(params=BACKENDS, scope="module")
def either(request):
    with mk.backend(request.param):
        yield request.param


CALL = {"manifold": st.sampled_from([*MANIFOLDS]), "inhibitor": st.sampled_from(COMPILED),
        "power": st.sampled_from(POWERS), "seed": st.integers(0, 2**31)}


def problem(manifold: str, inhibitor: str, power: float, seed: int, n: int = 9, m: int = 14):
    """(weight, rows, cols), settings; float64, so that laws hold to rounding."""
    tensors = (draw_weight(n, m, seed=seed, dtype=torch.float64),
               draw_points(manifold, n, seed, torch.float64),
               draw_points(manifold, m, seed + 1, torch.float64))
    settings_ = {"manifold": MANIFOLDS[manifold], "inhibitor": (INHIBITORS | VARIANTS)[inhibitor],
                 "power": power}
    return tensors, settings_


def assert_same(one, other, tolerance: float = 1e-11) -> None:
    for a, b in zip(one, other):
        assert (a is None) == (b is None)
        assert a is None or relative_error(a, b) <= tolerance


@settings(max_examples=examples(20))
@given(**CALL)
def test_transposing(either, manifold, inhibitor, power, seed):
    """d is symmetric: W' with columns and rows exchanged costs the same."""
    (weight, rows, cols), setting = problem(manifold, inhibitor, power, seed)
    one = penalty_and_gradients(weight, rows, cols, **setting)
    other = penalty_and_gradients(weight.T, cols, rows, **setting)
    assert_same(one, (other.value, other.weight.T, other.cols, other.rows))


@settings(max_examples=examples(20))
@given(**CALL)
def test_relabelling_neurons(either, manifold, inhibitor, power, seed):
    (weight, rows, cols), setting = problem(manifold, inhibitor, power, seed)
    order = torch.randperm(len(rows), generator=generator(seed))
    one = penalty_and_gradients(weight, rows, cols, **setting)
    other = penalty_and_gradients(weight[order], rows[order], cols, **setting)
    assert_same((one.value, one.weight[order], one.rows[order], one.cols), other)


@settings(max_examples=examples(20))
@given(**CALL)
def test_signs_of_weights(either, manifold, inhibitor, power, seed):
    (weight, rows, cols), setting = problem(manifold, inhibitor, power, seed)
    one = penalty_and_gradients(weight, rows, cols, **setting)
    other = penalty_and_gradients(-weight, rows, cols, **setting)
    assert_same((one.value, -one.weight, one.rows, one.cols), other, 0)


@settings(max_examples=examples(20))
@given(**CALL, factor=st.floats(0.01, 100))
def test_scaling_weights(either, manifold, inhibitor, power, seed, factor):
    """|a w|^l = a^l |w|^l."""
    (weight, rows, cols), setting = problem(manifold, inhibitor, power, seed)
    one = penalty_and_gradients(weight, rows, cols, **setting)
    other = penalty_and_gradients(factor * weight, rows, cols, **setting)
    size = factor**power
    assert_same((size * one.value, size / factor * one.weight, size * one.rows, size * one.cols), other)


@settings(max_examples=examples(20))
@given(**CALL)
def test_blocks_are_a_sum(either, manifold, inhibitor, power, seed):
    """Gate blocks share points: the penalty of the stack is the sum of theirs."""
    (weight, rows, cols), setting = problem(manifold, inhibitor, power, seed)
    second = weight.flip(0)
    together = penalty_and_gradients(torch.cat([weight, second]), rows, cols, blocks=2, reduction="sum",
                                     **setting)
    a, b = (penalty_and_gradients(w, rows, cols, reduction="sum", **setting) for w in (weight, second))
    assert_same(together,
                (a.value + b.value, torch.cat([a.weight, b.weight]), a.rows + b.rows, a.cols + b.cols))


@settings(max_examples=examples(20))
@given(**CALL)
def test_masks_are_a_sum(either, manifold, inhibitor, power, seed):
    """What a mask keeps and what it drops add up to the whole; and a mask is zeros in the weight."""
    (weight, rows, cols), setting = problem(manifold, inhibitor, power, seed)
    mask = torch.rand(weight.shape, generator=generator(seed)) < 0.5
    whole = penalty_and_gradients(weight, rows, cols, **setting)
    kept = penalty_and_gradients(weight, rows, cols, mask=mask, **setting)
    dropped = penalty_and_gradients(weight, rows, cols, mask=~mask, **setting)
    assert_same([a + b for a, b in zip(kept, dropped)], whole)
    zeroed = penalty_and_gradients(torch.where(mask, weight, 0), rows, cols, **setting)
    assert_same((kept.value, kept.rows, kept.cols), (zeroed.value, zeroed.rows, zeroed.cols))


@settings(max_examples=examples(20))
@given(**CALL)
def test_shared_points_are_two_equal_embeddings(either, manifold, inhibitor, power, seed):
    (weight, rows, _), setting = problem(manifold, inhibitor, power, seed, 11, 11)
    shared = penalty_and_gradients(weight, rows, **setting)
    apart = penalty_and_gradients(weight, rows, rows.clone(), **setting)
    assert_same(shared[:3], (apart.value, apart.weight, apart.rows + apart.cols))


@settings(max_examples=examples(20))
@given(**CALL, strength=st.floats(-10, 10))
def test_strength_is_linear(either, manifold, inhibitor, power, seed, strength):
    (weight, rows, cols), setting = problem(manifold, inhibitor, power, seed)
    one = penalty_and_gradients(weight, rows, cols, reduction="sum", **setting)
    other = penalty_and_gradients(weight, rows, cols, strength=strength, **setting)
    assert_same([strength / weight.numel() * t for t in one], other)


@settings(max_examples=examples(20))
@given(power=st.sampled_from(POWERS), seed=st.integers(0, 2**31))
def test_product_of_circles_is_a_torus(either, power, seed):
    (weight, rows, cols), _ = problem("torus", "dog", power, seed)
    circle = mk.Circle(10 / (2 * math.pi))
    one = penalty_and_gradients(weight, rows, cols, manifold=mk.Product(circle, circle), power=power)
    assert_same(one, penalty_and_gradients(weight, rows, cols, manifold="torus", power=power))
