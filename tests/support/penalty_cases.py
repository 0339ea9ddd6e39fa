"""What the tests of the penalty share: the cases, how to run one, the float64 reference for it, and the device.

MODULI_KERNELS_TEST_DEVICE=cuda runs the tests that are marked `on_device` on a GPU: tensors are then made there by
default, and the kernels are Triton's. With TRITON_INTERPRET=1 they are Triton's as well, on CPU tensors. conftest.py
sees to both.
"""
from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import moduli_kernels as mk
from moduli_kernels import backends, geometry, reference, runtime
from moduli_kernels.geometry.inhibitors import inhibitor as resolve_inhibitor
from moduli_kernels.geometry.presets import PRESETS, manifold as resolve_manifold


def with_every_class(cases: dict[str, Any], classes: Iterable[type]) -> dict[str, Any]:
    """The cases and, under its own name, an instance with default parameters of each class that none of them uses.

    So a new manifold or inhibitor is tested as soon as its class is registered, without a change to any list.
    """
    used = {type(part) for case in cases.values() for part in (case.factors() if hasattr(case, "factors") else [case])}
    return cases | {cls.__name__: cls() for cls in classes if cls not in used}


# The product has flat factors of 1 and of 3 columns, so that odd and even columns meet every kind of
# neighbour.
MANIFOLDS: dict[str, mk.Manifold] = with_every_class({
    **PRESETS,
    "product": mk.Product(mk.Circle(2.0), mk.KleinBottle(7.0, 9.0), mk.Sphere(3, 2.0),
                          mk.FlatTorus((4.0, 6.0, 3.0))),
}, geometry.MANIFOLDS)


def bump(d: Tensor) -> Tensor:
    """A smooth f that is even in d, for tables and as a bare callable."""
    return 2 + torch.cos(0.7 * d) * torch.exp(-0.05 * d * d)


INHIBITORS: dict[str, Any] = with_every_class({
    "dog": mk.DifferenceOfGaussians(),
    "diffusion": mk.Diffusion(),
    "sinusoid": mk.Sinusoid(),
    "ricker": mk.RickerWavelet(1.3, 2.0),
    "constant": mk.Constant(3.0),
    "tabulated": mk.TabulatedInhibitor(bump, max_distance=25.0, samples=512),
    "callable": bump,
}, geometry.INHIBITORS)
VARIANTS = {  # other branches of the same formulas
    "dog_paper": mk.DifferenceOfGaussians(2.0, 1.0, 3.0, zero_min=False),
    "distance": mk.Diffusion(0.5, 1.0),
    "diffusion_3.5": mk.Diffusion(0.1, 3.5),
    "diffusion_0.5": mk.Diffusion(1.0, 0.5),
    "short_table": mk.TabulatedInhibitor(bump, max_distance=3.0, samples=8),  # distances beyond it: constant
}
POWERS = (1.0, 1.5, 2.0, 3.0, 2.7)

DEVICE = os.environ.get("MODULI_KERNELS_TEST_DEVICE", "cpu")
KERNELS = "triton" if DEVICE == "cuda" or runtime.triton_interpreted else "cpp"  # the backend that is put to the test
on_device = pytest.mark.usefixtures("default_device")


def _missing(backend: str) -> str:
    """Why the kernels of a backend cannot be tested here, "" if they can."""
    available, reason = backends.availability()[backend]
    if backend == "cpp" and DEVICE != "cpu":
        return f"about the CPU's kernels, and MODULI_KERNELS_TEST_DEVICE={DEVICE} asks for those of another device"
    return "" if available else reason


needs_cpp = pytest.mark.skipif(bool(_missing("cpp")), reason=_missing("cpp"))
needs_kernels = pytest.mark.skipif(bool(_missing(KERNELS)), reason=_missing(KERNELS))
BACKENDS = (pytest.param(KERNELS, marks=needs_kernels), "reference")
tiled_warning = pytest.mark.filterwarnings("ignore:.* has no compiled kernel:UserWarning")


def examples(count: int) -> int:
    """The number of examples for hypothesis: `count`, or fewer where most of them make Triton compile a new kernel."""
    return count if KERNELS == "cpp" else max(3, count // 5)


class Result(NamedTuple):
    """A penalty and its gradients. cols is None where the points are shared; so is a gradient that is not needed."""

    value: Tensor
    weight: Tensor | None
    rows: Tensor | None
    cols: Tensor | None


def generator(seed: int = 0, device: torch.device | str | None = None) -> torch.Generator:
    return torch.Generator(device or torch.get_default_device()).manual_seed(seed)


def draw_weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers on every device."""
    drawn = torch.randn(*shape, generator=generator(seed, "cpu"), dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


def draw_points(manifold: str | mk.Manifold, n: int, seed: int = 0,
                dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers on every device."""
    manifold = MANIFOLDS[manifold] if isinstance(manifold, str) else manifold
    drawn = manifold.sample(n, generator=generator(1000 + seed, "cpu"), dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


def on_a_grid(points: Tensor) -> Tensor:
    """Points rounded to multiples of 2^-10, so that float32 differences are exact.

    Many points need this: otherwise some pair lies so near a cut locus that rounding takes its gradient across.
    """
    return (points * 1024).round() / 1024


def penalty_and_gradients(weight: Tensor, rows: Tensor, cols: Tensor | None = None, *, grad: float = 1.0,
                          **settings) -> Result:
    """moduli_penalty and, by backward, the gradients of grad * value in weight, rows and cols."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (weight, rows, cols)]
    value = mk.moduli_penalty(*leaves, **settings)
    value.backward(torch.tensor(grad, dtype=value.dtype))
    return Result(value.detach(), *(None if t is None else t.grad for t in leaves))


def expected(weight: Tensor, rows: Tensor, cols: Tensor | None = None, *, mask: Tensor | None = None,
             grad: float = 1.0,
             manifold="torus", inhibitor=None, power: float = 1.0, blocks: int = 1, reduction: str = "mean",
             strength: float = 1.0) -> Result:
    """What `penalty_and_gradients` should give, by the float64 reference on the same (rounded) inputs."""
    scale = strength / (max(1, weight.shape[0] * weight.shape[1]) if reduction == "mean" else 1)
    what = reference.Penalty(resolve_manifold(manifold), resolve_inhibitor(inhibitor), power, blocks, scale)
    double = [None if t is None else t.detach().double() for t in (weight, rows, cols)]
    value, gradients = reference.penalty_with_grads(*double, mask, what, True, True)
    return Result(value, *(None if g is None else grad * g for g in gradients))


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in float64 (|got| where want is 0); infinite where got is not finite."""
    got, want = got.detach().double(), want.detach().double()
    difference = torch.linalg.vector_norm(got - want)
    norm = torch.linalg.vector_norm(want)
    error = float(difference / norm) if norm > 0 else float(difference)
    return error if error == error else float("inf")


def assert_close(got: Result, want: Result, value: float, gradient: float) -> None:
    """Asserts that relative errors, in norm, are at most `value` and `gradient`; the message names what is off."""
    errors = {}
    for name, g, w in zip(Result._fields, got, want):
        assert (g is None) == (w is None) and (g is None or g.shape == w.shape), name
        if g is not None and not relative_error(g, w) <= (value if name == "value" else gradient):
            errors[name] = relative_error(g, w)
    assert not errors, f"relative errors {errors}, allowed {value} and {gradient}"


TOLERANCE = {torch.float32: (1e-6, 1e-5), torch.float64: (1e-12, 1e-11)}
