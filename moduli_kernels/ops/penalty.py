"""Every op: schema, fake kernel, autograd formula and the reference as fallback; loads the compiled kernels.

Present without a compiler too. csrc/cpu/penalty.cpp registers the CPU implementations of the same schemas, the Triton
kernels are registered here and imported by the first call on a CUDA tensor.

    penalty             value only
    penalty_with_grads  value and the gradients in one pass; those not needed come back with no elements
    penalty_grads       gradients times `grad` (0-d): the stateless partner of `penalty` under torch.compile
    accumulate_penalty_grad_  value, points' gradients; dW is added into `grad`, which is like weight and contiguous
    proximal_step_      weight <- sign(w) max(|w| - step scale f, 0) in place; power is 1
    scale_grads_        multiplies in place by the 0-d `grad`, returning at once where it is 1
    penalties_with_grads, penalties_grads, scale_penalties_grads_
                        the same for L dense weights at once; first the sum of the values (0-d), then the values (L,);
                        grad (L,); layers: which number of grad multiplies each of grads

weight (blocks*R, C, *kernel): any row stride, all else contiguous. rows (R, k), cols (C, k) or None (= rows, and the
gradient of the rows then holds both parts): contiguous, float64 for a float64 weight, else float32, as is the
value. mask: like weight, contiguous. crow_indices (blocks*R + 1), col_indices, int64: of a torch.sparse_csr weight,
whose values (entries) then stand for weight, and gradients are those of the values; no mask. table: (samples, 4) for
the tabulated inhibitor, like the points. factors, factor_parameters, inhibitor, inhibitor_parameters: see
encoding.py. scale: strength over the number of entries.
"""
from __future__ import annotations

import torch

from .. import reference
from ..geometry import encoding
from .registry import library, register_triton

PENALTY = (
    "Tensor weight, Tensor rows, Tensor? cols, Tensor? mask, Tensor? crow_indices, Tensor? col_indices, Tensor? table, "
    "int[] factors, float[] factor_parameters, int inhibitor, float[] inhibitor_parameters, float power, int blocks, "
    "float scale"
)
NEEDS = "bool need_weight, bool need_points"
PENALTIES = (
    "Tensor[] weights, Tensor[] rows, Tensor?[] cols, Tensor? table, int[] factors, float[] factor_parameters, "
    "int inhibitor, float[] inhibitor_parameters, float power, int[] blocks, float[] scales"
)
NEEDS_OF_EACH = "bool[] need_weight, bool[] need_points"
SCHEMAS = {
    "penalty": f"({PENALTY}) -> Tensor",
    "penalty_with_grads": f"({PENALTY}, {NEEDS}) -> (Tensor, Tensor, Tensor, Tensor)",
    "penalty_grads": f"(Tensor grad, {PENALTY}, {NEEDS}) -> (Tensor, Tensor, Tensor)",
    "accumulate_penalty_grad_": f"(Tensor(a!) grad, {PENALTY}, bool need_points) -> (Tensor, Tensor, Tensor)",
    "proximal_step_": f"({PENALTY}, float step) -> ()".replace("Tensor weight", "Tensor(a!) weight"),
    "scale_grads_": "(Tensor(a!)[] grads, Tensor grad) -> ()",
    "penalties_with_grads": f"({PENALTIES}, {NEEDS_OF_EACH}) -> (Tensor, Tensor, Tensor[], Tensor[], Tensor[])",
    "penalties_grads": f"(Tensor grad, {PENALTIES}, {NEEDS_OF_EACH}) -> (Tensor[], Tensor[], Tensor[])",
    "scale_penalties_grads_": "(Tensor(a!)[] grads, Tensor grad, int[] layers) -> ()",
}

for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=() if _name.endswith("_") else (torch.Tag.pt2_compliant_tag,))


# --- the reference as the implementation for every device that has no kernel ------------------------------------

def _what(factors, factor_parameters, inhibitor, inhibitor_parameters, table, power, blocks, scale):
    return reference.Penalty(
        encoding.decode_manifold(factors, factor_parameters),
        encoding.decode_inhibitor(inhibitor, inhibitor_parameters, table), power, blocks, scale,
    )


def _whole(weight, rows, cols, crow, col, blocks):
    """The weight that compressed values stand for, or itself."""
    if crow is None:
        return weight
    size = (blocks * len(rows), len(rows if cols is None else cols))
    return torch.sparse_csr_tensor(crow, col, weight, size, check_invariants=False)


def _penalty_with_grads(weight, rows, cols, mask, crow, col, table, factors, factor_parameters, inhibitor,
                        inhibitor_parameters, power, blocks, scale, need_weight, need_points):
    what = _what(factors, factor_parameters, inhibitor, inhibitor_parameters, table, power, blocks, scale)
    whole = _whole(weight, rows, cols, crow, col, blocks)
    value, grads = reference.penalty_with_grads(whole, rows, cols, mask, what, need_weight, need_points)
    none_weight, none_points = weight.new_empty(0), rows.new_empty(0)
    dweight = grads.weight if crow is None or grads.weight is None else grads.weight.values()
    return (value, none_weight if dweight is None else dweight,
            none_points if grads.rows is None else grads.rows,
            none_points.clone() if grads.cols is None else grads.cols)


def _penalty(*arguments):
    return _penalty_with_grads(*arguments, False, False)[0]


def _penalty_grads(grad, *arguments):
    *rest, scale, need_weight, need_points = arguments
    return _penalty_with_grads(*rest, scale * grad, need_weight, need_points)[1:]


def _accumulate_penalty_grad_(grad, *arguments):
    *rest, need_points = arguments
    value, dweight, drows, dcols = torch.ops.moduli_kernels.penalty_with_grads(*rest, True, need_points)
    grad.add_(dweight)
    return value, drows, dcols


def _proximal_step_(weight, rows, cols, mask, crow, col, table, factors, factor_parameters, inhibitor,
                    inhibitor_parameters, power, blocks, scale, step):
    what = _what(factors, factor_parameters, inhibitor, inhibitor_parameters, table, power, blocks, scale)
    reference.proximal_step_(_whole(weight, rows, cols, crow, col, blocks), rows, cols, mask, what, step)


def _scale_grads_(grads, grad):
    for tensor in grads:
        tensor.mul_(grad)


def _each(weights, rows, cols, table, factors, factor_parameters, inhibitor, inhibitor_parameters, power, blocks,
          scales, need_weight, need_points):
    """The arguments of the ops of one weight, of each in turn."""
    for layer in zip(weights, rows, cols, blocks, scales, need_weight, need_points):
        weight, its_rows, its_cols, its_blocks, scale, *needs = layer
        yield (weight, its_rows, its_cols, None, None, None, table, factors, factor_parameters, inhibitor,
               inhibitor_parameters, power, its_blocks, scale, *needs)


def _penalties_with_grads(*arguments):
    each = [torch.ops.moduli_kernels.penalty_with_grads(*layer) for layer in _each(*arguments)]
    values = torch.stack([value for value, *_ in each])
    return values.sum(), values, *([grads[i] for grads in each] for i in (1, 2, 3))


def _penalties_grads(grad, *arguments):
    each = [torch.ops.moduli_kernels.penalty_grads(g, *layer) for g, layer in zip(grad, _each(*arguments))]
    return tuple([grads[i] for grads in each] for i in (0, 1, 2))


def _scale_penalties_grads_(grads, grad, layers):
    for tensor, layer in zip(grads, layers):
        tensor.mul_(grad[layer])


for _name, _function in (("penalty", _penalty), ("penalty_with_grads", _penalty_with_grads),
                         ("penalty_grads", _penalty_grads), ("accumulate_penalty_grad_", _accumulate_penalty_grad_),
                         ("proximal_step_", _proximal_step_), ("scale_grads_", _scale_grads_),
                         ("penalties_with_grads", _penalties_with_grads), ("penalties_grads", _penalties_grads),
                         ("scale_penalties_grads_", _scale_penalties_grads_)):
    library.impl(_name, _function, "CompositeExplicitAutograd")


# --- fake kernels and autograd ---------------------------------------------------------------------------------

def _fake_penalty(weight, rows, *_):
    return rows.new_empty(())


def _fake_grads(weight, rows, cols, need_weight, need_points):
    nothing = rows.new_empty(0)
    return (
        torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else weight.new_empty(0),
        torch.empty_like(rows) if need_points else nothing,
        torch.empty_like(cols) if need_points and cols is not None else nothing.clone(),
    )


torch.library.register_fake("moduli_kernels::penalty", _fake_penalty, lib=library)
torch.library.register_fake(
    "moduli_kernels::penalty_with_grads",
    lambda *a: (a[1].new_empty(()), *_fake_grads(a[0], a[1], a[2], a[-2], a[-1])), lib=library,
)
torch.library.register_fake(
    "moduli_kernels::penalty_grads", lambda grad, *a: _fake_grads(a[0], a[1], a[2], a[-2], a[-1]), lib=library,
)
torch.library.register_fake(
    "moduli_kernels::accumulate_penalty_grad_",
    lambda grad, *a: (a[1].new_empty(()), *_fake_grads(a[0], a[1], a[2], False, a[-1])[1:]), lib=library,
)
torch.library.register_fake("moduli_kernels::proximal_step_", lambda *a: None, lib=library)
torch.library.register_fake("moduli_kernels::scale_grads_", lambda grads, grad: None, lib=library)


def _fake_grads_of_each(weights, rows, cols, *rest):
    each = [_fake_grads(*layer) for layer in zip(weights, rows, cols, *rest[-2:])]
    return tuple([grads[i] for grads in each] for i in (0, 1, 2))


torch.library.register_fake(
    "moduli_kernels::penalties_with_grads",
    lambda *a: (a[1][0].new_empty(()), a[1][0].new_empty(len(a[0])), *_fake_grads_of_each(*a)), lib=library,
)
torch.library.register_fake(
    "moduli_kernels::penalties_grads", lambda grad, *a: _fake_grads_of_each(*a), lib=library,
)
torch.library.register_fake("moduli_kernels::scale_penalties_grads_", lambda grads, grad, layers: None, lib=library)


def _setup_context(ctx, inputs, output):
    tensors, ctx.rest = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    needs = ctx.needs_input_grad
    dweight, drows, dcols = torch.ops.moduli_kernels.penalty_grads(
        grad, *ctx.saved_tensors, *ctx.rest, needs[0], needs[1] or needs[2])
    return (dweight if needs[0] else None, drows if needs[1] else None, dcols if needs[2] else None,
            *(None,) * (4 + len(ctx.rest)))


torch.library.register_autograd("moduli_kernels::penalty", _backward, setup_context=_setup_context, lib=library)


def _module_of(name: str) -> str:
    return ("penalty.grouped" if "penalties" in name
            else "penalty.proximal" if name == "proximal_step_" else "penalty.dense")


register_triton(SCHEMAS, _module_of, globals())
