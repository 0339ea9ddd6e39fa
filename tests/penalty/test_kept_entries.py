"""Masks of every density and compressed rows: kept entries alone count, on every backend."""
from __future__ import annotations

import pytest
import torch

import moduli_kernels as mk
from tests.support.penalty_cases import (
    BACKENDS,
    INHIBITORS,
    MANIFOLDS,
    POWERS,
    Result,
    assert_close,
    draw_points,
    draw_weight,
    expected,
    generator,
    needs_cpp,
    on_device,
    penalty_and_gradients,
)

pytestmark = [on_device, pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")]
CLOSE = {torch.float64: (1e-13, 1e-12), torch.float32: (1e-6, 1e-5)}


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with mk.backend(request.param):
        yield request.param


def draw_mask(*shape: int, density: float, seed: int = 5) -> torch.Tensor:
    return torch.rand(*shape, generator=generator(seed)) < density


def of_csr(weight, rows, cols=None, **settings) -> Result:
    """Value and gradients of a compressed weight; the weight's gradient as the dense matrix."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (weight, rows, cols)]
    value = mk.moduli_penalty(*leaves, **settings)
    value.backward()
    grads = [None if t is None else t.grad for t in leaves]
    assert grads[0].layout == torch.sparse_csr
    assert torch.equal(grads[0].col_indices(), weight.col_indices())
    return Result(value.detach(), grads[0].to_dense(), *grads[1:])


@pytest.mark.parametrize("density", [0.0, 0.02, 0.2, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (33, 130), (130, 33), (40, 1100)])
def test_densities(shape, density):
    weight, mask = draw_weight(*shape), draw_mask(*shape, density=density)
    rows, cols = draw_points("torus", shape[0]), draw_points("torus", shape[1], 1)
    got = penalty_and_gradients(weight, rows, cols, manifold="torus", mask=mask)
    assert_close(got, expected(weight, rows, cols, manifold="torus", mask=mask), *CLOSE[torch.float32])
    assert not got.weight[~mask].any()


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("inhibitor", [name for name in INHIBITORS if name != "callable"])
@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_sparse_masks_and_compressed_rows(manifold, inhibitor, power):
    m = MANIFOLDS[manifold]
    settings = {"manifold": m, "inhibitor": INHIBITORS[inhibitor], "power": power}
    mask = draw_mask(23, 23, density=0.1)
    weight, points = draw_weight(23, 23, dtype=torch.float64) * mask, draw_points(m, 23, dtype=torch.float64)
    want = expected(weight, points, mask=mask, **settings)
    assert_close(penalty_and_gradients(weight, points, mask=mask, **settings), want, *CLOSE[torch.float64])
    assert_close(of_csr(weight.to_sparse_csr(), points, **settings), want, *CLOSE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    mask = draw_mask(40, 60, density=0.1)
    weight = draw_weight(40, 60, dtype=dtype) * mask
    rows, cols = draw_points("sphere", 40), draw_points("sphere", 60, 1)
    want = expected(weight, rows, cols, manifold="sphere", mask=mask)
    assert_close(penalty_and_gradients(weight, rows, cols, manifold="sphere", mask=mask), want, 1e-6, 5e-3)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("blocks", [1, 3])
def test_compressed_gate_blocks(blocks, index):
    mask = draw_mask(blocks * 20, 31, density=0.15)
    mask[4] = False  # an empty row
    weight = draw_weight(blocks * 20, 31) * mask
    csr = weight.to_sparse_csr()
    csr = torch.sparse_csr_tensor(csr.crow_indices().to(index), csr.col_indices().to(index), csr.values(), csr.shape,
                                  check_invariants=True)
    rows, cols = draw_points("klein", 20), draw_points("klein", 31, 1)
    want = expected(weight, rows, cols, manifold="klein", blocks=blocks, mask=mask)
    assert_close(of_csr(csr, rows, cols, manifold="klein", blocks=blocks), want, *CLOSE[torch.float32])
    assert_close(penalty_and_gradients(weight, rows, cols, manifold="klein", blocks=blocks, mask=mask), want,
                 *CLOSE[torch.float32])


def test_stored_zeros_are_entries():
    weight = torch.sparse_csr_tensor(torch.tensor([0, 2, 3]), torch.tensor([0, 1, 1]), torch.tensor([0.0, 2.0, -1.0]),
                                     (2, 2), check_invariants=True)
    points = draw_points("torus", 2)
    got = of_csr(weight, points, manifold="torus", power=2)
    want = expected(weight.to_dense(), points, manifold="torus", power=2)
    assert_close(got._replace(weight=None), want._replace(weight=None), *CLOSE[torch.float32])


def test_rows_of_many_kept_entries_beside_rows_of_few():
    mask = draw_mask(24, 700, density=0.05)
    mask[::3] = True
    mask[1] = False
    weight, rows, cols = draw_weight(24, 700), draw_points("torus", 24), draw_points("torus", 700, 1)
    got = penalty_and_gradients(weight, rows, cols, manifold="torus", mask=mask)
    assert_close(got, expected(weight, rows, cols, manifold="torus", mask=mask), *CLOSE[torch.float32])


def test_strided_weight_under_a_sparse_mask():
    wide, mask = draw_weight(30, 90), draw_mask(30, 50, density=0.1)
    rows, cols = draw_points("torus", 30), draw_points("torus", 50, 1)
    got = penalty_and_gradients(wide[:, 7:57], rows, cols, manifold="torus", mask=mask)
    assert_close(got, expected(wide[:, 7:57], rows, cols, manifold="torus", mask=mask), *CLOSE[torch.float32])


@pytest.mark.parametrize("density", [0.05, 0.6])
def test_what_is_masked_is_not_looked_at(density):
    """NaN and infinity in masked entries change nothing."""
    mask = draw_mask(40, 40, density=density)
    weight, points = draw_weight(40, 40), draw_points("torus", 40)
    clean = penalty_and_gradients(weight * mask, points, manifold="torus", mask=mask)
    bad = torch.where(mask, weight, torch.tensor(float("nan")))
    got = penalty_and_gradients(bad, points, manifold="torus", mask=mask)
    assert torch.equal(got.value, clean.value) and torch.equal(got.weight, clean.weight)
    assert torch.equal(got.rows, clean.rows)


@pytest.mark.parametrize("density", [0.05, 0.6])
def test_bad_points_reach_the_value_through_kept_entries_only(density, backend):
    mask = draw_mask(40, 40, density=density)
    mask[:, 7] = mask[7] = False
    weight, points = draw_weight(40, 40), draw_points("torus", 40)
    points[7] = float("nan")
    got = penalty_and_gradients(weight, points, manifold="torus", mask=mask)
    assert got.value.isfinite() and got.weight.isfinite().all()
    mask[3, 7] = True
    assert penalty_and_gradients(weight, points, manifold="torus", mask=mask).value.isnan()


@needs_cpp
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_same_bits_for_any_number_of_threads(threads):
    mask = draw_mask(300, 300, density=0.02)
    weight, points = (draw_weight(300, 300) * mask).to_sparse_csr(), draw_points("torus", 300)
    with mk.backend("cpp"):
        want = of_csr(weight, points, manifold="torus")
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            got = of_csr(weight, points, manifold="torus")
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3]))
