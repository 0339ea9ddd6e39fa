"""geometric_mask keeps exactly so many pairs, or blocks, and those that are nearest on the manifold."""
import math

import numpy as np
import pytest
import torch

import moduli_kernels as mk
from moduli_kernels import geometry
from tests.support.penalty_cases import with_every_class

PRESETS = ("torus", "torus6", "circle", "sphere", "s3", "klein", "r3", "mixed")
MANIFOLDS = with_every_class({name: mk.manifold(name) for name in PRESETS}, geometry.MANIFOLDS)


def sample(m, n, seed=0):
    return mk.manifold(m).sample(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blocks_of(mask, rows, cols, side, m="torus"):
    """The mask in manifold order, as (blocks down, blocks across, side, side); sizes must be multiples of side."""
    ordered = mask[mk.manifold_order(rows, m)][:, mk.manifold_order(cols, m)]
    return ordered.unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2)


@pytest.mark.parametrize("m", MANIFOLDS.values(), ids=MANIFOLDS.keys())
def test_keeps_the_nearest_pairs_of_every_manifold(m):
    rows, cols = sample(m, 30), sample(m, 41, seed=1)
    mask = mk.geometric_mask(rows, cols, manifold=m, density=0.13)
    assert mask.dtype == torch.bool and mask.shape == (30, 41) and int(mask.sum()) == round(0.13 * 30 * 41)
    distance = m.distance(rows, cols)
    assert distance[mask].max() <= distance[~mask].min()


@pytest.mark.parametrize("m", MANIFOLDS.values(), ids=MANIFOLDS.keys())
def test_keeps_the_nearest_blocks_of_every_manifold(m):
    rows, cols = sample(m, 64), sample(m, 96, seed=1)
    mask = mk.geometric_mask(rows, cols, manifold=m, density=0.2, block=8)
    kept = blocks_of(mask, rows, cols, 8, m)
    assert torch.equal(kept.all(3).all(2), kept.any(3).any(2)) and int(kept[..., 0, 0].sum()) == round(0.2 * 8 * 12)
    order, columns = mk.manifold_order(rows, m), mk.manifold_order(cols, m)
    distance = m.distance(rows, cols)[order][:, columns]
    means = distance.unflatten(0, (-1, 8)).unflatten(2, (-1, 8)).mean((1, 3))
    assert means[kept[..., 0, 0]].max() <= means[~kept[..., 0, 0]].min()


@pytest.mark.parametrize("density, count", [(0.0, 0), (1.0, 400), (0.00125, 0), (0.00375, 2), (0.5, 200), (1, 400)])
def test_count_is_pythons_round(density, count):
    assert int(mk.geometric_mask(sample("torus", 20), manifold="torus", density=density).sum()) == count


def test_without_columns_the_rows_are_their_own_columns():
    points = sample("torus", 50)
    mask = mk.geometric_mask(points, manifold="torus", density=0.1)
    assert torch.equal(mask, mk.geometric_mask(points, points, manifold="torus", density=0.1))
    assert mask.diagonal().all()


def test_masks_grow_with_the_density():
    points = sample("klein", 64)
    for block in (None, 4):
        sparse, dense = (mk.geometric_mask(points, manifold="klein", density=d, block=block) for d in (0.1, 0.3))
        assert (dense | ~sparse).all() and dense.sum() > sparse.sum()


def test_blocks_at_the_edges_are_smaller():
    rows, cols = sample("circle", 21), sample("circle", 13, seed=1)
    mask = mk.geometric_mask(rows, cols, manifold="circle", density=0.5, block=(8, 4))
    ordered = mask[mk.manifold_order(rows, "circle")][:, mk.manifold_order(cols, "circle")]
    parts = [tile for strip in ordered.split(8) for tile in strip.split(4, dim=1)]
    assert [tile.shape for tile in parts[-2:]] == [(5, 4), (5, 1)]
    assert all(tile.all() == tile.any() for tile in parts)
    assert sum(bool(tile.any()) for tile in parts) == round(0.5 * 3 * 4)


def test_ties_go_to_the_first_pairs():
    points = torch.zeros(6, 1, dtype=torch.float64)
    mask = mk.geometric_mask(points, manifold="circle", density=10 / 36)
    assert torch.equal(mask.flatten(), torch.arange(36) < 10)


def test_a_generator_draws_among_ties_alone():
    points = torch.tensor([[0.0], [1.0], [2.0], [3.0]]).repeat(4, 1)
    d = mk.Circle().distance(points, points)
    draws = [mk.geometric_mask(points, manifold="circle", density=0.5, generator=torch.Generator().manual_seed(seed))
             for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    for mask in draws:
        assert int(mask.sum()) == 128 and mask[d < 0.5].all() and not mask[d > 1.5].any()
    plain = mk.geometric_mask(points, manifold="circle", density=0.25)  # 64 pairs at distance 0: no tie
    assert torch.equal(plain, mk.geometric_mask(points, manifold="circle", density=0.25,
                                                generator=torch.Generator().manual_seed(5)))


def test_dtype_and_equivalent_coordinates_change_nothing():
    points = sample("torus", 100).float()
    mask = mk.geometric_mask(points, manifold="torus", density=0.05, block=10)
    assert torch.equal(mask, mk.geometric_mask(points.double(), manifold="torus", density=0.05, block=10))
    assert torch.equal(mask, mk.geometric_mask(torch.nn.Parameter(points), manifold=mk.FlatTorus(), density=0.05,
                                               block=10))


def test_own_manifold():
    class Line(mk.Manifold):
        ambient_dim = 1

        def squared_distance(self, x, y):
            return (x[:, :1] - y[:, 0]).square()

    points = torch.arange(10.0)[:, None]
    mask = mk.geometric_mask(points, manifold=Line(), density=0.28)
    assert torch.equal(mask, (torch.arange(10)[:, None] - torch.arange(10)).abs() <= 1)


def test_blocks_are_what_sparse_rnn_takes():
    points = sample("torus", 128)
    rnn = mk.SparseRNN(2, 128, path="sparse")
    mask = mk.geometric_mask(points, manifold="torus", density=0.1, block=16)
    rnn.set_mask("weight_hh_l0", mask)
    rnn.set_order("weight_hh_l0", mk.manifold_order(points, "torus"))
    x = torch.randn(5, 3, 2)
    torch.testing.assert_close(rnn(x)[0], rnn.to_rnn()(x)[0])
    assert int(mask.sum()) == round(0.1 * 64) * 256


def test_a_start_scaled_by_the_root_of_the_density_has_a_dense_nets_input():
    n, density = 512, 0.05
    mask = mk.geometric_mask(sample("torus", n), manifold="torus", density=density, block=16)
    weight = (torch.rand(n, n, generator=torch.Generator().manual_seed(0)) * 2 - 1) / math.sqrt(n)
    state = torch.randn(n, 200, generator=torch.Generator().manual_seed(1))
    dense, sparse = weight @ state, (weight / density**0.5 * mask) @ state
    assert abs(sparse.square().mean() / dense.square().mean() - 1) < 0.05


@pytest.mark.parametrize("arguments, error, text", [
    ({"rows": np.zeros((3, 2))}, TypeError, "rows must be a tensor, got a ndarray; pass torch.as_tensor(rows)."),
    ({"rows": torch.zeros(3, 3)}, ValueError, "rows must have shape (3, 2) for n=3 on FlatTorus(periods=(10.0, "
     "10.0)), got (3, 3); give one row a neuron."),
    ({"cols": torch.zeros(4)}, ValueError, "cols must have shape (4, 2) for n=4 on FlatTorus(periods=(10.0, 10.0)), "
     "got (4,); give one row a neuron."),
    ({"cols": torch.zeros(3, 2, dtype=torch.int64)}, TypeError,
     "cols must be floating point, got torch.int64; convert them with .float()."),
    ({"rows": torch.tensor([[1.0, math.nan]])}, ValueError,
     "rows must be finite, got NaN or infinity among them; clean the rows first."),
    ({"rows": torch.ones(3, 2, device="meta")}, ValueError,
     "rows must have values, got a tensor on the meta device; call reset_parameters() after to_empty()."),
    ({"manifold": "ball"}, ValueError, "manifold must be a Manifold or one of 'torus', 'torus6', 'circle', 'sphere', "
     "'s3', 'klein', 'r3', 'mixed', got 'ball'; pick one of them."),
    ({"density": 1.1}, ValueError, "density must be in [0, 1], got 1.1; pass a fraction, e.g. 0.9 for 90 %."),
    ({"density": "0.1"}, TypeError, "density must be a number in [0, 1], got a str; pass e.g. density=0.9."),
    ({"block": 0}, ValueError, "block must be an integer of at least 1, got 0; pass a larger one."),
    ({"block": 16.0}, TypeError, "block must be an integer of at least 1, got 16.0; pass an int."),
    ({"block": (16, 16, 16)}, ValueError,
     "block must be a side or two (rows, columns), got 3 numbers; pass e.g. 16."),
])
def test_errors(arguments, error, text):
    with pytest.raises(error) as caught:
        mk.geometric_mask(**{"rows": torch.ones(3, 2), "manifold": "torus", "density": 0.5, **arguments})
    assert str(caught.value) == text
