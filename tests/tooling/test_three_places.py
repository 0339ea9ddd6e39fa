"""A manifold or an inhibitor is added in three files, and then works on every backend.

The texts in tests/support/toy/ add a hexagonal torus and a saturating inhibitor to a copy of the source tree, the way
CONTRIBUTING says. The copy is compiled, and its results are compared with formulas that are written down here.
"""
from __future__ import annotations

import filecmp
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moduli_kernels import runtime
from tests.support.toys import INHIBITOR, MANIFOLD, add_toys

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("moduli_kernels", "csrc", "build_support", "setup.py", "pyproject.toml", "LICENSE", "README.md")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    runtime.cpu_ops_error is not None, reason="needs what the C++ kernels are compiled with")]

# What runs in the copy, with the name of a backend.
CHECK = r'''
import itertools, sys, warnings
import torch
import moduli_kernels as mk
from moduli_kernels import backends

warnings.simplefilter("error")  # such as: "has no compiled kernel"
backend = sys.argv[1]
n, side, c, sigma = 37, 9.0, 3.0, 2.5
hexagonal, saturation = mk.HexagonalTorus(side), mk.Saturation(c, sigma)


def hexagonal_squared(x, y):
    """By brute force over 49 images."""
    images = [torch.tensor([i * side + j * side / 2, j * side * 3**0.5 / 2], dtype=torch.float64)
              for i, j in itertools.product(range(-3, 4), repeat=2)]
    return torch.stack([(x[:, None] - y[None] + image).square().sum(-1) for image in images]).amin(0)


def torus_squared(x, y):
    images = [torch.tensor([10.0 * i, 10.0 * j], dtype=torch.float64)
              for i, j in itertools.product(range(-2, 3), repeat=2)]
    return torch.stack([(x[:, None] - y[None] + image).square().sum(-1) for image in images]).amin(0)


def gaussians(s):
    peak = 100.0 * (torch.exp(-s / 0.25) - torch.exp(-s / 5.0))
    return peak + mk.DifferenceOfGaussians().offset


def saturating(s):
    return c * s / (s + sigma**2)


CASES = {
    "hexagonal": (hexagonal, mk.DifferenceOfGaussians(), hexagonal_squared, gaussians),
    "saturation": (mk.FlatTorus(), saturation, torus_squared, saturating),
    "both": (hexagonal, saturation, hexagonal_squared, saturating),
}


def close(name, got, want, tolerance):
    error = float((got.double() - want).norm() / want.norm())
    assert error <= tolerance, f"{name}: relative error {error}"


torch.manual_seed(0)
for name, (manifold, inhibitor, squared, f) in CASES.items():
    for dtype, tolerance in ((torch.float32, 3e-5), (torch.float64, 1e-11)):
        points = manifold.sample(n, dtype=torch.float64).to(dtype).requires_grad_()
        weight = torch.randn(n, n, dtype=torch.float64).to(dtype).requires_grad_()
        kept = torch.rand(n, n) < 0.2
        double = [t.detach().double().requires_grad_() for t in (weight, points)]
        x, w = double[1], double[0]
        cost = f(squared(x, x) + 0 * x.sum())
        for what, mask in (("all", None), ("masked", kept)):
            settings = dict(manifold=manifold, inhibitor=inhibitor, mask=mask)
            with mk.backend(backend):
                value = mk.moduli_penalty(weight, points, **settings)
                grads = torch.autograd.grad(value, (weight, points))
                frozen = mk.moduli_penalty(weight, points.detach(), **settings)
            entries = cost * w.abs() if mask is None else cost * w.abs() * mask
            want = entries.mean()
            expected = torch.autograd.grad(want, (w, x), retain_graph=True)
            for part, got, right in zip(("value", "dW", "dE"), (value, *grads), (want, *expected)):
                close(f"{name}, {what}, {dtype}, {part}", got.detach(), right.detach(), tolerance)
            assert torch.allclose(frozen, value, rtol=tolerance)
        shrunk = weight.detach().clone()
        with mk.backend(backend):
            mk.proximal_step_(shrunk, points.detach(), manifold=manifold, inhibitor=inhibitor, step=5.0)
        right = w.detach().sign() * (w.detach().abs() - 5.0 / n**2 * cost.detach()).clamp(min=0)
        close(f"{name}, proximal step, {dtype}", shrunk, right, tolerance)
    net = torch.nn.LSTM(5, 16, num_layers=2)
    reg = mk.regularize(net, manifold=manifold, inhibitor=inhibitor, trainable=inhibitor.trainable)
    with mk.backend(backend):
        total = reg()
    with mk.backend("reference"):
        close(f"{name}, several layers", total.detach(), reg().detach().double(), 1e-5)
    order = mk.manifold_order(manifold.sample(200), manifold)
    assert torch.equal(order.sort().values, torch.arange(200))
assert {"HexagonalTorus", "Saturation"} <= set(mk.__all__)
print(backends.active("cpu"))
'''


def tree(folder: Path) -> Path:
    """Copies the source tree into the folder and adds the toys."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    add_toys(folder, MANIFOLD | INHIBITOR)
    return folder


def compile_in(tree: Path) -> None:
    """Compiles the C++ kernels with less optimization than usual, which takes a third of the time."""
    products = tree / "build_support" / "products.py"
    text = products.read_text()
    assert text.count('"-O3"') == 1
    products.write_text(text.replace('"-O3"', '"-O1"'))
    built = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, text=True,
                           capture_output=True, env=os.environ | {"MODULI_KERNELS_BUILD": "cpu",
                                                                  "MODULI_KERNELS_FUNCTORS": "0"})
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]


def run_on(tree: Path, backend: str, **variables: str) -> None:
    """Runs CHECK in the tree on one backend, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", CHECK, backend], cwd=tree, text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(tree)} | variables)
    assert done.returncode == 0, f"{backend}, {variables}: {done.stderr[-3000:]}"
    assert re.fullmatch(r"cpp|reference|triton", done.stdout.strip())


def test_three_files_each_make_a_manifold_and_an_inhibitor_for_every_backend(tmp_path):
    """It is one test, since the copy has to be compiled."""
    copy = tree(tmp_path)
    changed = {str(path.relative_to(copy)) for name in COPIED for path in [copy / name, *(copy / name).rglob("*")]
               if path.suffix in (".py", ".h", ".cpp", ".json", ".toml", ".md") and path.is_file()
               and not filecmp.cmp(path, ROOT / path.relative_to(copy), shallow=False)}
    assert changed == set(MANIFOLD) | set(INHIBITOR) and len(MANIFOLD) == len(INHIBITOR) == 3
    compile_in(copy)
    run_on(copy, "reference")
    for isa in ("portable", "avx2", "avx512") if platform.machine() in ("x86_64", "AMD64") else ("portable",):
        run_on(copy, "cpp", MODULI_KERNELS_ISA=isa)
    if runtime.triton_installed:
        run_on(copy, "triton", TRITON_INTERPRET="1")
