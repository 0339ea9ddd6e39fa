"""A recurrent net uses what its masks, weights, orders and settings hold at the moment of the call, whoever wrote them
and however: nothing that an earlier call has seen is served again."""
from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import Tensor, nn

import moduli_kernels as mk
from moduli_kernels.rnn import masked_module
from tests.support.penalty_cases import BACKENDS, on_device
from tests.support.rnn_cases import assert_same, draw, draw_mask, net_of, plain_rnn, quiet, run

pytestmark = [on_device, *quiet]
ALL_PATHS = ("auto", "sparse", "dense")
N = 40


def check(net: mk.SparseRNN, *, batches: tuple[int, ...] = (1, 8)) -> None:
    """Without gradients, under inference_mode and with gradients, the net gives what torch.nn.RNN gives."""
    for batch in batches:
        x, plain = draw(5, batch, 4), plain_rnn(net)
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                assert torch.allclose(net(x)[0], plain(x)[0], atol=1e-5)
        assert_same(net, run(net, x), run(plain, x), 1e-4)


def used(path: str, **settings) -> mk.SparseRNN:
    """A masked net that has been called several times in every mode."""
    net = net_of(4, N, path=path, **settings)
    for _ in range(2):
        check(net)
    return net


# --- the report's example -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("density", [0.05, 0.5, 0.95])
def test_a_mask_at_the_address_and_id_of_one_that_is_gone(path, density):
    net, x = mk.SparseRNN(N, N, path=path), draw(5, 8, N)
    mask = draw_mask(N, N, density=density)
    net.set_mask("weight_hh_l0", mask)

    def with_mask(mask: Tensor) -> Tensor:
        del net.weight_hh_l0_mask
        gc.collect()
        net.register_buffer("weight_hh_l0_mask", mask.clone())
        return net(x)[0]

    with torch.no_grad():
        first = with_mask(mask)
        assert not torch.equal(first, with_mask(torch.zeros_like(mask)))
        assert torch.equal(first, with_mask(mask))


# --- writes without a trace ---------------------------------------------------------------------------------------

def converted_by_swap(net: mk.SparseRNN) -> None:
    """The Parameters stay, with other C++ tensors inside."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    net.weight_hh_l0.data.mul_(2)


def loaded(net: mk.SparseRNN, assign: bool) -> None:
    state = {key: value.clone().mul_(1.1) if value.is_floating_point() else ~value
             for key, value in net.state_dict().items()}
    net.load_state_dict(state, assign=assign)


def vector(net: mk.SparseRNN) -> None:
    parameters = list(net.parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters).detach() + 0.1, parameters)


WRITES = {
    "weight.data": lambda net: net.weight_hh_l0.data.add_(1),
    "weight.data.normal_": lambda net: net.weight_hh_l0.data.normal_(),
    "weight.data = new": lambda net: setattr(net.weight_hh_l0, "data", draw(N, N, seed=6)),
    "input weight.data": lambda net: net.weight_ih_l0.data.mul_(2),
    "NaN at masked weights": lambda net: net.weight_hh_l0.data.masked_fill_(~net.weight_hh_l0_mask, math.nan),
    "through a view": lambda net: net.weight_hh_l0.detach().view(-1).add_(0.5),
    "through NumPy": lambda net: net.weight_hh_l0.detach().cpu().numpy().__iadd__(1),
    "mask.data": lambda net: net.weight_hh_l0_mask.data.logical_not_(),
    "mask.data = new": lambda net: setattr(net.weight_hh_l0_mask, "data", draw_mask(N, N, density=0.6, seed=7)),
    "mask through NumPy": lambda net: net.weight_hh_l0_mask.cpu().numpy().fill(True),
    "bias mask.data": lambda net: net.bias_hh_l0_mask.data.logical_not_(),
    "bias.data": lambda net: net.bias_hh_l0.data.fill_(2),
    "vector_to_parameters": vector,
    "swap_tensors": converted_by_swap,
    "load_state_dict": lambda net: loaded(net, assign=False),
    "load_state_dict(assign=True)": lambda net: loaded(net, assign=True),
    "another Parameter": lambda net: setattr(net, "weight_hh_l0", nn.Parameter(draw(N, N, seed=8))),
    "in inference mode": lambda net: write_in_inference_mode(net),
}


def write_in_inference_mode(net: mk.SparseRNN) -> None:
    with torch.inference_mode():
        net.weight_hh_l0.add_(1)
        net.weight_hh_l0_mask.logical_not_()


@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_of_any_kind_counts_at_the_next_call(path, write):
    net = used(path)
    net.set_mask("bias_hh_l0", draw_mask(N, density=0.5, seed=3))
    check(net)
    WRITES[write](net)
    check(net)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("write", ["weight.data", "mask.data", "NaN at masked weights"])
def test_a_write_counts_on_every_backend(backend, write):
    with mk.backend(backend):
        net = used("auto")
        WRITES[write](net)
        check(net)


@pytest.mark.parametrize("path", ALL_PATHS)
def test_a_mask_of_floats_by_torch_prune_that_is_written(path):
    net, x = mk.SparseRNN(4, N, path=path), draw(5, 8, 4)
    nn.utils.prune.custom_from_mask(net, "weight_hh_l0", draw_mask(N, N, density=0.5))
    with torch.no_grad():
        net(x)
        net.weight_hh_l0_mask.data.zero_()
        net(x)
        want = nn.RNN(4, N)
        want.load_state_dict({name: getattr(net, name) for name, _ in want.named_parameters()})
        want.weight_hh_l0.zero_()
        assert torch.allclose(net(x)[0], want(x)[0], atol=1e-5)


@pytest.mark.parametrize("nets", ["cell", "two layers, both directions"])
def test_other_nets(nets):
    if nets == "cell":
        cell, x = mk.SparseRNNCell(4, N), draw(3, 4)
        cell.set_mask("weight_hh", draw_mask(N, N, density=0.3))
        with torch.no_grad():
            cell(x, draw(3, N))
            cell.weight_hh.data.normal_()
            cell.weight_hh_mask.data.logical_not_()
            want = nn.RNNCell(4, N)
            want.load_state_dict({name: p for name, p in cell.named_parameters()})
            want.weight_hh.masked_fill_(~cell.weight_hh_mask, 0)
            assert torch.allclose(cell(x, draw(3, N)), want(x, draw(3, N)), atol=1e-5)
        return
    for path in ALL_PATHS:
        net = net_of(4, N, 2, bidirectional=True, path=path, densities=(0.5, 0.3))
        check(net)
        for name in ("weight_ih_l1", "weight_hh_l1_reverse"):
            getattr(net, name).data.normal_(std=0.1)
            getattr(net, f"{name}_mask").data.logical_not_()
            check(net)


# --- layouts of blocks --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("write", ["mask.data", "mask.data = new", "mask through NumPy", "load_state_dict",
                                   "load_state_dict(assign=True)", "in inference mode", "weight.data"])
def test_a_layout_is_that_of_the_mask_as_it_is_now(laid_out, write):
    net = used("sparse")
    WRITES[write](net)
    check(net)
    layout = net._laid["weight_hh_l0"].layout
    assert int(layout.kept.sum()) + len(layout.strays) == int(net.weight_hh_l0_mask.sum())
    made = len(laid_out)
    check(net)
    assert len(laid_out) == made == (1 if write == "weight.data" else 2)


def test_an_order_that_is_written_counts(laid_out):
    net = used("sparse")
    net.set_order("weight_hh_l0", torch.arange(N))
    for change in (lambda: net.weight_hh_l0_order.data.copy_(torch.randperm(N)),
                   lambda: setattr(net.weight_hh_l0_order, "data", torch.randperm(N)),
                   lambda: net.set_order("weight_hh_l0", None)):
        change()
        check(net)
        order = net._laid["weight_hh_l0"].layout.row_order[:N].long()
        now = torch.arange(N) if net._buffers.get("weight_hh_l0_order") is None else net.weight_hh_l0_order
        assert torch.equal(order, now)


def test_an_order_that_is_none_any_more_is_an_error(laid_out):
    net = used("sparse")
    net.set_order("weight_hh_l0", torch.arange(N))
    net.weight_hh_l0_order.data.zero_()
    with pytest.raises(ValueError, match="row_order must be a permutation"):
        net(draw(5, 3, 4))


# --- settings -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("set_to", [("nonlinearity", "relu"), ("mode", "RNN_RELU")])
def test_nonlinearity_and_mode_are_one_setting(path, masked, set_to):
    net, x = net_of(4, N, densities=(None, 0.3 if masked else None), path=path), draw(5, 3, 4)
    for _ in range(2):
        check(net)
    setattr(net, *set_to)
    assert (net.nonlinearity, net.mode) == ("relu", "RNN_RELU")
    plain = nn.RNN(4, N, nonlinearity="relu")
    plain.load_state_dict(plain_rnn(net).state_dict())
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            assert torch.allclose(net(x)[0], plain(x)[0], atol=1e-5)
    for other in (net.to_rnn(), mk.SparseRNN.from_rnn(net), net.compress()):
        with torch.no_grad():
            assert other.nonlinearity == "relu" and torch.allclose(other(x)[0], plain(x)[0], atol=1e-5)
    net.mode = "RNN_TANH"
    check(net)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("nonlinearity", "gelu", "Unknown nonlinearity 'gelu'. Select from 'tanh' or 'relu'."),
    ("nonlinearity", None, "Unknown nonlinearity 'None'. Select from 'tanh' or 'relu'."),
    ("mode", "LSTM", "Unrecognized RNN mode: LSTM"), ("mode", "relu", "Unrecognized RNN mode: relu")])
def test_unknown_nonlinearities_are_refused_in_the_words_of_torch(name, value, message):
    net = mk.SparseRNN(4, 6, nonlinearity="relu")
    with pytest.raises(ValueError) as error:
        setattr(net, name, value)
    assert str(error.value) == message and net.mode == "RNN_RELU" and net.nonlinearity == "relu"


def test_from_rnn_reads_what_nn_rnn_computes():
    """nn.RNN computes by its mode; its attribute nonlinearity is a label that nothing reads."""
    plain, x = nn.RNN(4, 6), draw(5, 3, 4)
    plain.nonlinearity = "relu"
    assert torch.allclose(mk.SparseRNN.from_rnn(plain)(x)[0], plain(x)[0], atol=1e-6)
    plain.mode = "RNN_RELU"
    assert torch.allclose(mk.SparseRNN.from_rnn(plain)(x)[0], plain(x)[0], atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_every_setting_counts_at_the_next_call(masked):
    net, x = net_of(4, N, 2, densities=(None, 0.3 if masked else None), path="auto", dropout=0.0), draw(5, 3, 4)
    with torch.no_grad():
        for _ in range(3):
            net(x)
        net.batch_first = True
        assert torch.allclose(net(x)[0], plain_rnn(net)(x)[0], atol=1e-6)
        net.leak = 0.5
        slow = net(x)[0]
        net.leak = 1.0
        assert not torch.allclose(slow, net(x)[0])
        net.dropout = 1.0
        assert torch.allclose(net(x)[0], plain_rnn(net)(x)[0], atol=1e-6)
        net.eval()
        assert torch.allclose(net(x)[0], plain_rnn(net)(x)[0], atol=1e-6)
        net.path = "sparse"
        assert torch.allclose(net(x)[0], plain_rnn(net)(x)[0], atol=1e-6)


def test_settings_of_a_compressed_net_count_and_are_saved(tmp_path):
    pytest.importorskip("safetensors")
    net, x = net_of(4, N), draw(5, 3, 4)
    small = net.compress()
    small.nonlinearity, small.leak = "relu", 0.5
    net.nonlinearity, net.leak = "relu", 0.5
    small.save(tmp_path / "net")
    loaded = mk.CompressedRNN.load(tmp_path / "net", device=torch.get_default_device())
    with torch.no_grad():
        for each in (small, loaded, small.to_sparse_rnn()):
            assert torch.allclose(each(x)[0], net(x)[0], atol=1e-6)
    with pytest.raises(ValueError, match="Unknown nonlinearity 'gelu'"):
        small.nonlinearity = "gelu"
    with pytest.raises(ValueError, match=r"leak must be a number in \(0, 1\], got 2"):
        small.leak = 2


# --- what is counted ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(0, 7), (3,), (128, 128), (400, 400), (401, 399), (1024, 1024)])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_the_kept_share_is_the_share_of_true_entries(shape, density):
    mask = draw_mask(*shape, density=density)
    whole = draw_mask(1 + mask.numel(), density=density)
    for each in (mask, whole[1:], mask.float(), mask.t() if mask.dim() == 2 else mask[::2]):
        want = int(torch.count_nonzero(each)) / each.numel() if each.numel() else 1.0
        assert masked_module.kept_share(each) == want


def test_explain_counts_afresh():
    net = net_of(4, N, path="sparse")
    for density in (0.5, 0.25):
        net.weight_hh_l0_mask.data.copy_(torch.arange(N * N).view(N, N) % round(1 / density) == 0)
        assert f"weight_hh_l0 {100 * density:g} % kept" in net.explain()
