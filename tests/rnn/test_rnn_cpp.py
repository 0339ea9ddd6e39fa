"""The C++ loops of the masked RNN against the reference: every instruction set, width of strip, number of threads."""
import os
import subprocess
import sys

import pytest
import torch

from moduli_kernels import runtime
from moduli_kernels.ops import masked_rnn as masked_rnn_op
from tests.support.rnn_op import STEPS, both, compiled

pytestmark = pytest.mark.skipif(runtime.cpu_ops_error is not None, reason="needs the compiled CPU kernels")

# T, B, I, H: each width of a strip with and without lanes that are filled up, blocks of columns, rows that fill no
# panel; of one lane, whose vectors lie along the columns, some that fill none
SIZES = [(3, 1, 2, 5), (2, 3, 3, 17), (4, 4, 7, 18), (2, 8, 5, 33), (2, 13, 1, 16), (3, 20, 33, 65), (2, 32, 16, 32),
         (3, 70, 40, 129), (2, 130, 1, 20), (2, 200, 3, 200), (0, 3, 2, 4), (3, 0, 2, 4), (3, 25, 0, 7), (5, 2, 1, 1),
         (3, 1, 271, 149), (2, 1, 64, 260), (4, 1, 23, 41), (2, 17, 5, 40), (2, 20, 3, 780)]


def drawn(sizes, density, with_lengths, dtype):
    steps, batch, inputs, hidden = sizes
    generator = torch.Generator().manual_seed(sum(sizes))

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    def mask(*shape):
        return None if density is None else torch.rand(*shape, generator=generator) < density

    lengths = torch.randint(0, steps + 1, (batch,), generator=generator) if with_lengths else None
    tensors = [normal(steps, batch, inputs), normal(batch, hidden), normal(hidden, inputs, scale=0.3),
               normal(hidden, hidden, scale=0.5 / hidden**0.5), normal(hidden), normal(hidden)]
    masks = [mask(hidden, inputs), mask(hidden, hidden)]
    return tensors, masks, (lengths, None, None), [normal(steps, batch, hidden), normal(batch, hidden)]


def check(dtype, sizes):
    """Against the reference in float64: 1e-13 and 1e-5 relative in norm, or, where sums cancel, 3 x the error that the
    reference itself has in this dtype."""
    reference = masked_rnn_op.MASKED_RNN.by_reference, masked_rnn_op.MASKED_RNN_GRADS.by_reference
    limit = 1e-13 if dtype == torch.float64 else 1e-5
    for density in (None, 0.0, 0.3, 1.0):
        for k, step in enumerate(STEPS):
            tensors, masks, where, grads = drawn(sizes, density, k % 2 == 1, dtype)
            if density == 0.3 and k > 1:  # only the last state has a gradient
                grads[0] = None
            given_back = [t if t is None else t.double() for t in grads]
            doubled = [t.double() for t in tensors], masks, where, given_back, step
            truth, own = both(*reference, *doubled), both(*reference, tensors, masks, where, grads, step)
            for got, rounded, expected in zip(compiled(tensors, masks, where, grads, step), own, truth, strict=True):
                assert got.shape == expected.shape and got.dtype == dtype
                error, reached = ((t.double() - expected).norm() for t in (got, rounded))
                assert error <= max(limit * expected.norm(), 3 * reached), (density, step, error, expected.norm())


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_the_reference(sizes):
    check(torch.float64, sizes)
    check(torch.float32, sizes)


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_other_instruction_sets(isa):
    program = ("import torch, test_rnn_cpp as t\n"
               "for sizes in t.SIZES:\n    t.check(torch.float64, sizes); t.check(torch.float32, sizes)\n")
    settings = {"MODULI_KERNELS_ISA": isa, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], cwd=os.path.dirname(__file__), capture_output=True,
                          text=True, env=os.environ | settings)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("sizes", "density"),
                         [((6, 70, 40, 400), 0.1), ((4, 20, 40, 200), 0.1), ((4, 1, 40, 600), None),
                          ((4, 1, 40, 650), 0.4)])
def test_bitwise_equal_for_any_number_of_threads(sizes, density):
    before = torch.get_num_threads()
    arguments = *drawn(sizes, density, True, torch.float32), STEPS[2]
    try:
        found = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(compiled(*arguments))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_numbers_at_masked_weights_are_never_read(batch, density):
    tensors, masks, where, grads = drawn((3, batch, 9, 65), density, False, torch.float32)
    spoiled = list(tensors)
    for i in (2, 3):
        spoiled[i] = torch.where(masks[i - 2], tensors[i], torch.full_like(tensors[i], float("nan")))
    clean, got = (compiled(t, masks, where, grads, STEPS[0]) for t in (tensors, spoiled))
    assert all(torch.equal(a, b) for a, b in zip(clean, got, strict=True))
    for gradient, mask in zip(got[5:7], masks, strict=True):
        assert (gradient[~mask] == 0).all()


def test_an_infinite_weight_of_one_lane_is_infinite_for_its_neuron_alone():
    """The columns that fill no vector are taken with some of those before them, not to count as 0 x infinity."""
    tensors, masks, where, grads = drawn((1, 1, 21, 9), None, False, torch.float32)
    x, _, w_ih = tensors[:3]
    x.abs_()
    w_ih[2, 7] = w_ih[4, 20] = float("inf")
    output = compiled(tensors, masks, where, grads, ("relu", 1.0, False))[0].flatten()
    assert output.isinf().nonzero().flatten().tolist() == [2, 4] and not output.isnan().any()
