"""Tests ManifoldEmbedding: its points and layouts, what is trained and saved, and its errors word for word."""
import copy

import pytest
import torch
from torch import nn

import moduli_kernels as mk
from moduli_kernels.geometry.presets import PRESETS


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- points ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("n", [0, 1, 37])
def test_one_point_a_neuron(name, n):
    embedding = mk.ManifoldEmbedding(n, name)
    assert embedding.points.shape == (n, PRESETS[name].ambient_dim)
    assert len(embedding) == n and embedding.manifold is PRESETS[name]
    assert embedding.points.dtype == torch.float32 and embedding.points.isfinite().all()


def test_the_torus_is_the_default_and_any_manifold_is_taken():
    assert mk.ManifoldEmbedding(3).manifold == mk.FlatTorus()
    m = mk.Product(mk.Circle(2.0), mk.Sphere())
    assert mk.ManifoldEmbedding(3, m).manifold is m


@pytest.mark.parametrize("name", PRESETS)
def test_points_are_the_manifolds_sample_and_repeat_with_the_generator(name):
    points = mk.ManifoldEmbedding(50, name, generator=seeded(3)).points
    assert torch.equal(points, PRESETS[name].sample(50, generator=seeded(3)))
    assert torch.equal(points, mk.ManifoldEmbedding(50, name, generator=seeded(3), trainable=True).points)
    assert not torch.equal(points, mk.ManifoldEmbedding(50, name, generator=seeded(4)).points)
    torch.manual_seed(5)
    first = mk.ManifoldEmbedding(50, name).points
    torch.manual_seed(5)
    assert torch.equal(first, mk.ManifoldEmbedding(50, name).points)


def test_points_of_its_own_generator_leave_the_global_one_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    mk.ManifoldEmbedding(50, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["torus", "torus6", "circle", "sphere", "klein", "r3"])
def test_grid(name):
    points = mk.ManifoldEmbedding(64, name, layout="grid").points
    assert points.dtype == torch.float32 and torch.equal(points, PRESETS[name].grid(64).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_and_device(dtype):
    for options in ({}, {"layout": "grid"}, {"points": torch.zeros(9, 2)}):
        points = mk.ManifoldEmbedding(9, dtype=dtype, device="cpu", **options).points
        assert points.dtype == dtype and points.device.type == "cpu"


def test_the_default_dtype_is_followed():
    torch.set_default_dtype(torch.float64)
    try:
        assert mk.ManifoldEmbedding(9).points.dtype == torch.float64
        assert mk.ManifoldEmbedding(9, layout="grid").points.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("trainable", [False, True])
def test_given_points_are_copied_whatever_they_are(trainable):
    given = nn.Parameter(torch.rand(4, 2, generator=seeded(), dtype=torch.float64) * 30 - 10)
    embedding = mk.ManifoldEmbedding(4, points=given, trainable=trainable)
    assert torch.equal(embedding.points, given) and embedding.points.dtype == torch.float64
    with torch.no_grad():
        embedding.points += 1
    assert not torch.equal(embedding.points, given)
    assert embedding.points.is_leaf and embedding.points.requires_grad == trainable


# --- a module --------------------------------------------------------------------------------------------

def test_frozen_points_are_a_buffer_trained_ones_a_parameter():
    frozen, trained = mk.ManifoldEmbedding(5), mk.ManifoldEmbedding(5, trainable=True)
    assert [name for name, _ in frozen.named_buffers()] == ["points"] and not list(frozen.parameters())
    assert [name for name, _ in trained.named_parameters()] == ["points"] and not list(trained.buffers())
    assert not frozen.trainable and trained.trainable
    trained.requires_grad_(False)  # as lottery runs freeze it
    assert not trained.trainable


def test_shared_between_layers_it_is_one_module():
    embedding = mk.ManifoldEmbedding(5, trainable=True)
    layers = nn.ModuleList([nn.ModuleDict({"rows": embedding}), nn.ModuleDict({"cols": embedding})])
    assert len(list(layers.parameters())) == 1
    twin = copy.deepcopy(layers)
    assert twin[0]["rows"] is twin[1]["cols"] and twin[0]["rows"] is not embedding


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_state_dict_round_trip_also_between_frozen_and_trained(before, after):
    source = mk.ManifoldEmbedding(6, "sphere", generator=seeded(1), trainable=before)
    target = mk.ManifoldEmbedding(6, "sphere", generator=seeded(2), trainable=after)
    assert list(source.state_dict()) == ["points"]
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.points, source.points) and target.trainable == after
    with pytest.raises(RuntimeError, match="size mismatch for points"):
        mk.ManifoldEmbedding(7, "sphere").load_state_dict(source.state_dict())


@pytest.mark.parametrize("trainable", [False, True])
def test_moves_as_modules_do(trainable):
    embedding = mk.ManifoldEmbedding(6, trainable=trainable)
    assert embedding.double().points.dtype == torch.float64
    assert embedding.to("meta").points.is_meta
    assert embedding.trainable == trainable


def test_gradients_reach_trained_points():
    embedding = mk.ManifoldEmbedding(6, trainable=True, generator=seeded())
    mk.moduli_penalty(torch.ones(6, 6), embedding.points, manifold=embedding.manifold).backward()
    assert embedding.points.grad.abs().min() > 0


@pytest.mark.parametrize("trainable", [False, True])
def test_what_is_printed(trainable):
    text = repr(mk.ManifoldEmbedding(6, "circle", trainable=trainable))
    assert text == f"ManifoldEmbedding(6, Circle(radius=5.0), trainable={trainable})"


# --- errors ----------------------------------------------------------------------------------------------

TORUS, SPHERE = "FlatTorus(periods=(10.0, 10.0))", "Sphere(dim=2, radius=5.0)"
NAN, ZERO = torch.full((3, 2), float("nan")), torch.eye(3).index_fill_(0, torch.tensor([2]), 0.0)


@pytest.mark.parametrize("make, error, message", [
    (lambda: mk.ManifoldEmbedding(-1), ValueError,
     "n must be an integer of at least 0, got -1; pass a larger one."),
    (lambda: mk.ManifoldEmbedding(3.0), TypeError,
     "n must be an integer of at least 0, got 3.0; pass an int."),
    (lambda: mk.ManifoldEmbedding(True), TypeError,
     "n must be an integer of at least 0, got True; pass an int."),
    (lambda: mk.ManifoldEmbedding(3, layout="random"), ValueError,
     "layout must be one of 'uniform', 'grid', got 'random'; pick one of them."),
    (lambda: mk.ManifoldEmbedding(3, "s3", layout="grid"), ValueError,
     "layout must be 'uniform' for Sphere(dim=3, radius=5.0), got 'grid' (only flat manifolds and the "
     "2-sphere have one); use 'uniform' or pass points="),
    (lambda: mk.ManifoldEmbedding(3, "plane"), ValueError,
     "manifold must be a Manifold or one of 'torus', 'torus6', 'circle', 'sphere', 's3', 'klein', 'r3', "
     "'mixed', got 'plane'; pick one of them."),
    (lambda: mk.ManifoldEmbedding(3, points=[[0.0, 0.0]] * 3), TypeError,
     "points must be a tensor, got a list; pass torch.as_tensor(points)."),
    (lambda: mk.ManifoldEmbedding(3, points=torch.zeros(4, 2)), ValueError,
     f"points must have shape (3, 2) for n=3 on {TORUS}, got (4, 2); give one row a neuron."),
    (lambda: mk.ManifoldEmbedding(3, "sphere", points=torch.zeros(3, 2)), ValueError,
     f"points must have shape (3, 3) for n=3 on {SPHERE}, got (3, 2); give one row a neuron."),
    (lambda: mk.ManifoldEmbedding(3, points=torch.zeros(3, 2, dtype=torch.int64)), TypeError,
     "points must be floating point, got torch.int64; convert them with .float()."),
    (lambda: mk.ManifoldEmbedding(3, points=NAN), ValueError,
     "points must be finite, got NaN or infinity among them; clean the rows first."),
    (lambda: mk.ManifoldEmbedding(3, "sphere", points=ZERO), ValueError,
     f"points must not hold a zero vector on {SPHERE} (it cannot be normalized), got one at row 2; give "
     "every row a direction."),
])
def test_errors(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == message
