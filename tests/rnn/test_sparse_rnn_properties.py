"""SparseRNN against torch.nn.RNN that holds the same masked weights: outputs and every gradient, over drawn
configurations; the leak against a loop that autograd differentiates; repeats, NaN, what must not leak where."""
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

import moduli_kernels as mk
from tests.support.penalty_cases import BACKENDS, KERNELS, examples, generator, needs_kernels, on_device
from tests.support.rnn_cases import PATHS, TOLERANCE, assert_same, draw, net_of, plain_rnn, quiet, run, weight_names

pytestmark = [on_device, *quiet]

WORK = 3e7  # multiplications of a forward pass: what a drawn case may cost


@st.composite
def configurations(draw_from):
    """(arguments of net_of, batch, steps, kind of lengths, whether hx is given)."""
    small = st.integers(1, 40)
    hidden = draw_from(st.one_of(small, small, small, st.integers(41, 130), st.sampled_from((256, 509, 700))))
    inputs = draw_from(st.one_of(st.integers(1, 40), st.just(hidden)))
    layers, directions = draw_from(st.integers(1, 3)), draw_from(st.integers(1, 2))
    room = WORK / (hidden * (inputs + hidden) * layers * directions)
    batch = draw_from(st.integers(0, max(1, min(64, int(room)))))
    steps = draw_from(st.integers(1, max(1, min(40, int(room / max(1, batch))))))
    density = st.sampled_from((None, 0.0, 0.03, 0.1, 0.3, 0.7, 1.0))
    return {
        "sizes": (inputs, hidden, layers), "densities": (draw_from(density), draw_from(density)),
        "nonlinearity": draw_from(st.sampled_from(("tanh", "relu"))), "bias": draw_from(st.booleans()),
        "batch_first": draw_from(st.booleans()), "bidirectional": directions == 2,
        "seed": draw_from(st.integers(0, 99)), "batch": batch, "steps": steps, "hx": draw_from(st.booleans()),
        "empty_rows": draw_from(st.booleans()),
        "lengths": draw_from(st.sampled_from(("none", "none", "equal", "unequal", "one"))) if batch else "none",
    }


def check(case: dict, path: str, dtype: torch.dtype) -> None:
    case = dict(case)
    batch, steps, kind = case.pop("batch"), case.pop("steps"), case.pop("lengths")
    has_hx, empty_rows, sizes = case.pop("hx"), case.pop("empty_rows"), case.pop("sizes")
    net = net_of(*sizes, **case, path=path, dtype=dtype)
    for name in weight_names(net):
        if empty_rows and f"{name}_mask" in net._buffers:
            mask = net._buffers[f"{name}_mask"].clone()
            mask[::2] = False
            net.set_mask(name, mask)
    shape = (batch, steps) if net.batch_first else (steps, batch)
    hx = draw(sizes[2] * (1 + net.bidirectional), batch, sizes[1], seed=3) if has_hx else None
    lengths = {
        "none": None, "equal": torch.full((batch,), steps, device="cpu"), "one": torch.full((batch,), 1, device="cpu"),
        "unequal": torch.randint(1, steps + 1, (batch,), generator=generator(case["seed"], "cpu"), device="cpu"),
    }[kind]
    x = draw(*shape, sizes[0], seed=2)
    # float32 is compared with float64 on the same numbers, which are rounded to float32
    assert_same(net, run(net, x, hx, lengths), run(plain_rnn(net, torch.float64), x, hx, lengths), TOLERANCE[dtype])


@needs_kernels
@given(case=configurations())
@settings(max_examples=examples(120))
def test_float64_as_nn_rnn(case):
    with mk.backend(KERNELS):
        check(case, "sparse", torch.float64)


@needs_kernels
@given(case=configurations())
@settings(max_examples=examples(120))
def test_float32_as_nn_rnn(case):
    with mk.backend(KERNELS):
        check(case, "sparse", torch.float32)


@given(case=configurations())
@settings(max_examples=examples(40))
def test_the_dense_path_as_nn_rnn(case):
    check(case, "dense", torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(case=configurations())
@settings(max_examples=examples(20))
def test_the_reference_as_nn_rnn(dtype, case):
    with mk.backend("reference"):
        check(case, "sparse", dtype)


# --- leak ---------------------------------------------------------------------------------------------------------

def leaky_loop(net: mk.SparseRNN, x: torch.Tensor, h: torch.Tensor, reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer of x (T, B, I) by the equation, step by step."""
    suffix = "_reverse" if reverse else ""
    names = [f"weight_{kind}_l0{suffix}" for kind in ("ih", "hh")]
    ih, hh = (getattr(net, name) * getattr(net, f"{name}_mask") for name in names)
    bias = getattr(net, f"bias_ih_l0{suffix}") + getattr(net, f"bias_hh_l0{suffix}")
    s, outputs = torch.tanh if net.nonlinearity == "tanh" else torch.relu, []
    for x_t in reversed(x) if reverse else x:
        h = (1 - net.leak) * h + net.leak * s(x_t @ ih.t() + h @ hh.t() + bias)
        outputs.append(h)
    return torch.stack(outputs[::-1] if reverse else outputs), h


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("leak", [0.01, 0.3, 0.9])
def test_leak_against_a_loop(backend, nonlinearity, leak):
    net = net_of(5, 11, densities=(0.5, 0.3), nonlinearity=nonlinearity, leak=leak, bidirectional=True,
                 dtype=torch.float64, path="auto")
    x = draw(7, 4, 5, seed=0, dtype=torch.float64).requires_grad_()
    hx = draw(2, 4, 11, seed=1, dtype=torch.float64).requires_grad_()
    weights = [draw(7, 4, 22, seed=5, dtype=torch.float64), draw(2, 4, 11, seed=6, dtype=torch.float64)]
    inputs = [x, hx, *net.parameters()]
    with mk.backend(backend):
        got = net(x, hx)
        got_grads = torch.autograd.grad(sum((a * b).sum() for a, b in zip(got, weights)), inputs)
    each = [leaky_loop(net, x, hx[k], reverse=bool(k)) for k in range(2)]
    want = torch.cat([output for output, _ in each], 2), torch.stack([h for _, h in each])
    want_grads = torch.autograd.grad(sum((a * b).sum() for a, b in zip(want, weights)), inputs)
    for mine, its in zip((*got, *got_grads), (*want, *want_grads)):
        assert torch.linalg.vector_norm(mine - its) <= 1e-10 * torch.linalg.vector_norm(its)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leak_of_packed_sequences(backend):
    """Each element as if it were alone."""
    net = net_of(3, 6, 2, leak=0.4, bidirectional=True, dtype=torch.float64)
    lengths = [4, 1, 6]
    sequences = [draw(length, 3, seed=length, dtype=torch.float64) for length in lengths]
    with mk.backend(backend):
        packed, h_n = net(torch.nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False))
        padded, _ = torch.nn.utils.rnn.pad_packed_sequence(packed)
        for k, sequence in enumerate(sequences):
            output, state = net(sequence)
            assert torch.allclose(padded[:lengths[k], k], output, rtol=1e-12, atol=1e-14)
            assert torch.allclose(h_n[:, k], state, rtol=1e-12, atol=1e-14)
            assert padded[lengths[k]:, k].eq(0).all()


# --- repeats and NaN ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_repeats_are_bitwise_equal(backend, packed):
    repeats = 10 if backend == "reference" else 100
    net = net_of(9, 70, 2, densities=(0.4, 0.1), bidirectional=True)
    lengths = torch.arange(1, 14, device="cpu") if packed else None
    with mk.backend(backend):
        first = run(net, draw(13, 13, 9), None, lengths)
        for _ in range(repeats - 1):
            again = run(net, draw(13, 13, 9), None, lengths)
            assert torch.equal(first.output, again.output) and torch.equal(first.h_n, again.h_n)
            assert torch.equal(first.x, again.x)
            assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("sick", [math.nan, math.inf])
def test_nan_in_one_element_of_the_batch_stays_there(backend, path, nonlinearity, sick):
    net = net_of(4, 21, 2, densities=(0.5, 0.2), bidirectional=True, path=path, nonlinearity=nonlinearity)
    x, hx = draw(6, 9, 4), draw(4, 9, 21, seed=1)
    others = torch.arange(9) != 5
    with mk.backend(backend):
        healthy = run(net, x, hx)
        x[2, 5, 1] = sick
        got = run(net, x, hx)
    assert got.output[:, 5].isnan().any() or sick == math.inf  # tanh takes infinity to 1
    for name in ("output", "h_n", "x", "hx"):
        mine, its = getattr(got, name)[:, others], getattr(healthy, name)[:, others]
        assert mine.isfinite().all() and torch.allclose(mine, its, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sick", [math.nan, math.inf, 1e30])
def test_what_stands_at_a_masked_weight_does_not_matter(backend, path, sick):
    net = net_of(4, 33, 2, densities=(0.5, 0.2), path=path)
    x = draw(6, 3, 4)
    with mk.backend(backend):
        healthy, want = run(net, x), run(plain_rnn(net), x)
        with torch.no_grad():
            for name in weight_names(net):
                getattr(net, name)[~getattr(net, f"{name}_mask")] = sick
            inference = net(x)[0]
        got = run(net, x)
    assert_same(net, got, want, 1e-5)
    assert torch.equal(got.output, healthy.output) and torch.allclose(inference, got.output, rtol=1e-5, atol=1e-6)
