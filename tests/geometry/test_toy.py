"""A manifold and an inhibitor are added to a copy of the package by one Python class each, and then work everywhere.

tests/support/toys.py adds the classes. The copy has no compiled kernels, so that the reference computes the penalty.
"""
from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.support.toys import INHIBITOR, MANIFOLD, add_toys

ROOT = pathlib.Path(__file__).resolve().parents[2]

PROGRAM = '''
import io, itertools, math, pickle

import numpy as np
import torch

import moduli_kernels as mk
from moduli_kernels import geometry
from moduli_kernels.geometry.encoding import decode_inhibitor, decode_manifold, encode_inhibitor, encode_manifold
from tests.support.penalty_cases import INHIBITORS, MANIFOLDS

m, f = mk.HexagonalTorus(7.0), mk.Saturation(2.0, 1.5)


def random(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The classes are known, public and tested.
assert geometry.MANIFOLDS[-1] is mk.HexagonalTorus and geometry.INHIBITORS[-1] is mk.Saturation
assert {"HexagonalTorus", "Saturation"} <= set(mk.__all__)
assert MANIFOLDS["HexagonalTorus"] == mk.HexagonalTorus() and INHIBITORS["Saturation"] == mk.Saturation()

# Distances are those to the nearest of all images; gradients are those of autograd.
x, y, slope = 40 * random(50, 2, seed=0) - 20, 40 * random(60, 2, seed=1) - 20, random(50, 60, seed=2)
nearest = np.full((50, 60), np.inf)
for i, j in itertools.product(range(-20, 21), repeat=2):
    image = y.numpy() + [i * 7 + j * 3.5, j * 3.5 * math.sqrt(3)]
    nearest = np.minimum(nearest, np.linalg.norm(x.numpy()[:, None] - image, axis=-1))
assert np.abs(m.distance(x, y).numpy() - nearest).max() < 1e-13
for by_hand, by_autograd in zip(m.pull_back(x, y, slope), mk.Manifold.pull_back(m, x, y, slope)):
    torch.testing.assert_close(by_hand, by_autograd, rtol=0, atol=1e-12)
s = (30 * random(100, seed=3)).requires_grad_()
torch.testing.assert_close(f.slope(s.detach()), torch.autograd.grad(f.from_squared(s).sum(), s)[0])

# They cross into the kernels and come back, alone and in a product.
product = mk.Product(mk.Sphere(), m, mk.KleinBottle())
assert encode_manifold(product) == ([1, 3, 3, 2, 2, 2], [5.0, 7.0, 10.0, 10.0])
assert encode_inhibitor(f) == (6, [2.0, 1.5])
for each in (m, product):
    assert decode_manifold(*encode_manifold(each)) == each == pickle.loads(pickle.dumps(each))
assert decode_inhibitor(*encode_inhibitor(f), None) == f == pickle.loads(pickle.dumps(f))

# The penalty, its order, its pictures and its saved state.
points, weight = x.float(), torch.nn.Parameter(random(50, 50, seed=4).float() - 0.5)
value = mk.moduli_penalty(weight, points, manifold=m, inhibitor=f)
value.backward()
want = f(m.distance(points, points)) * weight.detach().abs()
torch.testing.assert_close(value.detach(), want.mean())
torch.testing.assert_close(weight.grad, want / weight.detach() / want.numel())
assert torch.equal(mk.manifold_order(points, m).sort().values, torch.arange(50))
mask = weight.detach() > 0.4
for ax in (mk.plots.plot_connections(mask, points, m), mk.plots.plot_weight_heatmap(mask, points, m),
           mk.plots.plot_kept_against_distance(mask, points, m, f), mk.plots.plot_inhibitor(f, m),
           mk.plots.plot_neuron_weights(weight, points, m, 3)):
    ax.figure.savefig(io.BytesIO())
saved = mk.ModuliRegularizer(9, manifold=m, inhibitor=f).state_dict()
mk.ModuliRegularizer(9, manifold=m, inhibitor=f).load_state_dict(saved)
try:
    mk.ModuliRegularizer(9, manifold=mk.HexagonalTorus(8.0), inhibitor=f).load_state_dict(saved)
except ValueError as error:
    assert "must equal this one's 'HexagonalTorus(side=8.0)', got 'HexagonalTorus(side=7.0)'" in str(error)
else:
    raise AssertionError("a regularizer with another manifold was loaded")
'''


def test_one_class_each_is_all_that_python_needs(tmp_path):
    pytest.importorskip("matplotlib")
    for part in ("moduli_kernels", "tests/support"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("*.so", "*.dylib", "__pycache__"))
    add_toys(tmp_path, [name for name in MANIFOLD | INHIBITOR if name.startswith("moduli_kernels/geometry/")])
    done = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], cwd=tmp_path, text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path), "MODULI_KERNELS_BACKEND": "reference"})
    assert done.returncode == 0, done.stderr
