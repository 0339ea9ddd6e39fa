"""masks/buffers.py: the buffer in which a mask lives, and that no other file of the package knows its name."""
from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from moduli_kernels import masks

PACKAGE = Path(masks.__file__).parents[1]
# The end of a buffer's name: the whole of a string, or after a field that a parameter's name is put into.
ENDING = re.compile(r"(^|\{\w*\}|%s)_(mask|orig)(?!\w)")


def spelled_names(source: str) -> list[str]:
    """The string literals in which Python source puts a parameter's name together with `_mask` or `_orig`.

    An f-string counts with its fields as {}; docstrings do not count.
    """
    tree = ast.parse(source)
    skipped = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    skipped |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            text = node.value
        else:
            continue
        if ENDING.search(text):
            found.append(f"line {node.lineno}: {text!r}")
    return found


@pytest.mark.parametrize("source", ['f"{name}_mask"', 'name + "_mask"', '"{}_mask".format(name)', '"%s_mask" % name',
                                    'f"{prefix}{name}_mask of {kind}"', 'name.removesuffix("_orig")'])
def test_the_search_finds_each_way_to_spell_a_name(source):
    assert len(spelled_names(source)) == 1


@pytest.mark.parametrize("source", ['"""`{name}_mask` is a buffer."""', '"attn_mask"', 'f"{name}_masked"', '"mask"',
                                    'torch.ops.moduli_kernels.penalty_mask'])
def test_the_search_leaves_other_strings_alone(source):
    assert spelled_names(source) == []


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_masks_alone_spells_the_names_of_its_buffers(file):
    found = spelled_names(file.read_text())
    assert bool(found) == (file == PACKAGE / "masks" / "buffers.py"), found


def test_a_mask_is_set_replaced_and_removed():
    layer, ones, zeros = nn.Linear(3, 2), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)
    assert masks.get_mask(layer, "weight") is None and masks.live_mask(layer, "weight") is None
    masks.remove_mask(layer, "weight")  # there is none, which is no error
    masks.set_mask(layer, "weight", ones)
    assert masks.get_mask(layer, "weight") is masks.live_mask(layer, "weight") is layer.weight_mask is ones
    assert masks.buffer_name("weight") in layer.state_dict()
    masks.replace_mask(layer, "weight", zeros)
    assert layer.weight_mask is zeros and masks.buffer_name("weight") in layer.state_dict()
    masks.remove_mask(layer, "weight")
    assert not hasattr(layer, "weight_mask")


def test_a_mask_that_is_not_saved_stays_so_when_it_is_replaced_but_not_when_it_is_set_anew():
    layer, mask = nn.Linear(3, 2), torch.ones(2, 3, dtype=torch.bool)
    layer.register_buffer("weight_mask", mask, persistent=False)
    masks.replace_mask(layer, "weight", ~mask)
    assert "weight_mask" not in layer.state_dict()
    masks.remove_mask(layer, "weight")
    masks.set_mask(layer, "weight", mask)
    assert "weight_mask" in layer.state_dict()


def test_live_masks_are_bool_and_belong_to_a_parameter_of_the_same_name():
    layer = nn.Linear(3, 2)
    masks.set_mask(layer, "weight", torch.ones(2, 3))
    masks.set_mask(layer, "other", torch.ones(2, dtype=torch.bool))
    assert masks.get_mask(layer, "weight") is not None and masks.live_mask(layer, "weight") is None
    assert masks.live_mask(layer, "other") is None and masks.live_mask(None, "weight") is None


def test_the_names_are_those_of_torch_prune():
    layer = prune.l1_unstructured(nn.Linear(3, 2), "weight", amount=2)
    assert masks.names_pruned_by_torch(layer) == ["weight"] and masks.names_pruned_by_torch(nn.Linear(3, 2)) == []
    assert isinstance(layer._parameters[masks.original_name("weight")], nn.Parameter)
    assert torch.equal(masks.get_mask(layer, "weight"), layer.weight_mask)
    assert masks.live_mask(layer, "weight") is None


def test_zero_masked_counts_in_the_version():
    weight, mask = torch.full((2, 3), float("nan")), torch.tensor([[True, False, True]] * 2)
    version = weight._version
    masks.zero_masked_(weight, mask)
    assert torch.equal(weight == 0, ~mask) and weight._version == version + 1


@pytest.mark.parametrize("value, words", [(None, "none"), (3, "a int"), (torch.ones(2, 1), "torch.float32 (2, 1)")])
def test_what_is_no_mask_is_described(value, words):
    assert not masks.is_mask(value, torch.ones(2, 3)) and masks.described(value) == words
    assert masks.is_mask(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3))
