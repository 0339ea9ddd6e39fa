"""Compares MagnitudePruner's errors word for word and checks that nothing has changed after them."""
from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from moduli_kernels.pruning.pruner import MagnitudePruner
from tests.support.penalty_cases import on_device
from tests.support.pruning_cases import Net, Tied, Weights

pytestmark = on_device


def layer_with(**buffers):
    layer = nn.Linear(3, 2)
    for name, value in buffers.items():
        layer.register_buffer(name, value)
    return layer


PASS = "pass e.g. [(model.rnn, 'weight_hh_l0')]."
BAD_TARGETS = [
    (lambda: nn.Linear(3, 2), ValueError,
     "model must hold a recurrent weight (weight_hh_l* of RNN, GRU, LSTM or weight_hh of a cell), found none in Linear;"
     ' name the weights: MagnitudePruner(model, ["fc.weight"]).'),
    (lambda: 3, TypeError, f"targets must be a list of (module, parameter name), got a int; {PASS}"),
    (lambda: (nn.Linear(3, 2), "weight"), TypeError,
     f"targets[0] must be a pair (module, parameter name), got a Linear; {PASS}"),
    (lambda: ["weight"], TypeError, f"targets[0] must be a pair (module, parameter name), got a str; {PASS}"),
    (lambda: [], ValueError, f"targets must name at least one parameter, got an empty list; {PASS}"),
    (lambda: [(nn.Linear(3, 2), "weight"), (nn.Linear(3, 2, bias=False), "bias")], ValueError,
     "targets[1] must name a parameter the module itself owns, got 'bias' of Linear; it owns: weight."),
    (lambda: [(nn.Sequential(nn.Linear(3, 2)), "0.weight")], ValueError,
     "targets[0] must name a parameter the module itself owns, got '0.weight' of Sequential; it owns: none."),
    (lambda: [(nn.LazyLinear(2), "weight")], ValueError,
     "targets[0] must be initialized, got the lazy LazyLinear.weight; run one forward pass first."),
    (lambda: [(Weights(torch.ones(2, dtype=torch.complex64)), "w0")], TypeError,
     "targets[0] must be a floating-point weight, got Weights.w0 with torch.complex64; integer and complex "
     "weights are not pruned, leave it out."),
    (lambda: [(torch_prune.identity(nn.Linear(3, 2), "weight"), "weight")], ValueError,
     "targets[0] must be a plain parameter, got Linear.weight pruned by torch.nn.utils.prune; use "
     "MagnitudePruner.from_torch_prune(...)."),
    (lambda: [(layer_with(weight_mask=torch.ones(3, 2, dtype=torch.bool)), "weight")], ValueError,
     "weight_mask of targets[0] must be a torch.bool buffer (2, 3), got torch.bool (3, 2): a mask that fits "
     "no parameter; delete it from the Linear or give it that shape."),
    (lambda: [(layer_with(weight_mask=torch.ones(2, 3)), "weight")], ValueError,
     "weight_mask of targets[0] must be a torch.bool buffer (2, 3), got torch.float32 (2, 3): a mask that "
     "fits no parameter; delete it from the Linear or give it that shape."),
]


@pytest.mark.parametrize("make, kind, message", BAD_TARGETS)
def test_bad_targets(make, kind, message):
    with pytest.raises(kind) as error:
        MagnitudePruner(make())
    assert str(error.value) == message


def test_integer_weights_are_refused():
    module = nn.Module()
    module.w = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    with pytest.raises(TypeError) as error:
        MagnitudePruner([(module, "w")])
    assert str(error.value) == ("targets[0] must be a floating-point weight, got Module.w with torch.int64; "
                                "integer and complex weights are not pruned, leave it out.")


def test_a_refused_pruner_leaves_no_trace():
    good, bad = nn.Linear(3, 2), nn.Linear(3, 2, bias=False)
    with pytest.raises(ValueError):
        MagnitudePruner([(good, "weight"), (bad, "bias")])
    assert list(good._buffers) == [] and not good.weight._backward_hooks


@pytest.mark.parametrize("given_, kind, message", [
    (1.5, ValueError, "sparsity must be in [0, 1], got 1.5; pass a fraction, e.g. 0.9 for 90 %."),
    (-0.1, ValueError, "sparsity must be in [0, 1], got -0.1; pass a fraction, e.g. 0.9 for 90 %."),
    (float("nan"), ValueError, "sparsity must be in [0, 1], got nan; pass a fraction, e.g. 0.9 for 90 %."),
    (90, ValueError, "sparsity must be in [0, 1], got 90; pass a fraction, e.g. 0.9 for 90 %."),
    ("0.5", TypeError, "sparsity must be a number in [0, 1], got a str; pass e.g. sparsity=0.9."),
    (True, TypeError, "sparsity must be a number in [0, 1], got a bool; pass e.g. sparsity=0.9."),
    (0.3, ValueError, "sparsity must be at least the 0.5 already cut (4 of 8 weights), got 0.3; pruned "
                      "weights never come back, load earlier masks to go back."),
])
def test_bad_sparsity(given_, kind, message):
    module = Weights(torch.arange(1.0, 9.0))
    pruner = MagnitudePruner(module.targets())
    pruner.step_to(0.5)
    with pytest.raises(kind) as error:
        pruner.step_to(given_)
    assert str(error.value) == message
    assert module.w0.tolist() == [0, 0, 0, 0, 5, 6, 7, 8]


def test_nan_among_the_weights_is_refused_before_anything_changes():
    module = Weights(torch.tensor([1.0, 2.0]), torch.tensor([float("nan"), 0.5]))
    pruner = MagnitudePruner(module.targets())
    with pytest.raises(ValueError) as error:
        pruner.step_to(0.25)
    assert str(error.value) == ("weights must not hold NaN when they are ranked, got NaN in 1.w1; no mask "
                                "was changed, look at the loss and the learning rate.")
    assert pruner.sparsity == 0 and module.w1[1] == 0.5
    module.w1_mask[0] = False  # a NaN that is masked already is set to 0
    pruner.step_to(0.5)
    assert module.w0.tolist() == [1, 2] and module.w1.tolist() == [0, 0]


def test_bad_optimizer():
    layer = nn.Linear(3, 2)
    with pytest.raises(TypeError) as error:
        MagnitudePruner([(layer, "weight")], optimizer=layer.parameters())
    assert str(error.value) == ("optimizer must be a torch.optim.Optimizer, a wrapper that has param_groups, or a list "
                                "of them, got a generator; pass the one that steps these weights, or None.")


def test_a_weight_that_no_longer_fits_its_mask():
    layer = nn.Linear(3, 2)
    pruner = MagnitudePruner([(layer, "weight")])
    layer.weight = nn.Parameter(torch.ones(2, 4))
    with pytest.raises(RuntimeError) as error:
        pruner.step_to(0.5)
    device = layer.weight.device
    assert str(error.value) == (f"0.weight and its mask must have one shape and device, got (2, 4) on {device} and "
                                f"(2, 3) on {device}; move the module with module.to(...), not the parameter "
                                "alone.")


def test_tied_masks_that_differ_and_ties_that_part_are_refused():
    net = Tied()
    net.encoder.register_buffer("weight_mask", torch.ones(7, 4, dtype=torch.bool))
    net.decoder.register_buffer("weight_mask", torch.zeros(7, 4, dtype=torch.bool))
    message = "the modules that share 0.weight must have one mask, got masks that differ; delete all but one."
    with pytest.raises(ValueError, match=re.escape(message)):
        MagnitudePruner(net.targets())
    net = Tied()
    pruner = MagnitudePruner(net.targets())
    net.decoder.weight = nn.Parameter(torch.ones(7, 4))
    message = "0.weight was one tied parameter and is several now; make a new MagnitudePruner."
    with pytest.raises(RuntimeError, match=re.escape(message)):
        pruner.step_to(0.5)


def test_state_dicts_that_do_not_fit_change_nothing():
    net = Net()
    pruner = MagnitudePruner(net.targets())
    pruner.step_to(0.5)
    before = pruner.state_dict()
    good = {key: torch.zeros_like(mask) for key, mask in before.items()}
    keys = "0.weight, 1.weight_hh_l0, 2.weight_ih_l0, 3.weight"
    cases = [
        ({**good, "7.weight": torch.ones(2, dtype=torch.bool)},
         f"state_dict must hold a mask for each of {keys}, got '7.weight': a mask that fits no parameter; "
         "give the pruner the targets it was saved with."),
        ({k: v for k, v in good.items() if k != "3.weight"},
         "state_dict['3.weight'] must be a torch.bool mask (2, 8), got none; give the pruner the targets it "
         "was saved with."),
        ({**good, "3.weight": torch.ones(8, 2, dtype=torch.bool)},
         "state_dict['3.weight'] must be a torch.bool mask (2, 8), got torch.bool (8, 2); give the pruner "
         "the targets it was saved with."),
        ({**good, "3.weight": torch.ones(2, 8)},
         "state_dict['3.weight'] must be a torch.bool mask (2, 8), got torch.float32 (2, 8); give the pruner "
         "the targets it was saved with."),
    ]
    for state, message in cases:
        with pytest.raises(ValueError) as error:
            pruner.load_state_dict(state)
        assert str(error.value) == message
        assert all(torch.equal(before[k], m) for k, m in pruner.masks.items())


# --- blocks -------------------------------------------------------------------------------------------------

PAIR = (torch.arange(2), torch.arange(3))  # the identity for nn.Linear(3, 2).weight
TOGETHER = ("pass block=(16, 16) and order={(module, name): (row_permutation, column_permutation)}, which names the "
            "matrices cut in blocks.")
WHOLE = "block must be two positive whole numbers (rows, columns), got "
KEY = "each key of order must be one of the targets, got "
SAME = "; use the same (module, name) pairs in both, or the targets' names: 0.weight, 1.bias."
WHAT = "order[Linear, 'weight']"
TWICE = "; for a recurrent weight pass the same permutation twice."
REPEATS, MAKES = " that repeats or leaves out some", "; mk.manifold_order makes one."
BAD = [  # block, order made from a Linear(3, 2) whose weight and bias are targets, error
    ((16, 16), lambda m: None, ValueError,
     f"block and order must be given together, got block=(16, 16) without order; {TOGETHER}"),
    (None, lambda m: {(m, "weight"): PAIR}, ValueError,
     f"block and order must be given together, got order without block; {TOGETHER}"),
    *((block, lambda m: {(m, "weight"): PAIR}, ValueError, f"{WHOLE}{block!r}; pass e.g. (16, 16).")
      for block in (16, (16,), (4, 4, 4), (0, 4), (4, -1), (4.0, 4), (True, 4), "44")),
    ((2, 2), lambda m: [PAIR], TypeError,
     "order must be a dict {(module, name): (row_permutation, column_permutation)}, got a list; "
     "mk.manifold_order(points, manifold) makes permutations."),
    ((2, 2), lambda m: {"weight": PAIR}, ValueError, f"{KEY}'weight'{SAME}"),
    ((2, 2), lambda m: {m: PAIR}, ValueError, f"{KEY}a Linear{SAME}"),
    ((2, 2), lambda m: {(m, "weights"): PAIR}, ValueError, f"{KEY}(Linear, 'weights'){SAME}"),
    ((2, 2), lambda m: {(nn.Linear(3, 2), "weight"): PAIR}, ValueError, f"{KEY}(Linear, 'weight'){SAME}"),
    ((2, 2), lambda m: {(m, 0): PAIR}, ValueError, f"{KEY}a tuple{SAME}"),
    ((2, 2), lambda m: {(m, "weight"): PAIR, (m, "bias"): PAIR}, ValueError,
     "order[Linear, 'bias'] must be of a matrix, got a parameter (2,); leave it out of order."),
    ((2, 2), lambda m: {(m, "weight"): PAIR[0]}, ValueError,
     f"{WHAT} must be a pair (row_permutation, column_permutation), got a Tensor{TWICE}"),
    ((2, 2), lambda m: {(m, "weight"): PAIR[:1]}, ValueError,
     f"{WHAT} must be a pair (row_permutation, column_permutation), got a tuple{TWICE}"),
    ((2, 2), lambda m: {(m, "weight"): PAIR[::-1]}, ValueError,
     f"{WHAT}[0] must be an int64 permutation of range(2), got torch.int64 (3,){MAKES}"),
    ((2, 2), lambda m: {(m, "weight"): (PAIR[0], PAIR[1].int())}, ValueError,
     f"{WHAT}[1] must be an int64 permutation of range(3), got torch.int32 (3,){MAKES}"),
    ((2, 2), lambda m: {(m, "weight"): (PAIR[0], torch.tensor([0, 2, 2]))}, ValueError,
     f"{WHAT}[1] must be an int64 permutation of range(3), got torch.int64 (3,){REPEATS}{MAKES}"),
    ((2, 2), lambda m: {(m, "weight"): (PAIR[0] + 1, PAIR[1])}, ValueError,
     f"{WHAT}[0] must be an int64 permutation of range(2), got torch.int64 (2,){REPEATS}{MAKES}"),
    ((2, 2), lambda m: {(m, "weight"): ([0, 1], PAIR[1])}, ValueError,
     f"{WHAT}[0] must be an int64 permutation of range(2), got a list{MAKES}"),
    ((2, 2), lambda m: {(m, "weight"): (None, PAIR[1])}, ValueError,
     f"{WHAT}[0] must be an int64 permutation of range(2), got none{MAKES}"),
]


@pytest.mark.parametrize("block, order, kind, message", BAD)
def test_bad_blocks_and_orders_change_nothing(block, order, kind, message):
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    with pytest.raises(kind) as error:
        MagnitudePruner([(layer, "weight"), (layer, "bias")], block=block, order=order(layer))
    assert str(error.value) == message
    assert list(layer._buffers) == [] and not layer.weight._backward_hooks and torch.equal(before, layer.weight)


def test_two_orders_of_a_tied_weight_are_refused():
    net = Tied()
    pairs = [(torch.arange(7), torch.arange(4)), (torch.arange(7).flip(0), torch.arange(4))]
    with pytest.raises(ValueError) as error:
        MagnitudePruner(net.targets(), block=(2, 2), order=dict(zip(net.targets(), pairs)))
    assert str(error.value) == ("order[Linear, 'weight'] must be the order of the parameter it is tied to, got another "
                                "one; name a tied parameter once.")
    assert not hasattr(net.encoder, "weight_mask") and not hasattr(net.decoder, "weight_mask")


def test_targets_that_torch_has_pruned_are_refused_before_their_order_is_read():
    layer = torch_prune.identity(nn.Linear(3, 2), "weight")
    with pytest.raises(ValueError, match="pruned by torch.nn.utils.prune; use MagnitudePruner.from_torch_prune"):
        MagnitudePruner([(layer, "weight")], block=(2, 2), order={(layer, "weight"): PAIR})
