"""Runs every kernel at least once on small tensors, under compute-sanitizer, and compares it with the CPU's reference.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m scripts.gpu.workload

Tensors are drawn and compared on the CPU, so that the GPU runs little else than the kernels of this package.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import moduli_kernels as mk
from moduli_kernels import reference
from moduli_kernels.geometry.inhibitors import inhibitor as resolve_inhibitor
from scripts.gpu import workload_rnn

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
TABLE = mk.TabulatedInhibitor(lambda d: 2 + torch.cos(d), 25.0, samples=256)
# Each case: rows; columns, or None for a square weight whose rows and columns share the points; arguments of run().
# The sizes give whole tiles, incomplete tiles and unaligned rows.
CASES: tuple[tuple[int, int | None, dict[str, Any]], ...] = (
    (512, None, {}),
    (512, None, {"trained": False}),
    (70, 133, {"manifold": "klein", "grad": 2.0}),
    (64, 64, {"manifold": "sphere", "power": 2.7}),
    (37, 250, {"manifold": "mixed", "inhibitor": mk.Sinusoid(), "dtype": torch.bfloat16}),
    (128, None, {"manifold": "torus6", "inhibitor": TABLE, "dtype": torch.float16, "power": 2.0}),
    (33, 65, {"inhibitor": mk.RickerWavelet(), "dtype": torch.float64}),
    (40, None, {"blocks": 3, "inhibitor": mk.Constant(2.0)}),
    (130, 70, {"masked": True, "inhibitor": mk.Diffusion()}),
    (20, 30, {"kernel": (3, 3), "masked": True}),
)


def check(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Ends the program if the relative difference in norm is above the tolerance."""
    error = float((got.double().cpu() - want).norm() / want.norm().clamp(min=1e-30))
    if not error <= tolerance:
        raise SystemExit(f"{name} is off by {error:.1e}, allowed {tolerance:.0e}")


def run(rows: int, columns: int | None, manifold: str = "torus", inhibitor=None, power: float = 1.0, blocks: int = 1,
        kernel: tuple[int, ...] = (), dtype: torch.dtype = torch.float32, masked: bool = False, trained: bool = True,
        grad: float = 1.0) -> None:
    """Compares value, gradients and the in-place ops of one case with the reference, in float64.

    The weight has shape (blocks * rows, columns or rows, *kernel).
    trained: whether the points get gradients.
    grad: the gradient that arrives at the value. A second backward brings 1 - grad, so that both add up to the plain
    gradient.
    """
    generator = torch.Generator().manual_seed(rows)
    m = mk.manifold(manifold)
    points = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(blocks * rows, columns or rows, *kernel, generator=generator).to(dtype)
    x = m.sample(rows, generator=generator, dtype=points)
    y = None if columns is None else m.sample(columns, generator=generator, dtype=points)
    mask = torch.rand(weight.shape, generator=generator) < 0.1 if masked else None
    scale = 1.0 / (weight.shape[0] * weight.shape[1])
    what = reference.Penalty(m, resolve_inhibitor(inhibitor), power, blocks, scale)
    double = [None if t is None else t.double() for t in (weight, x, y)]
    want, wanted = reference.penalty_with_grads(*double, mask, what, True, True)
    tolerance, name = TOLERANCE[dtype], f"{manifold} {tuple(weight.shape)} {dtype}"

    leaves = [None if t is None else t.cuda().requires_grad_(need) for t, need in ((weight, True), (x, trained),
                                                                                 (y, trained))]
    settings = {"manifold": m, "inhibitor": inhibitor, "blocks": blocks, "mask": None if mask is None else mask.cuda()}
    value = mk.moduli_penalty(*leaves, power=power, **settings)
    value.backward(torch.tensor(grad, dtype=value.dtype).cuda(), retain_graph=True)
    value.backward(torch.tensor(1 - grad, dtype=value.dtype).cuda())  # recomputes the gradient
    with torch.no_grad():
        check(f"{name}: value alone", mk.moduli_penalty(*leaves, power=power, **settings), want, tolerance)
    found = [("value", value, want), ("dW", leaves[0].grad, wanted.weight)]
    found += [("rows", leaves[1].grad, wanted.rows)] if trained else []
    found += [("columns", leaves[2].grad, wanted.cols)] if trained and y is not None else []
    for what_is, got, expected in found:
        check(f"{name}: {what_is}", got.detach(), expected, tolerance)
    mk.accumulate_penalty_grad_(*leaves, power=power, **settings)
    check(f"{name}: dW added", leaves[0].grad, 2 * wanted.weight, 2 * tolerance)
    mk.proximal_step_(*(None if t is None else t.detach() for t in leaves), step=0.1, **settings)


def compressed() -> None:
    """Compares value and gradient of a weight in torch.sparse_csr with the reference."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(90, 75, generator=generator) < 0.05
    dense = torch.where(mask, torch.randn(90, 75, generator=generator), 0)
    x, y = (mk.manifold("torus").sample(n, generator=generator) for n in (90, 75))
    what = reference.Penalty(mk.manifold("torus"), mk.DifferenceOfGaussians(), 1.0, 1, 1.0 / dense.numel())
    want, wanted = reference.penalty_with_grads(dense.double(), x.double(), y.double(), mask, what, True, True)
    csr = dense.to_sparse_csr()
    parts = (t.cuda() for t in (csr.crow_indices(), csr.col_indices(), csr.values()))
    weight = torch.sparse_csr_tensor(*parts, csr.shape, check_invariants=False).requires_grad_()
    value = mk.moduli_penalty(weight, x.cuda(), y.cuda(), manifold="torus")
    value.backward()
    check("compressed: value", value.detach(), want, 1e-4)
    check("compressed: dW", weight.grad.values(), wanted.weight[mask], 1e-4)


if __name__ == "__main__":
    for rows, columns, settings in CASES:
        run(rows, columns, **settings)
    compressed()
    for case in workload_rnn.cases():
        check(*case, TOLERANCE[torch.float32])
    torch.cuda.synchronize()
    print(f"workload: {len(CASES) + 1 + len(workload_rnn.CASES)} cases agree with the reference")
