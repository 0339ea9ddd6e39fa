"""The same bits, run after run and for any number of threads: value, dW and dE."""
from __future__ import annotations

import pytest
import torch

import moduli_kernels as mk
from tests.support.penalty_cases import (
    BACKENDS,
    INHIBITORS,
    KERNELS,
    MANIFOLDS,
    Result,
    draw_points,
    draw_weight,
    generator,
    needs_cpp,
    needs_kernels,
    on_device,
    penalty_and_gradients,
)

pytestmark = on_device


@pytest.fixture
def threads():
    """Sets the number of torch's threads; put back at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def cpp():
    """The promise over threads is the compiled kernels': the reference adds as torch.sum does."""
    with mk.backend("cpp"):
        yield


@pytest.fixture
def kernels():
    with mk.backend(KERNELS):
        yield


def same_bits(one: Result, other: Result) -> bool:
    """Equal, and zeros of equal sign."""
    def bits(t):
        return None if t is None else t.contiguous().view({2: torch.int16, 4: torch.int32,
                                                           8: torch.int64}[t.itemsize])

    return all(a is b is None or torch.equal(bits(a), bits(b)) for a, b in zip(one, other))


@pytest.mark.parametrize("manifold", ["torus", "mixed", "klein"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hundred_small_runs(backend, manifold):
    weight, rows = draw_weight(33, 33), draw_points(manifold, 33)
    with mk.backend(backend):
        first = penalty_and_gradients(weight, rows, manifold=manifold)
        assert all(same_bits(penalty_and_gradients(weight, rows, manifold=manifold),
                             first) for _ in range(100))


@needs_cpp
@pytest.mark.parametrize("manifold", ["torus", "s3"])
def test_ten_runs_of_650(cpp, threads, manifold):
    weight, rows = draw_weight(650, 650), draw_points(manifold, 650)
    threads(4)
    first = penalty_and_gradients(weight, rows, manifold=manifold)
    assert all(same_bits(penalty_and_gradients(weight, rows, manifold=manifold), first) for _ in range(10))


CASES = {  # rows, columns, dtype, settings: of both kinds of task grid, row chunks and column chunks
    "torus": (650, 650, torch.float32, {}),
    "few_rows": (40, 5000, torch.float32, {}),
    "many_rows": (3000, 60, torch.float32, {}),
    "product": (300, 700, torch.float32, {"manifold": MANIFOLDS["product"]}),
    "float64": (650, 300, torch.float64, {"inhibitor": INHIBITORS["sinusoid"]}),
    "bfloat16": (650, 513, torch.bfloat16, {"inhibitor": INHIBITORS["tabulated"], "power": 2.7}),
    "float16": (650, 513, torch.float16, {"power": 2.0}),
    "blocks": (4 * 150, 150, torch.float32, {"blocks": 4, "manifold": "klein"}),
    "past_the_caches": (2080, 2064, torch.float32, {}),
}


@needs_cpp
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_threads(cpp, threads, case):
    rows, columns, dtype, settings = CASES[case]
    settings = {"manifold": "torus", **settings}
    weight = draw_weight(rows, columns, dtype=dtype)
    points = (draw_points(settings["manifold"], rows // settings.get("blocks", 1), 1),
              draw_points(settings["manifold"], columns, 2))

    def run(count: int) -> Result:
        threads(count)
        return penalty_and_gradients(weight, *points, **settings, grad=1.7)

    first = run(1)
    for count in (2, 4, 1):
        assert same_bits(run(count), first), f"{count} threads"


@needs_cpp
def test_kernels_and_masks_with_threads(cpp, threads):
    weight = draw_weight(256, 300, 3)
    mask = torch.rand(weight.shape, generator=generator()) < 0.5
    points = draw_points("sphere", 256, 1), draw_points("sphere", 300, 2)
    found = []
    for count in (1, 2, 4):
        threads(count)
        found.append(penalty_and_gradients(weight, *points, manifold="sphere", mask=mask, power=1.5))
    assert same_bits(found[1], found[0]) and same_bits(found[2], found[0])


@needs_cpp
def test_value_alone_is_the_value_with_gradients(cpp):
    """Value-only runs, as for logging, show the number that was trained on. (Triton's tiles differ, and the last bit
    may.)"""
    for manifold in MANIFOLDS:
        weight, rows = draw_weight(200, 200), draw_points(manifold, 200)
        with_gradients = penalty_and_gradients(weight, rows, manifold=MANIFOLDS[manifold]).value
        assert torch.equal(mk.moduli_penalty(weight, rows, manifold=MANIFOLDS[manifold]),
                           with_gradients), manifold


@needs_kernels
def test_recomputed_gradients_are_those_handed_over(kernels):
    """With retain_graph and no loss scale, a second backward gives the bits of the first."""
    weight, rows = draw_weight(200, 200).requires_grad_(), draw_points("torus", 200).requires_grad_()
    value = mk.moduli_penalty(weight, rows, manifold="torus")
    first = torch.autograd.grad(value, (weight, rows), retain_graph=True)
    second = torch.autograd.grad(value, (weight, rows))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
