"""The effective weight is the one that the module's next forward pass uses, whatever it is computed from."""
from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import moduli_kernels as mk
from moduli_kernels.masks import effective_weight, origin, parameters_behind


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Noisy(nn.Module):
    """Computes another weight in training than in evaluation."""

    def forward(self, weight):
        return weight + torch.randn_like(weight) if self.training else weight


def plain(layer):
    return layer


def by_hand(layer):
    layer.register_buffer("weight_mask", torch.rand(4, 4) < 0.5)
    return layer


def pruned(layer):
    mk.MagnitudePruner([(layer, "weight")]).step_to(0.5)
    layer.weight.data.normal_()
    return layer


def chained(layer):
    parametrizations.orthogonal(layer)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


# A way to make a layer's weight: (what it does to the layer, origin, names of the parameters behind).
WAYS = {
    "plain": (plain, "parameter", ["weight"]),
    "masked by hand": (by_hand, "parameter", ["weight"]),
    "pruned, then written": (pruned, "parameter", ["weight"]),
    "orthogonal": (parametrizations.orthogonal, "parametrization", ["parametrizations.weight.original"]),
    "weight_norm": (parametrizations.weight_norm, "parametrization",
                    ["parametrizations.weight.original0", "parametrizations.weight.original1"]),
    "spectral_norm": (parametrizations.spectral_norm, "parametrization", ["parametrizations.weight.original"]),
    "one's own": (lambda m: parametrize.register_parametrization(m, "weight", Doubled()) or m, "parametrization",
                  ["parametrizations.weight.original"]),
    "two in a chain": (chained, "parametrization", ["parametrizations.weight.original"]),
    "old spectral_norm": (nn.utils.spectral_norm, "hook", ["weight_orig"]),
    "old weight_norm": (nn.utils.weight_norm, "hook", ["weight_g", "weight_v"]),
    "torch's prune": (lambda m: prune.random_unstructured(m, "weight", amount=0.5), "pruned by torch", ["weight_orig"]),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_it_is_what_the_next_forward_pass_uses(way, training):
    make, kind, behind = WAYS[way]
    torch.manual_seed(0)
    layer = make(nn.Linear(4, 4, bias=False)).train(training)
    named = dict(layer.named_parameters())
    assert origin(layer, "weight") == kind
    assert [next(n for n, q in named.items() if q is p) for p in parameters_behind(layer, "weight")] == behind
    layer(torch.eye(4))
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(1.5)  # so that an attribute that was computed before is out of date
    if "spectral_norm" in way:
        layer.eval()  # in training the next pass makes another step of the power iteration first
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    weight = effective_weight(layer, "weight")
    after = layer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)  # reading changes nothing
    mask = getattr(layer, "weight_mask", torch.ones(4, 4)).bool()
    if way == "masked by hand":  # no hook holds such a mask, and nn.Linear does not know it
        assert torch.equal(weight, layer.weight * mask)
    else:
        torch.testing.assert_close(layer(torch.eye(4)), weight.T, rtol=1e-6, atol=1e-6)
    weight.square().sum().backward()
    assert all(p.grad is not None for p in parameters_behind(layer, "weight"))


def test_in_training_spectral_norm_makes_no_step_and_gives_the_weight_of_the_last_pass():
    for make in (parametrizations.spectral_norm, nn.utils.spectral_norm):
        layer = make(nn.Linear(4, 4, bias=False)).train()
        for _ in range(3):
            output = layer(torch.eye(4))
            torch.testing.assert_close(effective_weight(layer, "weight").T, output)
            torch.testing.assert_close(effective_weight(layer, "weight").T, output)


def test_a_parametrization_with_noise_is_read_without_it_and_stays_in_training():
    layer = nn.Linear(4, 4)
    original = layer.weight
    parametrize.register_parametrization(layer, "weight", Noisy())
    assert torch.equal(effective_weight(layer, "weight"), original)
    assert layer.parametrizations.weight[0].training and not torch.equal(layer.weight, original)
    with parametrize.cached():
        assert effective_weight(layer, "weight") is layer.weight


def test_a_plain_parameter_is_returned_itself():
    layer = nn.Linear(4, 4)
    assert effective_weight(layer, "weight") is layer.weight
    mk.MagnitudePruner([(layer, "weight")]).step_to(0.5)
    assert effective_weight(layer, "weight") is layer.weight


def test_what_is_of_unknown_origin_is_refused():
    layer = nn.Linear(4, 4)
    raw = layer.weight
    del layer.weight
    layer.weight_raw, layer.weight = raw, raw * 2
    assert origin(layer, "weight") == "attribute" and parameters_behind(layer, "weight") == []
    with pytest.raises(ValueError, match="^weight of Linear must be a Parameter or what torch.nn.utils.parametrize.*"
                                         "name the Parameter that it is made of .*bias, weight_raw"):
        effective_weight(layer, "weight")
    with pytest.raises(ValueError, match="^name must be a weight of Linear, got 'missing'; its own parameters"):
        effective_weight(layer, "missing")
    assert origin(layer, "missing") is None


@pytest.mark.parametrize("make, words", [
    (parametrizations.orthogonal, "a parametrization computes"), (parametrizations.weight_norm, "a parametrization"),
    (nn.utils.spectral_norm, "a hook computes"), (nn.utils.weight_norm, "a hook computes")])
def test_a_pruner_refuses_computed_weights(make, words):
    layer = make(nn.Linear(4, 4))
    expected = rf"^targets\[0\] must be a plain parameter, got .*Linear.weight, which {words}"
    with pytest.raises(ValueError, match=expected):
        mk.MagnitudePruner([(layer, "weight")])
    assert not [name for name, _ in layer.named_buffers() if name.endswith("_mask")]


def test_a_parameter_whose_name_begins_like_a_weights_is_no_recurrent_weight():
    rnn = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    rnn.weight_hh_l0_scores = nn.Parameter(torch.ones(4, 4))
    rnn.weight_hh_l10 = nn.Parameter(torch.ones(4, 4))
    assert list(mk.MagnitudePruner(rnn).masks) == [
        "weight_hh_l0", "weight_hh_l0_reverse", "weight_hh_l1", "weight_hh_l1_reverse"]
