"""Every message that penalty, regularizers, manifolds, inhibitors and regularize raise for wrong input, word for word.

test_every_check_is_tested makes sure that no `raise` in the package's checks is left out here; those of rnn/checks.py
are tested in tests/rnn.
"""
from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import moduli_kernels as mk
from moduli_kernels.penalty import checks
from tests.support.penalty_cases import BACKENDS, draw_points, draw_weight

pytestmark = [pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state"),
              pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")]

PACKAGE = Path(mk.__file__).parent
CHECKS = [path for path in sorted(PACKAGE.rglob("checks.py")) if path.parent.name != "rnn"]
TORUS = "FlatTorus(periods=(10.0, 10.0))"


class Case(NamedTuple):
    call: Callable[[], object]
    error: type[Exception]
    message: str


def penalty(weight=None, rows=None, cols=None, **settings):
    weight = draw_weight(6, 6) if weight is None else weight
    rows = draw_points("torus", 6) if rows is None else rows
    return mk.moduli_penalty(weight, rows, cols, **{"manifold": "torus", **settings})


def mask(*shape: int, dtype: torch.dtype = torch.bool, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


NUMBERS = {
    "power_below_1": Case(lambda: penalty(power=0.5), ValueError,
        "power must be at least 1 (|w|^l is not differentiable at 0 below that), got 0.5; use power=1.0 for "
        "sparsity or power=2.0 for decay."),
    "power_nan": Case(lambda: penalty(power=math.nan), ValueError,
        "power must be a finite number, got nan; pass a float such as 0.1."),
    "power_text": Case(lambda: mk.ModuliRegularizer(3, power="2"), TypeError,
        "power must be a finite number, got '2'; pass a float such as 0.1."),
    "strength_infinite": Case(lambda: penalty(strength=math.inf), ValueError,
        "strength must be a finite number, got inf; pass a float such as 0.1."),
    "strength_bool": Case(lambda: penalty(strength=True), TypeError,
        "strength must be a finite number, got True; pass a float such as 0.1."),
    "strength_tensor": Case(lambda: mk.CoefficientRegularizer(torch.ones(2, 2), strength=torch.tensor(1.0)),
                            TypeError,
        "strength must be a finite number, got a Tensor; pass a float such as 0.1."),
    "strength_assigned_later": Case(lambda: strength_assigned(math.nan), ValueError,
        "strength must be a finite number, got nan; pass a float such as 0.1."),
    "strength_negative": Case(lambda: mk.ModuliRegularizer(3, strength=-0.1), ValueError,
        "strength must be at least 0 (a negative one would reward long connections), got -0.1; pass a float such as "
        "0.1, and 0 for no penalty."),
    "blocks_0": Case(lambda: penalty(blocks=0), ValueError,
        "blocks must be an integer of at least 1, got 0; pass a larger one."),
    "blocks_float": Case(lambda: mk.ModuliRegularizer(3, blocks=4.0), TypeError,
        "blocks must be an integer of at least 1, got 4.0; pass an int."),
    "blocks_bool": Case(lambda: penalty(blocks=True), TypeError,
        "blocks must be an integer of at least 1, got True; pass an int."),
    "reduction": Case(lambda: penalty(reduction="max"), ValueError,
        "reduction must be one of 'mean', 'sum', got 'max'; pick one of them."),
    "reduction_none": Case(lambda: mk.ModuliRegularizer(3, reduction=None), ValueError,
        "reduction must be one of 'mean', 'sum', got a NoneType; pick one of them."),
    "reduction_of_coefficients": Case(lambda: mk.CoefficientRegularizer(torch.ones(2, 2), reduction="total"),
                                      ValueError,
        "reduction must be one of 'mean', 'sum', got 'total'; pick one of them."),
    "radius_negative": Case(lambda: mk.Circle(-5.0), ValueError,
        "radius must be a positive finite number, got -5.0; pass a float such as 5.0."),
    "radius_text": Case(lambda: mk.Sphere(2, "5"), TypeError,
        "radius must be a positive finite number, got '5'; pass a float such as 5.0."),
    "period_negative": Case(lambda: mk.FlatTorus((10.0, -1.0)), ValueError,
        "periods[1] must be a positive finite number, got -1.0; pass a float such as 5.0."),
    "periods_apart": Case(lambda: mk.FlatTorus(10.0, 10.0), TypeError,
        "periods must be one tuple of positive numbers, got 2 arguments; pass FlatTorus(periods=(10.0, 10.0))."),
    "periods_number": Case(lambda: mk.FlatTorus(10.0), TypeError,
        "periods must be a tuple of positive numbers, got 10.0; pass for example (10.0, 10.0)."),
    "periods_empty": Case(lambda: mk.FlatTorus(()), ValueError,
        "periods must hold at least one positive number, got (); pass for example (10.0, 10.0)."),
    "sigmas": Case(lambda: mk.DifferenceOfGaussians(1.0, 5.0, 0.25), ValueError,
        "sigma1 must be smaller than sigma2 (narrow minus wide Gaussian), got sigma1=5.0 and sigma2=0.25; "
        "swap them or widen sigma2."),
    "zero_min": Case(lambda: mk.DifferenceOfGaussians(zero_min="sample"), ValueError,
        "zero_min must be True, False or 'sampled', got 'sample'; 'sampled' takes the offset from the points."),
    "zero_min_none": Case(lambda: mk.DifferenceOfGaussians(zero_min=None), TypeError,
        "zero_min must be True, False or 'sampled', got a NoneType; pass True, the default."),
    "zero_min_without_points": Case(lambda: mk.DifferenceOfGaussians(zero_min="sampled")(torch.ones(3)), ValueError,
        "zero_min='sampled' must be given points before it has values (its offset is the largest difference of "
        "Gaussians over their pairs), got none; pass the inhibitor to moduli_penalty, ModuliRegularizer or "
        "regularize, or call inhibitor.at_points(manifold, rows)."),
    "table": Case(lambda: mk.TabulatedInhibitor(lambda d: 1 / d, 10.0), ValueError,
        "f must be finite on [0, max_distance], got NaN or infinity in its samples; choose a smaller "
        "max_distance or an inhibitor without a pole."),
}


def strength_assigned(value: float):
    reg = mk.ModuliRegularizer(3)
    reg.strength = value
    return reg(draw_weight(3, 3))


CHOICES = {
    "preset": Case(lambda: penalty(manifold="tours"), ValueError,
        "manifold must be a Manifold or one of 'torus', 'torus6', 'circle', 'sphere', 's3', 'klein', 'r3', "
        "'mixed', got 'tours'; pick one of them."),
    "manifold_class": Case(lambda: mk.ModuliRegularizer(3, manifold=mk.Sphere), ValueError,
        "manifold must be a Manifold or one of 'torus', 'torus6', 'circle', 'sphere', 's3', 'klein', 'r3', "
        "'mixed', got <class 'moduli_kernels.Sphere'>; pick one of them."),
    "inhibitor": Case(lambda: penalty(inhibitor=3.0), TypeError,
        "inhibitor must be an Inhibitor, a callable d -> f(d) or None, got 3.0; pass for example "
        "DifferenceOfGaussians()."),
    "inhibitor_name": Case(lambda: mk.regularize(nn.RNN(2, 3), inhibitor="dog"), TypeError,
        "inhibitor must be an Inhibitor, a callable d -> f(d) or None, got 'dog'; pass for example "
        "DifferenceOfGaussians()."),
}

WEIGHTS = {
    "list": Case(lambda: penalty([[1.0]]), TypeError,
                 "weight must be a tensor, got a list; pass the module's parameter."),
    "module": Case(lambda: penalty(nn.Linear(6, 6)), TypeError,
        "weight must be a tensor, got a Linear; pass the module's parameter."),
    "integer": Case(lambda: penalty(torch.ones(6, 6, dtype=torch.int64)), TypeError,
        "weight must be float32, float64, bfloat16 or float16, got torch.int64; convert it with .float()."),
    "bool": Case(lambda: penalty(mask(6, 6)), TypeError,
        "weight must be float32, float64, bfloat16 or float16, got torch.bool; convert it with .float()."),
    "complex": Case(lambda: mk.ModuliRegularizer(6)(torch.ones(6, 6, dtype=torch.complex64)), TypeError,
        "weight must be float32, float64, bfloat16 or float16, got torch.complex64; convert it with "
        ".float()."),
    "float8": Case(lambda: penalty(torch.ones(6, 6).to(torch.float8_e4m3fn)), TypeError,
        "weight must be float32, float64, bfloat16 or float16, got torch.float8_e4m3fn; convert it with "
        ".float()."),
    "coo": Case(lambda: penalty(torch.eye(6).to_sparse()), TypeError,
        "weight must be dense or torch.sparse_csr, got torch.sparse_coo; convert it with .to_sparse_csr()."),
    "vector": Case(lambda: penalty(torch.ones(6)), ValueError,
        "weight must have at least 2 dimensions (rows, columns, *kernel), got shape (6,); the penalty is "
        "defined on matrices."),
    "number": Case(lambda: mk.CoefficientRegularizer(torch.ones(2, 2))(torch.ones(())), ValueError,
        "weight must have at least 2 dimensions (rows, columns, *kernel), got shape (); the penalty is "
        "defined on matrices."),
    "batch_of_sparse": Case(
        lambda: penalty(draw_weight(2, 4, 4).to_sparse_csr(), draw_points("torus", 2),
                        draw_points("torus", 4)), ValueError,
        "weight must have 2 dimensions as torch.sparse_csr, got shape (2, 4, 4); pass one matrix at a time."),
    "tangent": Case(lambda: torch.func.jvp(penalty, (draw_weight(6, 6),), (draw_weight(6, 6),)),
                    NotImplementedError,
        "moduli_penalty has no forward-mode derivative, got a dual tensor; use backward(), or "
        "moduli_kernels.reference.penalty_formula."),
    "not_square": Case(lambda: penalty(draw_weight(6, 5)), ValueError,
        "weight must have shape (6, 6, *kernel) to fit rows (6, 2) and 6 column points (cols=None: the row "
        "points), got (6, 5); give rows one point a row and cols one point a column."),
    "too_few_columns": Case(lambda: penalty(draw_weight(6, 5), None, draw_points("torus", 4)), ValueError,
        "weight must have shape (6, 4, *kernel) to fit rows (6, 2) and 4 column points, got (6, 5); give "
        "rows one point a row and cols one point a column."),
    "blocks": Case(lambda: penalty(draw_weight(6, 6), blocks=4), ValueError,
        "weight must have shape (4 x 6, 6, *kernel) to fit rows (6, 2) and 6 column points (cols=None: the "
        "row points), got (6, 6); give rows one point a row of one block and cols one point a column."),
    "transposed": Case(lambda: mk.ModuliRegularizer(4, 5)(draw_weight(5, 4)), ValueError,
        "weight must have shape (4, 5, *kernel) to fit rows (4, 2) and 5 column points, got (5, 4); give "
        "rows one point a row and cols one point a column."),
}

POINTS = {
    "rows_embedding": Case(lambda: penalty(rows=mk.ManifoldEmbedding(6)), TypeError,
        "rows must be a tensor of points, got a ManifoldEmbedding; pass embedding.points or a tensor (n, "
        "2)."),
    "cols_number": Case(lambda: penalty(cols=6), TypeError,
        "cols must be a tensor of points, got 6; pass embedding.points or a tensor (n, 2)."),
    "rows_rank": Case(lambda: penalty(rows=torch.ones(6)), ValueError,
        f"rows must have shape (n, 2) for {TORUS}, got (6,); give one row a neuron."),
    "cols_of_another_manifold": Case(lambda: penalty(cols=draw_points("sphere", 6)), ValueError,
        f"cols must have shape (n, 2) for {TORUS}, got (6, 3); give one row a neuron."),
    "rows_integer": Case(lambda: penalty(rows=torch.ones(6, 2, dtype=torch.int32)), TypeError,
        "rows must be floating point, got torch.int32; convert it with .float()."),
    "cols_complex": Case(lambda: penalty(cols=torch.ones(6, 2, dtype=torch.complex64)), TypeError,
        "cols must be floating point, got torch.complex64; convert it with .float()."),
    "rows_device": Case(lambda: penalty(rows=torch.ones(6, 2, device="meta")), ValueError,
        "rows must be on the weight's device cpu, got meta; move it (or the regularizer) with .to('cpu')."),
    "weight_device": Case(lambda: mk.ModuliRegularizer(6)(torch.ones(6, 6, device="meta")), ValueError,
        "rows must be on the weight's device meta, got cpu; move it (or the regularizer) with .to('meta')."),
    "cols_device": Case(lambda: penalty(cols=torch.ones(6, 2, device="meta")), ValueError,
        "cols must be on the weight's device cpu, got meta; move it (or the regularizer) with .to('cpu')."),
    "distance_list": Case(lambda: mk.FlatTorus().distance([0.0], torch.ones(3, 2)), TypeError,
        "x must be a tensor of points, got a list; pass torch.as_tensor(...)."),
    "distance_shape": Case(lambda: mk.FlatTorus().distance(torch.ones(3, 2), torch.ones(3, 3)), ValueError,
        f"y must have shape (points, 2) for {TORUS}, got (3, 3); give one row a point."),
    "distance_integer": Case(lambda: mk.FlatTorus().distance(torch.ones(3, 2), torch.ones(3, 2).int()),
                             TypeError,
        "y must be floating point, got torch.int32; convert it with .float()."),
    "distance_device": Case(lambda: mk.FlatTorus().distance(torch.ones(3, 2),
                                                            torch.ones(3, 2, device="meta")), ValueError,
        "x and y must be on one device, got cpu and meta; move one with .to()."),
    "embedding_list": Case(lambda: mk.ManifoldEmbedding(1, points=[[0.0, 0.0]]), TypeError,
        "points must be a tensor, got a list; pass torch.as_tensor(points)."),
    "embedding_shape": Case(lambda: mk.ManifoldEmbedding(4, points=torch.ones(3, 2)), ValueError,
        f"points must have shape (4, 2) for n=4 on {TORUS}, got (3, 2); give one row a neuron."),
    "embedding_integer": Case(lambda: mk.ManifoldEmbedding(3, points=torch.ones(3, 2).long()), TypeError,
        "points must be floating point, got torch.int64; convert them with .float()."),
    "embedding_nan": Case(lambda: mk.ManifoldEmbedding(1, points=torch.tensor([[0.0, math.nan]])), ValueError,
        "points must be finite, got NaN or infinity among them; clean the rows first."),
    "zero_vector": Case(lambda: mk.ManifoldEmbedding(3, "sphere",
                                                     points=torch.eye(3) * torch.tensor([[1], [0], [1]])),
        ValueError,
        "points must not hold a zero vector on Sphere(dim=2, radius=5.0) (it cannot be normalized), got one "
        "at row 1; give every row a direction."),
    "swapped": Case(lambda: mk.moduli_penalty(draw_points("torus", 6), draw_weight(6, 6), manifold="torus"), ValueError,
        f"rows must have shape (n, 2) for {TORUS}, got (6, 6); weight and points seem to be swapped, since weight has "
        "shape (6, 2): pass the weight first, then the points of its rows."),
    "cols_swapped": Case(lambda: penalty(draw_points("torus", 6), draw_points("torus", 5), draw_weight(6, 5)),
                         ValueError,
        f"cols must have shape (n, 2) for {TORUS}, got (6, 5); weight and points seem to be swapped, since weight has "
        "shape (6, 2): pass the weight first, then the points of its rows."),
    "never_known": Case(lambda: mk.ManifoldEmbedding(3, points=torch.ones(3, 2, device="meta")).reset_parameters(),
                        ValueError,
        "points must be drawn or given with values to be reset, got them on the meta device; load a state dict "
        "instead, or make the embedding without points=."),
    "without_values": Case(lambda: mk.manifold_order(torch.ones(3, 2, device="meta"), "torus"), ValueError,
        "points must have values, got a tensor on the meta device; call reset_parameters() after to_empty()."),
}

MASKS = {
    "float": Case(lambda: penalty(mask=torch.ones(6, 6)), TypeError,
        "mask must be a bool tensor, got torch.float32; convert it with .bool()."),
    "list": Case(lambda: penalty(mask=[True]), TypeError,
                 "mask must be a bool tensor, got a list; convert it with .bool()."),
    "shape": Case(lambda: penalty(mask=mask(6, 1)), ValueError,
        "mask must have the weight's shape (6, 6), got (6, 1); build it with torch.ones_like(weight, "
        "dtype=torch.bool)."),
    "kernel": Case(lambda: penalty(draw_weight(6, 6, 3), mask=mask(6, 6)), ValueError,
        "mask must have the weight's shape (6, 6, 3), got (6, 6); build it with torch.ones_like(weight, "
        "dtype=torch.bool)."),
    "device": Case(lambda: penalty(mask=mask(6, 6, device="meta")), ValueError,
        "mask must be on the weight's device cpu, got meta; move it with .to()."),
    "sparse_weight": Case(lambda: penalty(draw_weight(6, 6).to_sparse_csr(), mask=mask(6, 6)), ValueError,
        "mask must be None for a torch.sparse_csr weight (its pattern is the mask), got a tensor; drop it."),
}

def load_state(saved: dict):
    mk.ModuliRegularizer(3).load_state_dict(mk.ModuliRegularizer(3, **saved).state_dict())


ONES = torch.ones(2, 3)
REGULARIZERS = {
    "rows_float": Case(lambda: mk.ModuliRegularizer(6.0), TypeError,
        "rows must be a number of neurons or a ManifoldEmbedding, got 6.0; pass for example 128."),
    "cols_tensor": Case(lambda: mk.ModuliRegularizer(6, torch.ones(6, 2)), TypeError,
        "cols must be a number of neurons or a ManifoldEmbedding, got a Tensor; pass for example 128."),
    "rows_negative": Case(lambda: mk.ModuliRegularizer(-1), ValueError,
        "rows must be an integer of at least 0, got -1; pass a larger one."),
    "rows_on_another_manifold": Case(lambda: mk.ModuliRegularizer(mk.ManifoldEmbedding(3, "circle")),
                                     ValueError,
        f"rows must be an embedding in the regularizer's manifold {TORUS}, got one in Circle(radius=5.0); "
        "pass manifold=Circle(radius=5.0)."),
    "cols_on_another_manifold": Case(
        lambda: mk.ModuliRegularizer(3, mk.ManifoldEmbedding(3, "torus"), manifold="circle"), ValueError,
        f"cols must be an embedding in the regularizer's manifold Circle(radius=5.0), got one in {TORUS}; "
        f"pass manifold={TORUS}."),
    "state": Case(lambda: load_state({"power": 2.0}), ValueError,
        "power of the saved regularizer must equal this one's 1.0, got 2.0; build the regularizer with the "
        "saved setting."),
    "coefficients_list": Case(lambda: mk.CoefficientRegularizer([[1.0]]), TypeError,
        "coefficients must be a tensor, got a list; pass torch.as_tensor(...)."),
    "coefficients_integer": Case(lambda: mk.CoefficientRegularizer(torch.ones(2, 2).int()), TypeError,
        "coefficients must be floating point, got torch.int32; convert them with .float()."),
    "coefficients_rank": Case(lambda: mk.CoefficientRegularizer(torch.ones(2)), ValueError,
        "coefficients must have shape (rows, columns), or () for one everywhere, got (2,); reshape them."),
    "coefficients_shape": Case(lambda: mk.CoefficientRegularizer(torch.ones(2, 3))(torch.ones(3, 2)),
                               ValueError,
        "weight must have shape (2, 3) + kernel to fit the coefficients, got (3, 2); build the coefficients "
        "for this weight."),
    "coefficients_device": Case(lambda: mk.CoefficientRegularizer(ONES)(ONES.to("meta")), ValueError,
        "weight must be on the coefficients' device cpu, got meta; move the regularizer with .to('meta')."),
    "coefficients_power": Case(lambda: mk.CoefficientRegularizer(torch.ones(2, 3), power=0.0), ValueError,
        "power must be at least 1 (|w|^l is not differentiable at 0 below that), got 0.0; use power=1.0 for "
        "sparsity or power=2.0 for decay."),
}

LAYER, LSTM, RNN = nn.Linear(4, 6), nn.LSTM(3, 5, proj_size=2), nn.RNN(2, 3)


def dropped() -> nn.Module:
    """A net whose hidden weight is a plain tensor, made of another Parameter."""
    rnn = nn.RNN(2, 3)
    rnn.weight_hh_l0_raw = rnn._parameters.pop("weight_hh_l0")
    rnn.weight_hh_l0 = rnn.weight_hh_l0_raw.detach()
    return rnn


def replaced_module():
    model = nn.Sequential(nn.RNN(2, 3))
    reg = mk.regularize(model)
    model[0] = nn.RNN(2, 3)
    return reg()


def untied_weights():
    model = nn.RNN(3, 3, num_layers=2)
    model.weight_hh_l1 = model.weight_hh_l0
    reg = mk.regularize(model)
    model.weight_hh_l1 = nn.Parameter(torch.zeros(3, 3))
    return reg()


def several_strengths() -> float:
    rnn = nn.RNN(2, 3, num_layers=2)
    reg = mk.regularize(rnn)
    reg.regularizers["weight_hh_l1"].strength = 2.0
    return reg.strength


REGULARIZE = {
    "no_weight": Case(lambda: mk.regularize(nn.Sequential(nn.Linear(3, 3))), ValueError,
        "model must hold a recurrent weight (weight_hh_l* of RNN, GRU, LSTM or weight_hh of a cell), found "
        "none in Sequential; name the weights: targets=[(module, \"weight\")]."),
    "no_targets": Case(lambda: mk.regularize(LAYER, []), ValueError,
        "model must hold a recurrent weight (weight_hh_l* of RNN, GRU, LSTM or weight_hh of a cell), found "
        "none in Linear; name the weights: targets=[(module, \"weight\")]."),
    "projection": Case(lambda: mk.regularize(nn.ModuleList([nn.RNN(2, 3), LSTM])), ValueError,
        "model must not hold an LSTM with proj_size (its weight_hh joins 5 neurons to 2 projections), got "
        "proj_size=2; use proj_size=0 or targets= with row and column embeddings of your own."),
    "model": Case(lambda: mk.regularize(LAYER.parameters()), TypeError,
        "model must be an nn.Module, got a generator; pass the model, and single weights as targets=."),
    "target_module": Case(lambda: mk.regularize(LAYER, [LAYER]), TypeError,
        "targets must hold (module, name) pairs or mk.Target, got a Linear; pass for example "
        "targets=[(module, \"weight\")]."),
    "target_name": Case(lambda: mk.regularize(LAYER, ["weight"]), TypeError,
        "targets must hold (module, name) pairs or mk.Target, got 'weight'; pass for example "
        "targets=[(module, \"weight\")]."),
    "target_short": Case(lambda: mk.regularize(LAYER, [(LAYER,)]), TypeError,
        "targets must hold (module, name) pairs or mk.Target, got a tuple; pass for example "
        "targets=[(module, \"weight\")]."),
    "targets_no_list": Case(lambda: mk.regularize(LAYER, LAYER), TypeError,
        "targets must hold (module, name) pairs or mk.Target, got a Linear; pass for example "
        "targets=[(module, \"weight\")]."),
    "unknown_name": Case(lambda: mk.regularize(LAYER, [(LAYER, "weights")]), ValueError,
        "targets must name a weight of Linear, got 'weights'; its parameters are 'weight', 'bias'."),
    "no_parameters": Case(lambda: mk.regularize(LAYER, [(nn.ReLU(), "weight")]), ValueError,
        "targets must name a weight of ReLU, got 'weight'; its parameters are none."),
    "number_as_name": Case(lambda: mk.regularize(LAYER, [(LAYER, 0)]), ValueError,
        "targets must name a weight of Linear, got 0; its parameters are 'weight', 'bias'."),
    "tensor_as_module": Case(lambda: mk.regularize(LAYER, [(LAYER.weight, "weight")]), TypeError,
        "targets must hold (module, name) pairs or mk.Target, got a Parameter as module; pass the "
        "nn.Module."),
    "bias": Case(lambda: mk.regularize(LAYER, [(LAYER, "bias")]), ValueError,
        "weight must have at least 2 dimensions (rows, columns, *kernel), got shape (6,); the penalty is "
        "defined on matrices."),
    "blocks": Case(lambda: mk.regularize(LAYER, [mk.Target(LAYER, "weight", blocks=4)]), ValueError,
        "blocks must divide the 6 rows of weight, got 4; LSTM has 4, GRU 3."),
    "blocks_float": Case(lambda: mk.regularize(LAYER, [mk.Target(LAYER, "weight", blocks=2.0)]), TypeError,
        "blocks must be an integer of at least 1, got 2.0; pass an int."),
    "columns_int": Case(lambda: mk.regularize(LAYER, [mk.Target(LAYER, "weight", columns=2)]), TypeError,
        "columns of target 'weight' must be None or a slice with step 1, got 2; pass for example slice(2, "
        "None)."),
    "columns_step": Case(lambda: mk.regularize(LAYER,
                                               [mk.Target(LAYER, "weight", columns=slice(0, None, 2))]),
                                               TypeError,
        "columns of target 'weight' must be None or a slice with step 1, got slice(0, None, 2); pass for "
        "example slice(2, None)."),
    "unknown_origin": Case(lambda: mk.regularize(dropped()), ValueError,
        "weight_hh_l0 of RNN must be a Parameter or what torch.nn.utils makes of one (parametrize, spectral_norm, "
        "weight_norm, prune), got a plain tensor that something else writes (as a WeightDrop does), and that may be "
        "out of date; name the Parameter behind it such as targets=[(module, 'weight_hh_l0_raw')]."),
    "argument": Case(lambda: mk.regularize(RNN)(RNN.weight_hh_l0), TypeError,
        "reg() must be called without arguments (it reads the model's weights itself), got a Parameter; for one weight "
        "call moduli_penalty(weight, points, manifold=...) or a ModuliRegularizer."),
    "no_points": Case(lambda: mk.regularize(RNN).matched().reset_parameters(), TypeError,
        "regularizers must have points to be drawn again, got a CoefficientRegularizer for weight_hh_l0; reset the "
        "regularization that this control was made from, and make the control anew."),
    "model_gone": Case(lambda: mk.regularize(nn.Sequential(nn.GRU(2, 3)))(), ValueError,
        "0.weight_hh_l0 must be a weight of a model that exists, got a GRU that is gone: it was replaced or deleted, "
        "or this regularization was copied or pickled without it; copy and pickle (model, reg) together, or call "
        "regularize for the new model."),
    "replaced": Case(lambda: replaced_module(), ValueError,
        "0.weight_hh_l0 must still be a weight of the Sequential that was regularized, got another module without its "
        "Parameters at '0'; call regularize again, and give the optimizer the new parameters."),
    "untied": Case(lambda: untied_weights(), ValueError,
        "weight_hh_l1 must still be the Parameter of weight_hh_l0, with which it was regularized as one weight, got "
        "another one (load_state_dict(assign=True) unties weights, for instance); tie them again, or call regularize "
        "again."),
    "replaced_in_graph": Case(lambda: checks.replaced_in_graph("rnn.weight_hh_l0"), ValueError,
        "rnn.weight_hh_l0 must be where it was when a compiled step is traced, got another module there; call reg() "
        "once outside of the compiled step, which follows or explains the change."),
    "strengths": Case(lambda: several_strengths(), ValueError,
        "strength must be the same for all weights to be read as one number, got weight_hh_l0: 0.1, weight_hh_l1: 2.0; "
        "read each regularizer's own from reg.items(), or set reg.strength."),
    "loss_number": Case(lambda: mk.regularize(RNN).suggest(3.0), TypeError,
        "loss must be a tensor, got 3.0; pass criterion(model(x), y)."),
    "loss_without_graph": Case(lambda: mk.regularize(RNN).suggest(torch.ones(())), ValueError,
        "loss must be 0-d with a graph to the weights, got shape () without a graph; pass criterion(model(x), y), "
        "computed with gradients."),
    "loss_of_another_net": Case(lambda: mk.regularize(RNN).suggest(LAYER.weight.sum()), ValueError,
        "loss must have a finite gradient other than 0 in the regularized weights, got norm 0.0; pass the loss of a "
        "forward pass through the regularized model."),
    "share": Case(lambda: mk.regularize(RNN).suggest(RNN.weight_hh_l0.sum(), -1.0), ValueError,
        "share must be a positive finite number, got -1.0; pass a float such as 5.0."),
    "setting_value": Case(lambda: mk.regularize(nn.RNN(2, 3), power=0.9), ValueError,
        "power must be at least 1 (|w|^l is not differentiable at 0 below that), got 0.9; use power=1.0 for "
        "sparsity or power=2.0 for decay."),
}

ALL = {f"{group}_{name}": case for group, cases in {
    "numbers": NUMBERS, "choices": CHOICES, "weights": WEIGHTS, "points": POINTS, "masks": MASKS,
    "regularizers": REGULARIZERS, "regularize": REGULARIZE}.items() for name, case in cases.items()}


@pytest.mark.parametrize("case", ALL)
def test_message(case):
    call, error, message = ALL[case]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error and str(caught.value) == message


def test_every_check_is_tested():
    """The cases above raise at every raise statement of CHECKS."""
    reached = set()
    for call, error, _ in ALL.values():
        with pytest.raises(error) as caught:
            call()
        reached |= {(Path(entry.path), entry.lineno + 1) for entry in caught.traceback}
    statements = [(path, node) for path in CHECKS for node in ast.walk(ast.parse(path.read_text()))
                  if isinstance(node, ast.Raise)]
    assert len(CHECKS) > 1 and statements
    missed = [f"{path.relative_to(PACKAGE)}:{node.lineno}" for path, node in statements
              if not any((path, line) in reached for line in range(node.lineno, node.end_lineno + 1))]
    assert not missed, f"no case raises at {', '.join(missed)}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case",
                         ["weights_integer", "weights_not_square", "points_rows_device", "masks_shape"])
def test_messages_do_not_depend_on_the_backend(backend, case):
    with mk.backend(backend):
        test_message(case)


def test_errors_under_compile_are_the_same():
    points = draw_points("torus", 6)
    compiled = torch.compile(lambda w: mk.moduli_penalty(w, points, manifold="torus"), backend="eager")
    with pytest.raises(ValueError, match=re.escape(WEIGHTS["not_square"].message)):
        compiled(draw_weight(6, 5))


def test_an_unknown_setting():
    with pytest.raises(TypeError, match="unexpected keyword argument 'strenght'"):
        mk.regularize(nn.RNN(2, 3), strenght=0.1)


def test_numbers_of_numpy_are_numbers():
    """Sizes often come from shapes and products: np.int64 and np.float32 are taken for what they are."""
    np = pytest.importorskip("numpy")
    reg = mk.ModuliRegularizer(np.int64(3), blocks=np.int64(2), power=np.float32(1.5),
                               strength=np.float64(0.5))
    assert reg(draw_weight(6, 3)).dim() == 0
