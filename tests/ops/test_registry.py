"""The ops as PyTorch sees them: their schemas word for word, since C++ and Triton register kernels for them, and what a
declaration makes of them."""
from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import moduli_kernels as mk
from moduli_kernels.ops import registry

ONE = ("Tensor weight, Tensor rows, Tensor? cols, Tensor? mask, Tensor? crow_indices, Tensor? col_indices, "
       "Tensor? table, int[] factors, float[] factor_parameters, int inhibitor, float[] inhibitor_parameters, "
       "float power, int blocks, float scale")
SEVERAL = ("Tensor[] weights, Tensor[] rows, Tensor?[] cols, Tensor? table, int[] factors, float[] factor_parameters, "
           "int inhibitor, float[] inhibitor_parameters, float power, int[] blocks, float[] scales")
STEP = "str nonlinearity, float leak, bool reverse"
NEEDS = "bool need_x, bool need_h, bool need_w_ih, bool need_w_hh, bool need_bias"
SCHEMAS = {
    "penalty": f"({ONE}) -> Tensor",
    "penalty_with_grads": f"({ONE}, bool need_weight, bool need_points) -> (Tensor, Tensor, Tensor, Tensor)",
    "penalty_grads": f"(Tensor grad, {ONE}, bool need_weight, bool need_points) -> (Tensor, Tensor, Tensor)",
    "accumulate_penalty_grad_": f"(Tensor(a!) grad, {ONE}, bool need_points) -> (Tensor, Tensor, Tensor)",
    "proximal_step_": f"(Tensor(a!){ONE.removeprefix('Tensor')}, float step) -> ()",
    "scale_grads_": "(Tensor(a!)[] grads, Tensor grad) -> ()",
    "penalties_with_grads":
        f"({SEVERAL}, bool[] need_weight, bool[] need_points) -> (Tensor, Tensor, Tensor[], Tensor[], Tensor[])",
    "penalties_grads":
        f"(Tensor grad, {SEVERAL}, bool[] need_weight, bool[] need_points) -> (Tensor[], Tensor[], Tensor[])",
    "scale_penalties_grads_": "(Tensor(a!)[] grads, Tensor grad, int[] layers) -> ()",
    "masked_rnn":
        "(Tensor x, Tensor h, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? mask_ih, Tensor? mask_hh, "
        "Tensor? crow_ih, Tensor? col_ih, Tensor? crow_hh, Tensor? col_hh, Tensor? lengths, "
        f"Tensor? order_x, Tensor? order_h, {STEP}, bool keep) -> (Tensor, Tensor, Tensor)",
    "found_blocks":
        "(Tensor mask, Tensor? row_order, Tensor? column_order, int batch) -> Tensor",
    "masked_rnn_grads":
        "(Tensor? grad_output, Tensor grad_h_n, Tensor x, Tensor h, Tensor w_ih, Tensor w_hh, Tensor? mask_ih, "
        f"Tensor? mask_hh, Tensor? lengths, Tensor? order_x, Tensor? order_h, Tensor output, Tensor activations, "
        f"{STEP}, {NEEDS}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "blocked_rnn":
        "(Tensor x, Tensor h, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? mask_ih, Tensor mask_hh, "
        f"Tensor[] layout, int side, Tensor? lengths, {STEP}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    "blocked_rnn_grads":
        "(Tensor? grad_output, Tensor grad_h_n, Tensor x, Tensor h, Tensor w_ih, Tensor w_hh, Tensor? mask_ih, "
        "Tensor mask_hh, Tensor[] layout, int side, Tensor? lengths, Tensor states, Tensor activations, "
        f"{STEP}, {NEEDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "any_masked_nonzero": "(Tensor weight, Tensor mask) -> Tensor",
    "zero_masked_": "(Tensor(a!) weight, Tensor mask) -> Tensor",
}
WITHOUT_TRITON = ("any_masked_nonzero", "zero_masked_", "found_blocks")  # the fallback serves them on CUDA


def test_every_op_is_listed_here():
    assert registry.declared.keys() == SCHEMAS.keys()


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    op = getattr(torch.ops.moduli_kernels, name).default
    assert registry.declared[name].schema() == name + SCHEMAS[name]
    assert str(op._schema) == f"moduli_kernels::{name}{SCHEMAS[name]}"
    assert (torch.Tag.pt2_compliant_tag in op.tags) == (not name.endswith("_"))


@pytest.mark.parametrize("name", SCHEMAS)
def test_launcher(name):
    """The module that a declaration names holds a function of the op's name; found without Triton, by its source."""
    if name in WITHOUT_TRITON:
        assert registry.declared[name].launcher is None
        return
    path = Path(mk.__file__).parent.joinpath("triton", *registry.declared[name].launcher.split(".")).with_suffix(".py")
    functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert name in functions


@pytest.mark.parametrize("name", SCHEMAS)
def test_arguments_in_groups(name):
    """One by one and in groups they are the same, in the same order."""
    op = registry.declared[name]
    names = [field for _, field in op.fields()]
    flat = []
    for group, given in zip(op.arguments, op.grouped(names), strict=True):
        flat += [given] if isinstance(group, str) else given
        assert isinstance(group, str) or given == group._fields
    assert flat == names
