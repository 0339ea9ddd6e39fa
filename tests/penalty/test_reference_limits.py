"""What reference.py promises beside the right numbers: strips, no second matrix, NaN and infinity go on."""
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moduli_kernels.reference import penalty as reference_penalty
from tests.penalty.test_reference import draw_mask, penalty, points, run
from tests.support.penalty_cases import INHIBITORS, MANIFOLDS, draw_points, draw_weight, generator

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")


# --- strips ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tile", [1, 50, 97])
@pytest.mark.parametrize("form", ["dense", "kernel", "masked", "compressed"])
def test_how_it_is_cut_in_strips_does_not_matter(monkeypatch, tile, form):
    weight = draw_weight(26, 7, *([3] if form == "kernel" else []), dtype=torch.float64)
    mask = draw_mask(26, 7)
    if form == "compressed":
        weight = torch.where(mask, weight, 0).to_sparse_csr()
    rows, cols = points("klein", 13), points("klein", 7, seed=1)
    arguments = weight, rows, cols, mask if form == "masked" else None, penalty("klein", blocks=2)
    value, grads = run(*arguments)
    monkeypatch.setattr(reference_penalty, "TILE", tile)
    other, other_grads = run(*arguments)
    torch.testing.assert_close(other, value, rtol=1e-14, atol=0)
    for g, o in zip(grads, other_grads):
        g, o = (t.to_dense() if t.layout == torch.sparse_csr else t for t in (g, o))
        torch.testing.assert_close(o, g, rtol=1e-13, atol=1e-13)


class Allocations(TorchDispatchMode):
    """Bytes of every storage that comes up, those of `known` tensors aside."""

    def __init__(self, *known):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                place, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
                if place not in self.known:
                    self.sizes[place] = max(self.sizes.get(place, 0), size)
        return out


@pytest.mark.parametrize("name", MANIFOLDS)
@pytest.mark.parametrize("blocks, masked", [(1, False), (1, True), (4, False)])
def test_no_second_matrix_is_made(monkeypatch, name, blocks, masked):
    n, tile = 128, 1 << 11
    monkeypatch.setattr(reference_penalty, "TILE", tile)
    weight, rows, cols = draw_weight(n, n), draw_points(name, n // blocks), draw_points(name, n, seed=1)
    mask = draw_mask(n, n) if masked else None
    with Allocations(*(t for t in (weight, rows, cols, mask) if t is not None)) as made:
        _, grads = run(weight, rows, cols, mask, penalty(name, blocks=blocks))
    assert made.sizes.pop(grads.weight.untyped_storage().data_ptr()) == 4 * n * n
    assert max(made.sizes.values()) <= 4 * tile  # float32; n x n x 4 bytes is 8 times as much


def test_no_second_matrix_is_made_for_compressed_rows(monkeypatch):
    n, tile = 128, 1 << 11
    monkeypatch.setattr(reference_penalty, "TILE", tile)
    weight = torch.where(torch.rand(n, n, generator=generator()) < 0.01, draw_weight(n, n), 0).to_sparse_csr()
    rows = draw_points("torus", n)
    with Allocations(weight.values(), weight.col_indices(), weight.crow_indices(), rows) as made:
        run(weight, rows)
    assert max(made.sizes.values()) <= 4 * tile


# --- what is not finite ----------------------------------------------------------------------------------

@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("inhibitor", INHIBITORS)
@pytest.mark.parametrize("where", ["weight", "rows", "cols"])
def test_what_is_not_finite_reaches_the_value(bad, inhibitor, where):
    for name in MANIFOLDS:
        weight, rows, cols = draw_weight(5, 4), draw_points(name, 5), draw_points(name, 4, seed=1)
        {"weight": weight, "rows": rows, "cols": cols}[where][2, -1] = bad
        value = run(weight, rows, cols, what=penalty(name, inhibitor))[0]
        assert not value.isfinite() and (where == "weight" or value.isnan()), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kernel", [(), (3,)])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_masked_entries_may_be_anything(bad, kernel, power):
    weight, mask = draw_weight(5, 4, *kernel, dtype=torch.float64), draw_mask(5, 4, *kernel)
    rows, cols = points("torus", 5), points("torus", 4, seed=1)
    what = penalty(power=power)
    clean, clean_grads = run(torch.where(mask, weight, 0.0), rows, cols, mask, what)
    value, grads = run(torch.where(mask, weight, bad), rows, cols, mask, what)
    assert value == clean and all(torch.equal(a, b) for a, b in zip(grads, clean_grads))
    assert (grads.weight[~mask] == 0).all()


@pytest.mark.parametrize("name", MANIFOLDS)
@pytest.mark.parametrize("inhibitor", INHIBITORS)
def test_points_of_rows_masked_whole_may_be_anything(name, inhibitor):
    weight, mask = draw_weight(5, 4, dtype=torch.float64), draw_mask(5, 4)
    rows, cols = points(name, 5), points(name, 4, seed=1)
    mask[2] = False
    clean, clean_grads = run(weight, rows, cols, mask, penalty(name, inhibitor))
    rows[2] = math.nan
    value, grads = run(weight, rows, cols, mask, penalty(name, inhibitor))
    assert value == clean and torch.equal(grads.weight, clean_grads.weight)


def test_a_stored_nan_of_compressed_rows_reaches_the_value():
    weight = torch.eye(4)
    weight[2, 2] = math.nan
    assert run(weight.to_sparse_csr(), draw_points("torus", 4))[0].isnan()


def test_compressed_gradients_come_without_torchs_warning_about_unchecked_indices():
    weight = torch.eye(4).to_sparse_csr()
    torch.set_warn_always(True)  # else once a process
    try:
        run(weight, draw_points("torus", 4))
    finally:
        torch.set_warn_always(False)
