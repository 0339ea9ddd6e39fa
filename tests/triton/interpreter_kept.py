"""Compressed rows, sparse masks and the proximal step in Triton's interpreter, tested like interpreter.py:

    TRITON_INTERPRET=1 python -m pytest tests/triton/interpreter_kept.py
"""
from __future__ import annotations

import pytest
import torch

import moduli_kernels as mk
from moduli_kernels import reference
from moduli_kernels.triton.penalty import kept
from tests.support.penalty_cases import (
    INHIBITORS,
    MANIFOLDS,
    Result,
    assert_close,
    draw_points,
    draw_weight,
    expected,
    generator,
    on_a_grid,
    penalty_and_gradients,
    relative_error,
)

pytestmark = [
    pytest.mark.usefixtures("on_triton"),
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning"),
]
CLOSE = {torch.float64: (1e-12, 1e-11), torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-6, 1e-2),
         torch.float16: (1e-6, 2e-3)}
DTYPES = tuple(CLOSE)


def draw_mask(*shape: int, density: float = 0.1) -> torch.Tensor:
    return torch.rand(*shape, generator=generator(5)) < density


def draw(manifold, shape, blocks=1, shared=False, dtype=torch.float32):
    """The weight, and points in the dtype that the kernels compute in."""
    points = torch.float64 if dtype == torch.float64 else torch.float32
    rows = on_a_grid(draw_points(manifold, shape[0], 1, points))
    cols = None if shared else on_a_grid(draw_points(manifold, shape[1], 2, points))
    return draw_weight(blocks * shape[0], *shape[1:], dtype=dtype), rows, cols


def of_csr(weight, rows, cols, *, grad=1.0, **settings) -> Result:
    """penalty_and_gradients for compressed rows, with the weight's gradient as a dense matrix."""
    got = penalty_and_gradients(weight, rows, cols, grad=grad, **settings)
    assert got.weight.layout == torch.sparse_csr
    return got._replace(weight=got.weight.to_dense())


@pytest.mark.parametrize(("manifold", "inhibitor", "power", "dtype", "blocks", "shared"), [
    ("torus", "dog", 1.0, torch.float32, 1, False),
    ("torus", "dog", 1.0, torch.bfloat16, 1, True),
    ("klein", "diffusion", 1.5, torch.float64, 3, False),  # g is not h
    ("klein", "dog", 2.0, torch.float32, 1, True),
    ("sphere", "ricker", 1.0, torch.float16, 4, False),
    ("product", "sinusoid", 2.0, torch.float64, 1, True),
    ("r3", "tabulated", 1.0, torch.float32, 2, False),
    ("s3", "constant", 1.5, torch.float32, 1, False),
], ids=str)
def test_compressed_rows(manifold, inhibitor, power, dtype, blocks, shared):
    m = MANIFOLDS[manifold]
    weight, rows, cols = draw(m, (33, 33 if shared else 47), blocks, shared, dtype)
    mask = draw_mask(*weight.shape)
    mask[4] = mask[:, 7] = False  # an empty row and an empty column
    mask[9] = True  # more entries than are looked at together
    settings = {"manifold": m, "inhibitor": INHIBITORS[inhibitor], "power": power, "blocks": blocks}
    weight = weight * mask
    for grad in (1.0, -3.0):
        got = of_csr(weight.to_sparse_csr(), rows, cols, grad=grad, **settings)
        assert_close(got, expected(weight, rows, cols, mask=mask, grad=grad, **settings), *CLOSE[dtype])


@pytest.mark.parametrize("density", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 150), (150, 7)], ids=str)
def test_densities_of_compressed_rows(shape, density):
    weight, rows, cols = draw("torus", shape)
    mask = draw_mask(*shape, density=density)
    got = of_csr((weight * mask).to_sparse_csr(), rows, cols, manifold="torus")
    assert_close(got, expected(weight, rows, cols, manifold="torus", mask=mask), *CLOSE[torch.float32])


def test_compressed_rows_in_parts_and_repeatedly():
    """What is not asked for is not made, and a second run gives the same bits."""
    weight, rows, cols = draw("sphere", (40, 60))
    csr = (weight * draw_mask(40, 60)).to_sparse_csr()
    whole, again = (of_csr(csr, rows, cols, manifold="sphere") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(whole, again))
    for needed in ((False, False, False), (True, False, False), (False, True, False), (False, False, True)):
        leaves = [t.detach().requires_grad_(need) for t, need in zip((csr, rows, cols), needed)]
        value = mk.moduli_penalty(*leaves, manifold="sphere")
        assert torch.equal(value.detach(), whole.value)
        if any(needed):
            value.backward()
        for leaf, want in zip(leaves, whole[1:]):
            assert (leaf.grad is None) == (not leaf.requires_grad)
            assert leaf.grad is None or torch.equal(leaf.grad.to_dense(), want)


def test_bad_points_of_compressed_rows():
    """Points that are not finite count where an entry is kept, and only there."""
    weight, rows, cols = draw("torus", (20, 30))
    mask = draw_mask(20, 30)
    mask[:, 0] = mask[3] = False
    cols[0] = rows[3] = float("nan")
    got = of_csr((weight * mask).to_sparse_csr(), rows, cols, manifold="torus")
    assert all(t.isfinite().all() for t in got)
    mask[5, 0] = True
    got = of_csr((weight * mask).to_sparse_csr(), rows, cols, manifold="torus")
    assert got.value.isnan() and got.rows[5].isnan().all() and got.cols[0].isnan().all()
    assert got.rows[:5].isfinite().all() and got.cols[1:].isfinite().all()


def test_accumulates_into_compressed_gradients():
    weight, rows, cols = draw("torus", (40, 30))
    mask = draw_mask(40, 30)
    leaf = (weight * mask).to_sparse_csr().requires_grad_()
    want = expected(weight, rows, cols, manifold="torus", mask=mask)
    for times in (1, 2):
        value = mk.accumulate_penalty_grad_(leaf, rows.requires_grad_(), cols, manifold="torus")
        assert relative_error(value, want.value) <= 1e-6
        assert relative_error(leaf.grad.to_dense(), times * want.weight) <= 1e-5
        assert relative_error(rows.grad, times * want.rows) <= 1e-5


def test_columns_are_sorted_stably():
    mask = draw_mask(60, 41)
    crow, col = (index(mask.float().to_sparse_csr()) for index in (torch.Tensor.crow_indices, torch.Tensor.col_indices))
    got = kept.by_column(crow, col, 20, 41, 3)
    columns, rows = mask.t().nonzero().unbind(1)
    assert torch.equal(got.partners.long(), rows % 20) and torch.equal(col[got.places], columns)
    assert torch.equal(got.starts.diff(), mask.sum(0))


# --- masks -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize(("shape", "blocks"), [((40, 160), 1), ((40, 70), 1), ((33, 64), 3), ((9, 12, 3), 1)], ids=str)
def test_masks_of_blocks_and_of_few_entries(shape, blocks, into):
    """Whole tiles have no kept entry. Masked entries of an existing gradient keep their bits, even NaN."""
    weight, rows, cols = draw("torus", shape, blocks)
    mask = draw_mask(*weight.shape, density=0.02)
    mask[:32] = False
    mask[:8, :8] = True
    settings = {"manifold": "torus", "blocks": blocks, "mask": mask}
    want = expected(weight, rows, cols, **settings)
    leaves = [t.requires_grad_() for t in (weight, rows, cols)]
    before = torch.full_like(weight, float("nan") if into else 0.0).masked_fill(mask, 1.0 if into else 0.0)
    if into:
        weight.grad = before.clone()
    value = mk.accumulate_penalty_grad_(*leaves, **settings)
    got = Result(value, (weight.grad - before).where(mask, 0), rows.grad, cols.grad)
    assert_close(got, want, 1e-6, 1e-5)
    assert torch.equal(weight.grad.isnan(), before.isnan())


# --- the proximal step -----------------------------------------------------------------------------------

def check_proximal(weight, rows, cols, *, step, mask=None, manifold="torus", inhibitor=None, blocks=1, tolerance=1e-5):
    """Compares with the reference in float64, and returns the new weight."""
    what = reference.Penalty(mk.manifold(manifold), inhibitor or mk.DifferenceOfGaussians(), 1.0, blocks, 1.0)
    want = weight.double().clone()
    reference.proximal_step_(want, rows.double(), None if cols is None else cols.double(), mask, what, step)
    got = weight.clone()
    mk.proximal_step_(got, rows, cols, manifold=manifold, inhibitor=inhibitor, blocks=blocks, mask=mask, step=step,
                      reduction="sum")
    assert torch.equal(got.isnan(), want.isnan())
    assert relative_error(got.nan_to_num(), want.nan_to_num()) <= tolerance
    if mask is not None:
        assert torch.equal(got[~mask], weight[~mask])
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "blocks", "density"), [
    ((35, 35), 1, 1), ((64, 32), 1, 1), ((20, 33), 3, 1), ((33, 70), 1, 0.1), ((9, 12, 2, 3), 1, 1),
    ((9, 12, 5), 1, 0.3), ((0, 5), 1, 1)], ids=str)
def test_proximal_step(shape, blocks, density, dtype):
    weight, rows, cols = draw("torus", shape, blocks, shape[0] == shape[1], dtype)
    mask = draw_mask(*weight.shape, density=density) if density < 1 else None
    got = check_proximal(weight, rows, cols, step=0.5, mask=mask, blocks=blocks, tolerance=CLOSE[dtype][1])
    if weight.dim() == 2 and weight.numel() and mask is None:
        assert 0.1 < (got == 0).float().mean() < 1


@pytest.mark.parametrize("manifold", ["klein", "sphere", "product"])
def test_proximal_step_on_other_manifolds(manifold):
    m = MANIFOLDS[manifold]
    weight, rows, cols = draw(m, (20, 30), dtype=torch.float64)
    wide = torch.cat([weight, weight], 1)
    for inhibitor in (mk.Diffusion(), mk.Constant(0.5)):
        check_proximal(wide[:, 5:35], rows, cols, step=0.01, manifold=m, inhibitor=inhibitor, tolerance=1e-11)


def test_proximal_step_of_compressed_rows():
    for blocks in (1, 3):
        weight, rows, cols = draw("torus", (30, 40), blocks)
        mask = draw_mask(*weight.shape)
        weight = weight * mask
        csr = weight.to_sparse_csr()
        mk.proximal_step_(csr, rows, cols, manifold="torus", step=0.5, blocks=blocks, reduction="sum")
        want = check_proximal(weight, rows, cols, step=0.5, mask=mask, blocks=blocks)
        assert relative_error(csr.to_dense(), want) <= 1e-6


def test_proximal_step_of_zeros_and_of_what_is_not_finite():
    weight, rows, cols = draw("torus", (12, 12))
    weight[0], weight[3, 4], weight[4, 4] = 0, float("nan"), float("inf")
    cols[7] = float("nan")
    f = mk.TabulatedInhibitor(torch.cos, 25.0)  # negative here and there
    got = check_proximal(weight.masked_fill(weight.isinf(), 1.0), rows, cols, step=0.5, inhibitor=f)
    kept = torch.arange(12) != 7
    assert not got[0, kept].any() and got[0, 7].isnan()
    mk.proximal_step_(weight, rows, cols, manifold="torus", step=0.5, reduction="sum")
    assert weight[3, 4].isnan() and weight[4, 4] == float("inf") and weight[:, 7].isnan().all()
