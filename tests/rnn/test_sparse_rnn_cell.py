"""masked_rnn_step and SparseRNNCell: against torch.nn.RNNCell and the equation, errors, masks, autocast."""
from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import moduli_kernels as mk
from tests.support.penalty_cases import BACKENDS, examples, on_device, relative_error
from tests.support.rnn_cases import TOLERANCE, draw, draw_mask, quiet

pytestmark = [on_device, *quiet]


def step_arguments(inputs: int = 3, hidden: int = 5, batch: int = 4, *, dtype=torch.float64, bias: bool = True,
                   seed: int = 0) -> list[torch.Tensor | None]:
    """x, h, w_ih, w_hh, b_ih, b_hh."""
    shapes = [(batch, inputs), (batch, hidden), (hidden, inputs), (hidden, hidden), (hidden,), (hidden,)]
    drawn = [draw(*shape, seed=seed + k, dtype=dtype).requires_grad_() for k, shape in enumerate(shapes)]
    return drawn if bias else [*drawn[:4], None, None]


def expected(x, h, w_ih, w_hh, b_ih=None, b_hh=None, *, mask_ih=None, mask_hh=None, nonlinearity="tanh", leak=1.0):
    """The equation, for autograd."""
    a = x @ (w_ih if mask_ih is None else w_ih * mask_ih).t() + h @ (w_hh if mask_hh is None else w_hh * mask_hh).t()
    a = a + sum(b for b in (b_ih, b_hh) if b is not None)
    return (1 - leak) * h + leak * (a.tanh() if nonlinearity == "tanh" else a.relu())


@pytest.mark.parametrize("backend", BACKENDS)
@given(inputs=st.integers(1, 70), hidden=st.integers(1, 130), batch=st.integers(0, 20), bias=st.booleans(),
       density=st.sampled_from((None, 0.0, 0.1, 0.5, 1.0)), nonlinearity=st.sampled_from(("tanh", "relu")),
       leak=st.sampled_from((1.0, 0.2)), dtype=st.sampled_from((torch.float32, torch.float64)), seed=st.integers(0, 9))
@settings(max_examples=examples(60))
def test_step_by_the_equation(backend, inputs, hidden, batch, bias, density, nonlinearity, leak, dtype, seed):
    arguments = step_arguments(inputs, hidden, batch, dtype=dtype, bias=bias, seed=seed)
    named = {"nonlinearity": nonlinearity, "leak": leak}
    if density is not None:
        named |= {f"mask_{name}": draw_mask(hidden, columns, density=density, seed=columns)
                  for name, columns in (("ih", inputs), ("hh", hidden))}
    leaves = [a for a in arguments if a is not None]
    grad = draw(batch, hidden, seed=20, dtype=dtype)
    with mk.backend(backend):
        got = mk.masked_rnn_step(*arguments, **named)
        got_grads = torch.autograd.grad(got, leaves, grad)
    double = [None if a is None else a.detach().double().requires_grad_() for a in arguments]
    want = expected(*double, **named)
    want_grads = torch.autograd.grad(want, [a for a in double if a is not None], grad.double(), materialize_grads=True)
    for mine, its in zip((got, *got_grads), (want, *want_grads)):
        assert mine.shape == its.shape and mine.dtype == dtype and relative_error(mine, its) <= TOLERANCE[dtype]
    for name, mine in (("mask_ih", got_grads[2]), ("mask_hh", got_grads[3])):
        assert name not in named or mine[~named[name]].eq(0).all()


def test_without_a_batch():
    arguments = step_arguments(batch=1)
    x, h, *weights = arguments
    alone = mk.masked_rnn_step(x[0], h[0], *weights)
    assert alone.shape == (5,) and torch.equal(alone, mk.masked_rnn_step(*arguments)[0])


def test_a_step_is_a_sequence_of_one():
    net = mk.SparseRNN(3, 5, leak=0.3, path="sparse", dtype=torch.float64)
    mask = draw_mask(5, 5, density=0.4)
    net.set_mask("weight_hh_l0", mask)
    x, h = step_arguments()[:2]
    stepped = mk.masked_rnn_step(x, h, *net.parameters(), mask_hh=mask, leak=0.3)
    assert torch.equal(stepped, net(x[None], h[None])[0][0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    masks = {"mask_ih": draw_mask(5, 3, density=0.6), "mask_hh": draw_mask(5, 5, density=0.4)}
    with mk.backend(backend):
        for named in ({}, masks, {**masks, "leak": 0.3}, {"nonlinearity": "relu", **masks}):
            assert torch.autograd.gradcheck(lambda *a, named=named: mk.masked_rnn_step(*a, **named), step_arguments())


X, H, IH, HH, B, B2 = (a.detach() for a in step_arguments(dtype=torch.float32))
LAYOUT = "x is (batch, inputs) and h (batch, hidden), both without batch for one."
BAD_STEPS = {
    "x_text": (lambda: mk.masked_rnn_step("x", H, IH, HH), TypeError,
               "x must be a tensor, got 'x'; pass torch.as_tensor(...)."),
    "w_text": (lambda: mk.masked_rnn_step(X, H, IH, "w"), TypeError,
               "w_hh must be a tensor, got 'w'; pass torch.as_tensor(...)."),
    "all_text": (lambda: mk.masked_rnn_step(1, 1, 1, 1), TypeError,
                 "x must be a tensor, got 1; pass torch.as_tensor(...)."),
    "hh_shape": (lambda: mk.masked_rnn_step(X, H, IH, HH[:4]), ValueError,
                 "w_hh must be square (hidden, hidden), got shape (4, 5); pass one layer's weight."),
    "ih_shape": (lambda: mk.masked_rnn_step(X, H, IH[:4], HH), ValueError,
                 "w_ih must have shape (5, inputs) to fit w_hh, got (4, 3); give it a row a neuron."),
    "x_shape": (lambda: mk.masked_rnn_step(X[:, :2], H, IH, HH), ValueError,
                f"x must have shape (4, 3), got (4, 2); {LAYOUT}"),
    "x_3d": (lambda: mk.masked_rnn_step(X[None], H, IH, HH), ValueError,
             f"x must have shape (batch, 3), got (1, 4, 3); {LAYOUT}"),
    "h_shape": (lambda: mk.masked_rnn_step(X, H[:3], IH, HH), ValueError,
                f"h must have shape (4, 5), got (3, 5); {LAYOUT}"),
    "h_alone": (lambda: mk.masked_rnn_step(X, H[0], IH, HH), ValueError,
                f"h must have shape (4, 5), got (5,); {LAYOUT}"),
    "bias": (lambda: mk.masked_rnn_step(X, H, IH, HH, B[:2]), ValueError,
             f"b_ih must have shape (5,), got (2,); {LAYOUT}"),
    "mask_dtype": (lambda: mk.masked_rnn_step(X, H, IH, HH, mask_hh=HH), TypeError,
                   "mask_hh must be a bool tensor (True = kept), got torch.float32; convert it with .bool()."),
    "mask_list": (lambda: mk.masked_rnn_step(X, H, IH, HH, mask_hh=[True]), TypeError,
                  "mask_hh must be a bool tensor (True = kept), got a list; convert it with .bool()."),
    "mask_shape": (lambda: mk.masked_rnn_step(X, H, IH, HH, mask_ih=HH > 0), ValueError,
                   "mask_ih must have the shape (5, 3) of its weight, got (5, 5); build it with "
                   "torch.ones_like(weight, dtype=torch.bool)."),
    "device": (lambda: mk.masked_rnn_step(X.to("meta"), H, IH, HH), ValueError,
               f"x must be on the device of w_hh, {HH.device}, got meta; move it with .to()."),
    "mask_device": (lambda: mk.masked_rnn_step(X, H, IH, HH, mask_hh=(HH > 0).to("meta")), ValueError,
                    f"mask_hh must be on the device of w_hh, {HH.device}, got meta; move it with .to()."),
    "integers": (lambda: mk.masked_rnn_step(X.long(), H, IH, HH), TypeError,
                 "x must be floating point, got torch.int64; convert it with .float()."),
    "dtype": (lambda: mk.masked_rnn_step(X, H.double(), IH, HH), TypeError,
              "h must have the dtype of w_hh, torch.float32, got torch.float64; convert it with .to(torch.float32)."),
    "nonlinearity": (lambda: mk.masked_rnn_step(X, H, IH, HH, nonlinearity="gelu"), ValueError,
                     "nonlinearity must be one of 'tanh', 'relu', got 'gelu'; pick one of them."),
    "leak": (lambda: mk.masked_rnn_step(X, H, IH, HH, leak=0), ValueError,
             "leak must be a number in (0, 1], got 0; pass a float such as 0.1, or 1.0 for none."),
    "leak_text": (lambda: mk.SparseRNNCell(3, 5, leak="1"), TypeError,
                  "leak must be a number in (0, 1], got '1'; pass a float such as 0.1, or 1.0 for none."),
}


@pytest.mark.parametrize("case", BAD_STEPS)
def test_messages(case):
    call, error, message = BAD_STEPS[case]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


# --- the cell -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", [{}, {"nonlinearity": "relu"}, {"bias": False}, {"dtype": torch.float64}])
def test_cell_as_nn_rnn_cell(backend, settings):
    torch.manual_seed(4)
    cell = mk.SparseRNNCell(3, 5, **settings)
    torch.manual_seed(4)
    plain = nn.RNNCell(3, 5, **settings)
    assert isinstance(cell, nn.RNNCell)
    assert all(torch.equal(a, b) for a, b in zip(cell.parameters(), plain.parameters()))
    x, h = (draw(*shape, seed=k, dtype=cell.weight_hh.dtype) for k, shape in enumerate(((4, 3), (4, 5))))
    with mk.backend(backend):
        assert torch.equal(cell(x, h), plain(x, h))
        for name in ("weight_ih", "weight_hh", *(["bias_hh"] if cell.bias else [])):
            cell.set_mask(name, draw_mask(*getattr(cell, name).shape, density=0.5))
        plain.load_state_dict({key: value for key, value in cell.state_dict().items() if not key.endswith("_mask")})
        with torch.no_grad():
            cell.weight_hh[~cell.weight_hh_mask] = math.nan
        for arguments in ((x, h), (x,), (x[0], h[0]), (x[0],), (x[:0], h[:0])):
            got, want = cell(*arguments), plain(*arguments)
            assert got.shape == want.shape and got.dtype == want.dtype and torch.allclose(got, want, atol=1e-6)
        grads = [torch.autograd.grad(each(x, h).square().sum(), list(each.parameters())) for each in (cell, plain)]
    for (name, _), mine, its in zip(plain.named_parameters(), *grads):
        mask = getattr(cell, f"{name}_mask", None)
        assert torch.allclose(mine, its if mask is None else its * mask, atol=1e-5), name


BAD_INPUT = {
    "3d": lambda x, h: (x[None],), "hx_3d": lambda x, h: (x, h[None]), "inputs": lambda x, h: (x[:, :2],),
    "alone_inputs": lambda x, h: (x[0, :2],), "batch": lambda x, h: (x, h[:3]), "hidden": lambda x, h: (x, h[:, :4]),
    "alone_hx": lambda x, h: (x[0], h), "hx_alone": lambda x, h: (x, h[0]), "text": lambda x, h: ("x",),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_in_the_words_of_nn_rnn_cell(case):
    cell, plain = mk.SparseRNNCell(3, 5, leak=0.5), nn.RNNCell(3, 5)
    arguments = BAD_INPUT[case](draw(4, 3), draw(4, 5))
    with pytest.raises(Exception) as its:  # noqa: PT011 - whatever it is
        plain(*arguments)
    with pytest.raises(type(its.value)) as mine:
        cell(*arguments)
    assert str(mine.value) == str(its.value)


def test_the_leak_can_be_changed():
    cell, x, h = mk.SparseRNNCell(3, 5), draw(4, 3), draw(4, 5)
    whole = cell(x, h)
    cell.leak = 0.25
    assert torch.allclose(cell(x, h), 0.75 * h + 0.25 * whole, atol=1e-6)
    with pytest.raises(ValueError, match=r"leak must be a number in \(0, 1\], got 2"):
        cell.leak = 2


def test_an_unknown_nonlinearity_in_the_words_of_nn_rnn_cell():
    with pytest.raises(RuntimeError) as error:
        mk.SparseRNNCell(3, 5, nonlinearity="gelu", leak=0.5)(draw(4, 3))
    assert str(error.value) == "Unknown nonlinearity: gelu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_16_bit(dtype):
    cell = mk.SparseRNNCell(3, 5)
    cell.set_mask("weight_hh", draw_mask(5, 5, density=0.5))
    x, want = draw(4, 3), cell(draw(4, 3))
    with torch.autocast(torch.get_default_device().type, dtype=dtype):
        got = cell(x)
        assert got.dtype == nn.RNNCell(3, 5)(x).dtype == dtype
        assert cell(x.to(dtype), got).dtype == dtype
        got.float().sum().backward()
    assert torch.allclose(got.float(), want, atol=0.02)
    low = copy.deepcopy(cell).to(dtype)(x.to(dtype))
    assert low.dtype == dtype and torch.allclose(low.float(), want, atol=0.02)


def test_in_a_training_loop():
    cell = mk.SparseRNNCell(3, 5, leak=0.5)
    optimizer = torch.optim.Adam(cell.parameters(), lr=0.01, weight_decay=0.1)
    pruner = mk.MagnitudePruner([(cell, "weight_hh")], optimizer=optimizer)
    reg, x = mk.regularize(cell, strength=0.1), draw(6, 4, 3)
    assert [name for name, _ in reg.items()] == ["weight_hh"]
    losses = []
    for sparsity in (0.0, 0.4, 0.8) + (0.8,) * 40:
        pruner.step_to(sparsity)
        h = None
        for x_t in x:
            h = cell(x_t, h)
        loss = (h - 0.3).square().sum() + reg()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert cell.weight_hh[~cell.weight_hh_mask].eq(0).all()
    assert pruner.sparsity == 0.8 and losses[-1] < losses[3]
    twin = pickle.loads(pickle.dumps(cell))
    other = mk.SparseRNNCell(3, 5, leak=0.5)
    other.load_state_dict(cell.state_dict())
    assert torch.equal(twin(x[0]), cell(x[0])) and torch.equal(other(x[0]), cell(x[0])) and "leak=0.5" in repr(twin)
