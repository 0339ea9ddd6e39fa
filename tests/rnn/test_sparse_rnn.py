"""SparseRNN in torch.nn.RNN's place: arguments, outputs, dropout, errors, autocast, 16 bit, training, other nets."""
from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import moduli_kernels as mk
from tests.support.penalty_cases import BACKENDS, DEVICE, on_device
from tests.support.rnn_cases import PATHS, assert_same, draw, draw_mask, net_of, plain_rnn, quiet, run

pytestmark = [on_device, *quiet]

SETTINGS = {
    "plain": {}, "layers": {"num_layers": 3}, "relu": {"nonlinearity": "relu"}, "no_bias": {"bias": False},
    "batch_first": {"batch_first": True}, "bidirectional": {"bidirectional": True, "num_layers": 2},
    "float64": {"dtype": torch.float64}, "dropout": {"num_layers": 2, "dropout": 0.5},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_parameters_are_those_of_nn_rnn(case):
    torch.manual_seed(3)
    mine = mk.SparseRNN(4, 6, **SETTINGS[case])
    torch.manual_seed(3)
    its = nn.RNN(4, 6, **SETTINGS[case])
    assert isinstance(mine, nn.RNN) and not list(mine.buffers())
    assert mine.state_dict().keys() == its.state_dict().keys()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(mine.parameters(), its.parameters()))
    assert mine._all_weights == its._all_weights


@pytest.mark.parametrize("path", PATHS)
def test_positional_arguments(path):
    net = mk.SparseRNN(4, 6, 2, "relu", False, True, 0.0, True, path=path)
    its = nn.RNN(4, 6, 2, "relu", False, True, 0.0, True)
    its.load_state_dict(net.state_dict())
    x = draw(2, 5, 4)
    assert torch.allclose(net(x)[0], its(x)[0], atol=1e-6)
    assert "nonlinearity=relu" in repr(net) and f"path={path}" in repr(net)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_shapes_and_types_of_every_kind_of_input(backend, path, batch_first):
    net = net_of(4, 6, 2, bidirectional=True, batch_first=batch_first, path=path)
    its, hx = plain_rnn(net), draw(4, 3, 6, seed=8)
    sequences = [draw(length, 4, seed=length) for length in (2, 5, 3)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    descending = pack_sequence(sorted(sequences, key=len, reverse=True))
    even = pack_sequence([draw(4, 4, seed=k) for k in range(3)])
    whole = draw(*((3, 5) if batch_first else (5, 3)), 4)
    nobody = draw(*((0, 5) if batch_first else (5, 0)), 4)
    cases = {"whole": (whole, None), "with hx": (whole, hx), "one": (draw(5, 4), None),
             "one with hx": (draw(5, 4), hx[:, 0]), "packed": (packed, None), "packed with hx": (packed, hx),
             "sorted": (descending, hx), "even": (even, hx), "no batch": (nobody, None),
             "strided": (whole.transpose(0, 1).contiguous().transpose(0, 1), hx[:, :, ::2].repeat(1, 1, 2))}
    for name, arguments in cases.items():
        with mk.backend(backend):
            got = net(*arguments)
        want = its(*arguments)
        for mine, expected in zip(got, want):
            assert type(mine) is type(expected), name
            if isinstance(mine, PackedSequence):
                for part, its_part in zip(mine[1:], expected[1:]):
                    assert part is None and its_part is None or torch.equal(part, its_part), name
                mine, expected = mine.data, expected.data
            assert mine.shape == expected.shape and torch.allclose(mine, expected, atol=1e-6), name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("probability", [0.4, 1.0])
@pytest.mark.skipif(DEVICE != "cpu", reason="cuDNN draws from a stream of its own")
def test_dropout_draws_the_same_random_numbers(path, packed, probability):
    net = net_of(4, 6, 3, dropout=probability, bidirectional=True, path=path)
    its, x = plain_rnn(net), draw(5, 3, 4)
    lengths = torch.tensor([2, 5, 3]) if packed else None
    found = []
    for each in (net, its):
        torch.manual_seed(11)
        found.append(run(each, x, None, lengths))
    assert_same(net, *found, 1e-5)
    after = torch.rand(3)
    torch.manual_seed(11)
    its(x)
    assert packed or torch.equal(after, torch.rand(3))
    net.eval()
    assert torch.equal(net(x)[0], net(x)[0])


# --- errors -------------------------------------------------------------------------------------------------------

BAD_INPUT = {
    "dimensions": lambda x, hx: (x[0, 0], None), "4d": lambda x, hx: (x[None], None),
    "inputs": lambda x, hx: (x[..., :3], None), "hx_sizes": lambda x, hx: (x, hx[:1]),
    "hx_of_one": lambda x, hx: (x, hx[:, 0]), "hx_of_a_batch": lambda x, hx: (x[:, 0], hx),
    "dtype": lambda x, hx: (x.double(), None), "integers": lambda x, hx: (x.long(), None),
    "hx_device": lambda x, hx: (x, hx.to("meta")), "device": lambda x, hx: (x.to("meta"), None),
    "no_steps": lambda x, hx: (x[:0], None), "no_steps_no_batch": lambda x, hx: (x[:0, :0], None),
    "text": lambda x, hx: ("x", None), "hx_text": lambda x, hx: (x, "hx"), "none": lambda x, hx: (None, None),
    "packed_hx": lambda x, hx: (pack_sequence([x[:, 0]]), hx), "packed_1d": lambda x, hx: (
        PackedSequence(x[:, 0, 0], torch.ones(5, dtype=torch.int64, device="cpu")), None),
    "packed_dtype": lambda x, hx: (pack_sequence([x[:, 0]]).double(), None),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_in_the_words_of_nn_rnn(path, case):
    net = net_of(4, 6, 2, path=path)
    arguments = BAD_INPUT[case](draw(5, 3, 4), draw(2, 3, 6))
    with pytest.raises(Exception) as its:  # noqa: PT011 - whatever it is
        plain_rnn(net)(*arguments)
    with pytest.raises(type(its.value)) as mine:
        net(*arguments)
    assert str(mine.value) == str(its.value)


@pytest.mark.parametrize("path", PATHS)
def test_hx_of_another_dtype(path):
    """In cuDNN's words; on the CPU nn.RNN speaks of matrices."""
    with pytest.raises(RuntimeError) as error:
        net_of(4, 6, path=path)(draw(5, 3, 4), draw(1, 3, 6).double())
    assert str(error.value) == ("Input and hidden tensors are not the same dtype, found input tensor with "
                                "torch.float32 and hidden tensor with torch.float64")


@pytest.mark.parametrize("arguments", [
    ((0, 3), {}), ((3, 0), {}), ((3, 3, 0), {}), ((3.0, 3), {}), ((3, 3), {"nonlinearity": "gelu"}),
    ((3, 3), {"bias": 1}), ((3, 3), {"batch_first": None}), ((3, 3, 2), {"dropout": 2}), ((3, 3), {"proj_size": 2}),
    ((3, 3), {"size": 2})])
def test_bad_arguments_in_the_words_of_nn_rnn(arguments):
    positional, named = arguments
    try:
        nn.RNN(*positional, **named)
    except (ValueError, TypeError) as its:
        with pytest.raises(type(its)) as mine:
            mk.SparseRNN(*positional, **named)
        assert str(mine.value) == str(its)
    else:  # torch 2.10 takes a size of 0 for the input, and other values than bool
        assert positional == (0, 3) or named.keys() in ({"bias"}, {"batch_first"})
        mk.SparseRNN(*positional, **named)


def test_dropout_of_one_layer_warns_as_nn_rnn_does():
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        mk.SparseRNN(3, 3, dropout=0.5)


# --- dtypes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast_as_nn_rnn(path, dtype, given):
    net = net_of(4, 9, 2, path=path, bidirectional=True)
    its, x, hx = plain_rnn(net), draw(5, 3, 4), draw(4, 3, 9)
    with torch.autocast(torch.get_default_device().type, dtype=dtype):
        want, got = its(x.to(given), hx), net(x.to(given), hx)
        assert [t.dtype for t in got] == [t.dtype for t in want] == [dtype, dtype]
        torch.autograd.grad(got[0].float().sum(), list(net.parameters()))  # inside, too
        net.double(), its.double()
        assert [t.dtype for t in net(x.double())] == [t.dtype for t in its(x.double())] == [torch.float64] * 2
        with pytest.raises(RuntimeError):
            net(x)
    exact = plain_rnn(net, torch.float64)(x.double(), hx.double())
    for mine, expected in zip(got, exact):
        assert mine.double().sub(expected).abs().max() <= 0.05


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_sparse_path_rounds_at_its_end_only(backend, dtype):
    net = net_of(4, 30, 2, bidirectional=True)
    x, hx, parameters = draw(5, 3, 4), draw(4, 3, 30), list(net.parameters())
    exact = net(x, hx)
    want = torch.autograd.grad(exact[0].sum(), parameters)
    with mk.backend(backend), torch.autocast(torch.get_default_device().type, dtype=dtype):
        got = net(x, hx)
        grads = torch.autograd.grad(got[0].float().sum(), parameters)
        with torch.no_grad():
            inference = net(x, hx)
    for mine, its, again in zip(got, exact, inference):
        assert torch.equal(mine, again)
        assert (mine - its).abs().max() <= torch.finfo(dtype).eps  # of values in [-1, 1]
    assert all(torch.allclose(mine, its, rtol=1e-4, atol=1e-5) for mine, its in zip(grads, want))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights(path, dtype):
    net = net_of(4, 9, 2, path=path, dtype=dtype)
    x = draw(5, 3, 4, dtype=dtype)
    got, want = run(net, x), run(plain_rnn(net, torch.float64), x)
    assert got.output.dtype == got.h_n.dtype == got.x.dtype == got.weights["weight_hh_l0"].dtype == dtype
    assert_same(net, got, want, 0.03 if dtype == torch.bfloat16 else 0.005)


# --- in a training loop -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("make", [
    lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01)], ids=["adam", "sgd"])
def test_masked_weights_stay_0_through_a_thousand_steps(backend, path, make):
    net = net_of(2, 7, densities=(0.5, 0.3), path=path)
    optimizer, x = make(net.parameters()), draw(3, 4, 2)
    before = net.weight_hh_l0.detach().clone()
    with mk.backend(backend):
        for _ in range(1000):
            optimizer.zero_grad()
            (net(x)[0] - 0.5).square().sum().backward()
            optimizer.step()
            for name in ("weight_ih_l0", "weight_hh_l0"):
                masked = ~getattr(net, f"{name}_mask")
                assert getattr(net, name)[masked].eq(0).all() and getattr(net, name).grad[masked].eq(0).all()
    assert (net.weight_hh_l0 != before)[net.weight_hh_l0_mask].all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("block", [None, (2, 2)])
def test_the_pruner_and_the_penalty(path, block):
    net = mk.SparseRNN(4, 8, path=path)
    order = {(net, "weight_hh_l0"): (torch.arange(8), torch.arange(8))} if block else None
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    targets = [(net, "weight_hh_l0"), (net, "weight_ih_l0")]
    pruner = mk.MagnitudePruner(targets, optimizer=optimizer, block=block, order=order)
    reg, x = mk.regularize(net, strength=0.1), draw(5, 3, 4)
    assert [name for name, _ in reg.items()] == ["weight_hh_l0"]
    for sparsity in (0.0, 0.3, 0.6, 0.9):
        pruner.step_to(sparsity)
        assert torch.allclose(net(x)[0], plain_rnn(net)(x)[0], atol=1e-6)
        optimizer.zero_grad()
        (net(x)[0].square().sum() + reg()).backward()
        optimizer.step()
        assert net.weight_hh_l0[~net.weight_hh_l0_mask].eq(0).all()
    assert 0.8 <= pruner.sparsity <= 0.9
    pruner.make_permanent()
    assert torch.allclose(net(x)[0], plain_rnn(net)(x)[0], atol=1e-6) and not list(net.buffers())


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_needs_retain_graph_and_gives_the_same(backend):
    net = net_of(4, 6)
    with mk.backend(backend):
        loss = net(draw(5, 3, 4))[0].sum()
        first, second = (torch.autograd.grad(loss, list(net.parameters()), retain_graph=keep) for keep in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert net.bias_ih_l0.grad is None


def test_copies_and_pickles():
    net = net_of(4, 6, 2, leak=0.3)
    x = draw(5, 3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(net), loaded):
        assert twin.leak == 0.3 and torch.equal(twin(x)[0], net(x)[0])
        twin.set_mask("weight_hh_l0", draw_mask(6, 6, density=0.0))
        assert net.weight_hh_l0_mask.any()
        assert not torch.equal(twin(x)[0], net(x)[0])


def test_functional_call():
    net = net_of(4, 6)
    x, others = draw(5, 3, 4), {"weight_hh_l0": draw(6, 6, seed=3)}
    got = torch.func.functional_call(net, others, (x,))[0]
    net.load_state_dict(others, strict=False)
    assert torch.allclose(got, plain_rnn(net)(x)[0], atol=1e-6)
