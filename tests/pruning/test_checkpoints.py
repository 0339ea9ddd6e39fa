"""mk.load_pruned_ loads the state_dict of a pruned model into one that has no masks yet."""
from __future__ import annotations

import copy
import io
import re

import pytest
import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.utils import prune

import moduli_kernels as mk
from tests.support.penalty_cases import on_device
from tests.support.pruning_cases import Net, Tied, loss_of

pytestmark = on_device


class Nested(nn.Module):
    """A recurrent net of a kind within a list within a model, and a shared encoder at two paths."""

    def __init__(self, kind: type[nn.Module] = nn.LSTM, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([nn.ModuleDict({"rnn": kind(3, 4, 2, bidirectional=True)}), nn.Linear(8, 3)])
        self.encoder = self.again = nn.Linear(3, 3)

    def forward(self, x):
        return self.blocks[1](self.blocks[0]["rnn"](self.encoder(x))[0])


NAMES = {
    Net: ["encoder.weight", "rnn.weight_hh_l0", "decoder.weight"],
    Nested: ["blocks.0.rnn.weight_hh_l1_reverse", "blocks.0.rnn.weight_ih_l0", "encoder.weight"],
}
KINDS = {
    "net": lambda seed: Net(seed),
    "lstm": lambda seed: Nested(nn.LSTM, seed),
    "gru": lambda seed: Nested(nn.GRU, seed),
    "sparse_rnn": lambda seed: Nested(mk.SparseRNN, seed),
}


def trained(kind: str, sparsity: float = 0.6) -> nn.Module:
    net = KINDS[kind](0)
    pruner = mk.MagnitudePruner(net, NAMES[type(net)])
    pruner.step_to(sparsity)
    return net


def saved(state: dict) -> dict:
    """The state_dict as it comes from a file."""
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


def snapshot(net: nn.Module) -> dict:
    return {name: tensor.detach().clone() for name, tensor in (*net.named_parameters(), *net.named_buffers())}


def assert_equal(net: nn.Module, other: nn.Module | dict) -> None:
    mine, its = snapshot(net), other if isinstance(other, dict) else snapshot(other)
    assert mine.keys() == its.keys()
    for name, tensor in its.items():
        assert torch.equal(mine[name], tensor) and mine[name].dtype == tensor.dtype, name


def assert_held(net: nn.Module) -> None:
    """What it has loaded stays masked in training."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(5, 2, 3)).square().sum().backward()
        optimizer.step()
    masks = {name.removesuffix("_mask"): mask for name, mask in net.named_buffers() if name.endswith("_mask")}
    assert masks and not all(mask.all() for mask in masks.values())
    for name, mask in masks.items():
        assert net.get_parameter(name)[~mask].eq(0).all()


# --- masks of ours ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_checkpoint_into_a_fresh_model(kind):
    net, fresh = trained(kind), KINDS[kind](1)
    keys = mk.load_pruned_(fresh, saved(net.state_dict()))
    assert keys.missing_keys == keys.unexpected_keys == []
    assert_equal(fresh, net)
    x = torch.randn(5, 2, 3)
    assert torch.equal(fresh(x), net(x))
    assert_held(fresh)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruner_made_afterwards_takes_the_masks_over_and_goes_on(kind):
    net, fresh = trained(kind), KINDS[kind](1)
    mk.load_pruned_(fresh, net.state_dict())
    pruner = mk.MagnitudePruner(fresh, NAMES[type(fresh)])
    assert pruner.sparsity == pytest.approx(0.6, abs=0.02)
    pruner.step_to(0.8)
    assert_held(fresh)


def test_into_a_model_that_has_masks_already():
    net, other = trained("net"), trained("net", 0.2)
    mask = other.rnn.weight_hh_l0_mask
    mk.load_pruned_(other, net.state_dict())
    assert_equal(other, net)
    assert other.rnn.weight_hh_l0_mask is mask


def test_a_dense_checkpoint_makes_no_masks():
    net, fresh = Net(), Net(1)
    mk.load_pruned_(fresh, net.state_dict())
    assert_equal(fresh, net)
    assert not [*fresh.buffers()]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.int64])
def test_masks_of_other_dtypes_become_bool(dtype):
    net, fresh = trained("gru"), KINDS["gru"](1)
    state = {key: value.to(dtype) if key.endswith("_mask") else value for key, value in net.state_dict().items()}
    mk.load_pruned_(fresh, saved(state))
    assert_equal(fresh, net)
    assert all(state[key].dtype == dtype for key in state if key.endswith("_mask"))  # what was given stays as it was


def test_weights_under_the_masks_of_a_checkpoint_do_not_come_back():
    net, fresh = trained("net"), Net(1)
    state = net.state_dict()
    state["rnn.weight_hh_l0"] = torch.ones(8, 8)
    mk.load_pruned_(fresh, state)
    assert torch.equal(fresh.rnn.weight_hh_l0, net.rnn.weight_hh_l0_mask.float())


def test_tied_weights():
    net, fresh = Tied(), Tied()
    mk.MagnitudePruner(net.targets()).step_to(0.5)
    mk.load_pruned_(fresh, saved(net.state_dict()))
    assert torch.equal(fresh.encoder.weight, net.encoder.weight) and fresh.encoder.weight is fresh.decoder.weight
    assert torch.equal(fresh.encoder.weight_mask, net.encoder.weight_mask)
    assert torch.equal(fresh.decoder.weight_mask, net.encoder.weight_mask)
    pruner = mk.MagnitudePruner(fresh.targets())
    assert pruner.sparsity == 0.5 and fresh.encoder.weight_mask is fresh.decoder.weight_mask


def test_a_model_wrapped_as_the_saved_one_was():
    net, fresh = nn.DataParallel(trained("lstm")), nn.DataParallel(KINDS["lstm"](1))
    mk.load_pruned_(fresh, saved(net.state_dict()))
    assert_equal(fresh, net)


def test_a_prefix_is_torchs_error_until_it_is_taken_away():
    net, fresh = nn.DataParallel(trained("net")), Net(1)
    state, before = saved(net.state_dict()), snapshot(fresh)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"encoder.weight".*\n.*Unexpected key\(s\).*"module.'):
        mk.load_pruned_(fresh, state)
    assert_equal(fresh, before)
    keys = mk.load_pruned_(fresh, state, strict=False)
    assert "encoder.weight" in keys.missing_keys and "module.encoder.weight_mask" in keys.unexpected_keys
    assert_equal(fresh, before)
    consume_prefix_in_state_dict_if_present(state, "module.")
    mk.load_pruned_(fresh, state)
    assert_equal(fresh, net.module)


# --- masks of torch.nn.utils.prune --------------------------------------------------------------------------------

def pruned_by_torch(kind: str) -> nn.Module:
    net = KINDS[kind](0)
    for name in NAMES[type(net)]:
        path, _, last = name.rpartition(".")
        prune.l1_unstructured(net.get_submodule(path), last, 0.4)
    return net


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_torchs_prune_into_a_plain_model(kind):
    net, fresh = pruned_by_torch(kind), KINDS[kind](1)
    keys = mk.load_pruned_(fresh, saved(net.state_dict()))
    assert keys.missing_keys == keys.unexpected_keys == []
    x = torch.randn(5, 2, 3)
    assert torch.equal(fresh(x), net(x))
    for name in NAMES[type(net)]:
        module, last = fresh.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        mask = getattr(module, f"{last}_mask")
        assert mask.dtype == torch.bool and type(getattr(module, last)) is nn.Parameter
        assert (~mask).sum() == round(0.4 * mask.numel())
    assert_held(fresh)


def test_a_checkpoint_of_torchs_prune_into_a_model_that_it_has_pruned():
    net, other = pruned_by_torch("net"), Net(1)
    for module, name in [(other.encoder, "weight"), (other.rnn, "weight_hh_l0"), (other.decoder, "weight")]:
        prune.identity(module, name)
    mk.load_pruned_(other, saved(net.state_dict()))
    assert_equal(other, net)
    assert prune.is_pruned(other)


def test_a_checkpoint_of_ours_into_a_model_that_torchs_prune_has_pruned():
    other = pruned_by_torch("net")
    before = snapshot(other)
    with pytest.raises(RuntimeError, match="weight_orig"):
        mk.load_pruned_(other, trained("net").state_dict())
    assert_equal(other, before)


# --- strict and errors --------------------------------------------------------------------------------------------

def test_strict_as_of_load_state_dict():
    net, fresh = trained("net"), Net(1)
    state = net.state_dict()
    state["else"] = torch.zeros(1)
    del state["decoder.bias"]
    before = snapshot(fresh)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"decoder.bias".*\n.*Unexpected key\(s\).*"else"'):
        mk.load_pruned_(fresh, state)
    assert_equal(fresh, before)
    keys = mk.load_pruned_(fresh, state, strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (["decoder.bias"], ["else"])
    assert torch.equal(fresh.rnn.weight_hh_l0_mask, net.rnn.weight_hh_l0_mask)
    assert_held(fresh)


def test_a_mask_without_its_weight_masks_what_is_there():
    net, fresh = trained("net"), Net(1)
    state = net.state_dict()
    del state["rnn.weight_hh_l0"]
    before = fresh.rnn.weight_hh_l0.detach().clone()
    keys = mk.load_pruned_(fresh, state, strict=False)
    assert keys.missing_keys == ["rnn.weight_hh_l0"]
    assert torch.equal(fresh.rnn.weight_hh_l0, before * net.rnn.weight_hh_l0_mask)


BROKEN = {
    "shape": (lambda s: s.update({"rnn.weight_hh_l0_mask": torch.ones(3, 3, dtype=torch.bool)}), ValueError,
              "state_dict['rnn.weight_hh_l0_mask'] must be a mask (8, 8) of 0 and 1, got torch.bool (3, 3)"),
    "values": (lambda s: s.update({"rnn.weight_hh_l0_mask": torch.full((8, 8), 0.5)}), ValueError,
               "state_dict['rnn.weight_hh_l0_mask'] must be a mask (8, 8) of 0 and 1, got other values"),
    "no_tensor": (lambda s: s.update({"decoder.weight_mask": [1, 0]}), ValueError,
                  "state_dict['decoder.weight_mask'] must be a mask (2, 8) of 0 and 1, got a list"),
    "weight": (lambda s: s.update({"decoder.weight": torch.ones(3, 8)}), RuntimeError,
               "size mismatch for decoder.weight"),
    "missing": (lambda s: s.pop("rnn.weight_hh_l0"), RuntimeError, 'Missing key(s) in state_dict: "rnn.weight_hh_l0"'),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", BROKEN)
def test_errors_change_nothing(case, masked):
    breaks, error, words = BROKEN[case]
    fresh, state = (trained("net", 0.3) if masked else Net(1)), trained("net").state_dict()
    before, untouched = snapshot(fresh), copy.deepcopy(state)
    breaks(state)
    with pytest.raises(error, match=re.escape(words)):
        mk.load_pruned_(fresh, state)
    assert_equal(fresh, before)
    for module in fresh.modules() if not masked else ():
        assert not module._forward_pre_hooks and not module._state_dict_pre_hooks
    mk.load_pruned_(fresh, untouched)
    loss_of(fresh).backward()
