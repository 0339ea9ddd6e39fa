"""CompressedRNN: the outputs of the SparseRNN it came from, size in memory and on disk, files, refusals."""
from __future__ import annotations

import copy
import gc
import pickle
import re
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import moduli_kernels as mk
from moduli_kernels.rnn.compressed import METADATA
from tests.support.penalty_cases import BACKENDS, examples, on_device
from tests.support.rnn_cases import draw, net_of, quiet, weight_names

pytestmark = [on_device, *quiet]


def same(got, want, tolerance: float = 1e-6) -> bool:
    got, want = ((r[0].data if isinstance(r[0], PackedSequence) else r[0], r[1]) for r in (got, want))
    return all(a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, atol=tolerance)
               for a, b in zip(got, want))


@pytest.mark.parametrize("backend", BACKENDS)
@given(inputs=st.integers(1, 60), hidden=st.integers(1, 90), layers=st.integers(1, 2), bidirectional=st.booleans(),
       batch_first=st.booleans(), bias=st.booleans(), nonlinearity=st.sampled_from(("tanh", "relu")),
       densities=st.tuples(*[st.sampled_from((None, 0.0, 0.05, 0.5, 1.0))] * 2), leak=st.sampled_from((1.0, 0.3)),
       kind=st.sampled_from(("batch", "empty", "one", "packed")), dtype=st.sampled_from((torch.float32, torch.float64)))
@settings(max_examples=examples(60))
def test_outputs_of_the_sparse_rnn(backend, inputs, hidden, layers, bidirectional, batch_first, bias, nonlinearity,
                                   densities, leak, kind, dtype):
    net = net_of(inputs, hidden, layers, bidirectional=bidirectional, batch_first=batch_first, bias=bias, leak=leak,
                 nonlinearity=nonlinearity, densities=densities, dtype=dtype)
    x = {"batch": draw(5, 3, inputs, dtype=dtype), "one": draw(5, inputs, dtype=dtype),
         "empty": draw(*((0, 5) if batch_first else (5, 0)), inputs, dtype=dtype),
         "packed": pack_sequence([draw(n, inputs, seed=n, dtype=dtype) for n in (2, 4, 1)], enforce_sorted=False)}[kind]
    with mk.backend(backend), torch.no_grad():
        small = net.compress()
        assert same(small(x), net(x), 1e-6 if dtype == torch.float32 else 1e-12)
        back = small.to_sparse_rnn()
        state = net.state_dict()
        for name in weight_names(net):  # a mask that keeps all is none
            if f"{name}_mask" in state and state[f"{name}_mask"].all():
                del state[f"{name}_mask"]
        assert back.state_dict().keys() == state.keys() and back.leak == leak
        assert all(torch.equal(tensor, state[key]) for key, tensor in back.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_and_autocast(dtype):
    net, x = net_of(4, 30, dtype=dtype), draw(5, 3, 4, dtype=dtype)
    small = net.compress()
    assert small.weight_hh_l0_values.dtype == dtype and same(small(x), net(x), 0.0)
    net.float()
    with torch.autocast(torch.get_default_device().type, dtype=dtype):
        assert same(net.compress()(x.float()), net(x.float()), 0.0)
    assert same(small.float()(x.float()), net(x.float()))


# --- size ---------------------------------------------------------------------------------------------------------

def bytes_of(net: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())


def gc_tensors() -> list[tuple[int, int]]:
    """(address, bytes) of every tensor that is alive."""
    gc.collect()
    return [(t.data_ptr(), t.nbytes) for t in gc.get_objects() if type(t) is torch.Tensor and t.layout == torch.strided]


def test_an_eighth_of_the_size_at_95_percent(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    net = net_of(400, 400, 2, densities=(0.05, 0.05))
    small, dense = net.compress(), net.to_rnn()
    assert 8 * bytes_of(small) <= bytes_of(dense) and not list(small.parameters())
    small.save(tmp_path / "small.safetensors")
    safetensors.save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    assert 8 * (tmp_path / "small.safetensors").stat().st_size <= (tmp_path / "dense.safetensors").stat().st_size
    torch.save(small.state_dict(), tmp_path / "small.pt")
    torch.save(dense.state_dict(), tmp_path / "dense.pt")
    assert 8 * (tmp_path / "small.pt").stat().st_size <= (tmp_path / "dense.pt").stat().st_size
    before = set(gc_tensors())
    assert small(draw(3, 2, 400))[0].shape == (3, 2, 400)
    assert not set(gc_tensors()) - before  # nothing is kept from the call


@pytest.mark.parametrize(("inputs", "dtype"), [(32768, torch.int16), (32769, torch.int32)])
def test_indices_are_as_small_as_they_can_be(inputs, dtype):
    net = net_of(inputs, 2, densities=(0.001, 1.0))
    with torch.no_grad():
        net.set_mask("weight_ih_l0", torch.arange(inputs).expand(2, -1) == inputs - 1)
        net.weight_ih_l0[:, -1] = 1
    small, x = net.compress(), draw(2, 3, inputs)
    assert small.weight_ih_l0_columns.dtype == dtype and small.weight_ih_l0_columns.tolist() == [inputs - 1] * 2
    assert small.weight_ih_l0_rows.dtype == torch.int32 and small.weight_ih_l0_rows.tolist() == [0, 1, 2]
    assert torch.is_tensor(small.weight_hh_l0) and same(small(x), net(x))


# --- files --------------------------------------------------------------------------------------------------------

def test_files_know_the_settings(tmp_path):
    pytest.importorskip("safetensors")
    net = net_of(5, 40, 2, nonlinearity="relu", batch_first=True, bidirectional=True, leak=0.4, dtype=torch.float64)
    small, x = net.compress(), draw(3, 4, 5, dtype=torch.float64)
    small.save(tmp_path / "net.safetensors")
    loaded = mk.CompressedRNN.load(tmp_path / "net.safetensors", torch.get_default_device())
    assert same(loaded(x), small(x), 0.0) and repr(loaded) == repr(small)
    assert loaded.state_dict().keys() == small.state_dict().keys()


def test_files_of_others(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "other.safetensors"
    safetensors.save_file({"weight": draw(3, 3)}, path)
    with pytest.raises(ValueError) as error:
        mk.CompressedRNN.load(path)
    assert str(error.value) == (f"path must be a file written by CompressedRNN.save, got {str(path)!r} without its "
                                "settings; save it again.")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"which safetensors cannot read \(.+\); save it again\.$"):
        mk.CompressedRNN.load(path)
    safetensors.save_file({}, path, metadata={METADATA: "{}"})
    with pytest.raises(ValueError, match=r"without weights; save it again\.$"):
        mk.CompressedRNN.load(path)
    with pytest.raises(FileNotFoundError):
        mk.CompressedRNN.load(tmp_path / "none.safetensors")


def test_without_safetensors(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: mk.CompressedRNN.load("net"), lambda: net_of(3, 4).compress().save(tmp_path / "net")):
        with pytest.raises(ImportError) as error:
            call()
        assert str(error.value) == ("CompressedRNN.save and load need safetensors, which is not installed; run pip "
                                    "install safetensors.")


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_fill_a_new_one(assign):
    net = net_of(5, 20, 2)
    small, x = net.compress(), draw(4, 3, 5)
    model = nn.Sequential(mk.CompressedRNN(5, 20, 2))
    assert model(x)[0].tanh().eq(0).all()  # keeps no weight before
    model.load_state_dict({f"0.{key}": tensor for key, tensor in small.state_dict().items()}, assign=assign)
    assert same(model(x), small(x), 0.0)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert same(twin(x), small(x), 0.0)
    other = net_of(5, 20, 2, densities=(0.5, 0.1), seed=5).compress()
    model.load_state_dict({f"0.{key}": tensor for key, tensor in other.state_dict().items()}, assign=assign)
    assert same(model(x), other(x), 0.0)


def broken(change) -> tuple[mk.CompressedRNN, dict]:
    small = net_of(5, 20, densities=(None, 0.3)).compress()
    state = {key: tensor.clone() for key, tensor in small.state_dict().items()}
    change(state)
    return small, state


BROKEN = {
    "column": lambda s: s["weight_hh_l0_columns"].__setitem__(0, 20),
    "negative": lambda s: s["weight_hh_l0_columns"].__setitem__(0, -1),
    "rows": lambda s: s["weight_hh_l0_rows"].__setitem__(20, 3),
    "descending": lambda s: s["weight_hh_l0_rows"].__setitem__(5, 0),
    "twice": lambda s: s["weight_hh_l0_columns"].__setitem__(1, int(s["weight_hh_l0_columns"][0])),
    "length": lambda s: s.update(weight_hh_l0_values=s["weight_hh_l0_values"][1:]),
    "neurons": lambda s: s.update(weight_hh_l0_rows=s["weight_hh_l0_rows"][1:]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_indices_that_are_no_matrix_are_not_loaded(case):
    """They would be read out of bounds."""
    small, state = broken(BROKEN[case])
    x = draw(4, 3, 5)
    before = small(x)
    message = r"weight_hh_l0_rows, _columns and _values must be a torch.sparse_csr matrix \(20, 20\), got none \(.*\); "
    with pytest.raises(RuntimeError, match=message):
        small.load_state_dict(state)
    assert case in ("length", "neurons") or same(small(x), before, 0.0)


def test_missing_and_unknown_keys_in_torchs_words():
    small = net_of(5, 20).compress()
    state = small.state_dict()
    for change, words in (({"other": draw(1)}, "Unexpected key"), ({"weight_hh_l0_rows": None}, "Missing key")):
        changed = {key: value for key, value in {**state, **change}.items() if value is not None}
        with pytest.raises(RuntimeError, match=words):
            small.load_state_dict(changed)


# --- what it refuses ----------------------------------------------------------------------------------------------

def test_gradients_are_refused():
    small, x, hx = net_of(5, 20).compress(), draw(4, 3, 5), draw(1, 3, 20)
    told = ("{} must not require a gradient in a CompressedRNN (it is for inference), got one that does; call it under "
            "torch.no_grad(), or train the SparseRNN it came from (to_sparse_rnn()).")
    calls = {"input": lambda: small(x.clone().requires_grad_()), "hx": lambda: small(x, hx.clone().requires_grad_()),
             "weights": small.requires_grad_}
    for name, call in calls.items():
        with pytest.raises(NotImplementedError, match=re.escape(told.format(name))):
            call()
    with torch.no_grad():
        assert not small(x.clone().requires_grad_())[0].requires_grad
    assert small.requires_grad_(False) is small and not small(x)[0].requires_grad


def test_input_is_checked_in_the_words_of_nn_rnn():
    net = net_of(5, 20)
    small, plain, x = net.compress(), net.to_rnn(), draw(4, 3, 5)
    for arguments in ((x[0, 0],), (x[..., :2],), (x, draw(1, 2, 20)), (x.double(),), (x[:0],), (x.to("meta"),)):
        with pytest.raises(Exception) as its:  # noqa: PT011 - whatever it is
            plain(*arguments)
        with pytest.raises(type(its.value), match=re.escape(str(its.value))):
            small(*arguments)


def test_it_stays_in_eval_mode():
    net = net_of(5, 20, 2, dropout=0.5)
    model = nn.Sequential(net.compress()).train()
    x = draw(4, 3, 5)
    assert not model[0].training and same(model(x), net.eval()(x), 0.0)
    assert model[0].to_sparse_rnn().dropout == 0.5
