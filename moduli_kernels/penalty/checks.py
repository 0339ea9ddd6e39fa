"""Every error that the penalty, its regularizers and `regularize` raise for a wrong argument."""
from __future__ import annotations

import numbers
import warnings
from typing import Any, NoReturn

import torch

from ..checks import FLOATING, finite, positive, positive_int, shown
from ..masks import origin

REDUCTIONS = ("mean", "sum")


def power(value: float) -> float:
    """The exponent l of |w|^l as a float, which must be at least 1."""
    value = finite("power", value)
    if value < 1:
        raise ValueError(
            f"power must be at least 1 (|w|^l is not differentiable at 0 below that), got {value!r}; "
            "use power=1.0 for sparsity or power=2.0 for decay."
        )
    return value


def strength(value: float) -> float:
    """The factor lambda as a float, which must be finite and at least 0."""
    value = finite("strength", value)
    if not torch.compiler.is_compiling() and value < 0:  # a question to a symbol would make it a constant
        raise ValueError(
            f"strength must be at least 0 (a negative one would reward long connections), got {value!r}; pass a float "
            "such as 0.1, and 0 for no penalty."
        )
    return value


# --- weights ---------------------------------------------------------------------------------------------------

def _points_argument(name: str, points: torch.Tensor, manifold: Any, weight: torch.Tensor) -> None:
    """The points must be floating point, (n, ambient_dim), on the weight's device."""
    if not isinstance(points, torch.Tensor):
        raise TypeError(
            f"{name} must be a tensor of points, got {shown(points)}; pass embedding.points or a tensor (n, "
            f"{manifold.ambient_dim})."
        )
    if points.dim() != 2 or points.shape[1] != manifold.ambient_dim:
        swapped = weight.dim() == 2 and weight.shape[1] == manifold.ambient_dim
        raise ValueError(
            f"{name} must have shape (n, {manifold.ambient_dim}) for {manifold}, got {tuple(points.shape)}; "
            + (f"weight and points seem to be swapped, since weight has shape {tuple(weight.shape)}: pass the weight "
               "first, then the points of its rows." if swapped else "give one row a neuron.")
        )
    if points.dtype not in FLOATING:
        raise TypeError(f"{name} must be floating point, got {points.dtype}; convert it with .float().")
    if points.device != weight.device:
        raise ValueError(
            f"{name} must be on the weight's device {weight.device}, got {points.device}; move it (or the "
            f"regularizer) with .to({str(weight.device)!r})."
        )


def weight_tensor(weight: torch.Tensor) -> None:
    """The weight must be a floating-point matrix, with or without kernel dimensions, dense or torch.sparse_csr."""
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight must be a tensor, got {shown(weight)}; pass the module's parameter.")
    if weight.dtype not in FLOATING:
        raise TypeError(
            f"weight must be float32, float64, bfloat16 or float16, got {weight.dtype}; convert it with .float()."
        )
    if weight.layout not in (torch.strided, torch.sparse_csr):
        raise TypeError(
            f"weight must be dense or torch.sparse_csr, got {weight.layout}; convert it with .to_sparse_csr()."
        )
    if weight.layout == torch.sparse_csr and weight.dim() != 2:
        raise ValueError(
            f"weight must have 2 dimensions as torch.sparse_csr, got shape {tuple(weight.shape)}; pass one matrix at a "
            "time."
        )
    if weight.dim() < 2:
        raise ValueError(
            f"weight must have at least 2 dimensions (rows, columns, *kernel), got shape {tuple(weight.shape)}; "
            "the penalty is defined on matrices."
        )


def penalty_arguments(
    weight: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor | None, manifold: Any, blocks: int,
    mask: torch.Tensor | None,
) -> None:
    """Shapes, dtypes and devices of `moduli_penalty`'s tensors must fit together."""
    weight_tensor(weight)
    positive_int("blocks", blocks)
    _points_argument("rows", rows, manifold, weight)
    if cols is not None:
        _points_argument("cols", cols, manifold, weight)
    columns = rows.shape[0] if cols is None else cols.shape[0]
    if weight.shape[0] != blocks * rows.shape[0] or weight.shape[1] != columns:
        per_block = f"{blocks} x {rows.shape[0]}" if blocks > 1 else f"{rows.shape[0]}"
        same = " (cols=None: the row points)" if cols is None else ""
        raise ValueError(
            f"weight must have shape ({per_block}, {columns}, *kernel) to fit rows {tuple(rows.shape)} and "
            f"{columns} column points{same}, got {tuple(weight.shape)}; give rows one point a row"
            f"{' of one block' if blocks > 1 else ''} and cols one point a column."
        )
    if mask is None:
        return
    if weight.layout != torch.strided:
        raise ValueError(
            "mask must be None for a torch.sparse_csr weight (its pattern is the mask), got a tensor; drop it."
        )
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, torch.Tensor) else shown(mask)
        raise TypeError(f"mask must be a bool tensor, got {got}; convert it with .bool().")
    if mask.shape != weight.shape:
        raise ValueError(
            f"mask must have the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}; build it with "
            "torch.ones_like(weight, dtype=torch.bool)."
        )
    if mask.device != weight.device:
        raise ValueError(
            f"mask must be on the weight's device {weight.device}, got {mask.device}; move it with .to()."
        )


def coefficient_arguments(weight: torch.Tensor, coefficients: torch.Tensor) -> None:
    """A CoefficientRegularizer must have one coefficient for each (row, column) pair of the weight, or one for all."""
    weight_tensor(weight)
    if coefficients.dim() and tuple(coefficients.shape) != tuple(weight.shape[:2]):
        raise ValueError(
            f"weight must have shape {tuple(coefficients.shape)} + kernel to fit the coefficients, got "
            f"{tuple(weight.shape)}; build the coefficients for this weight."
        )
    if coefficients.device != weight.device:
        raise ValueError(
            f"weight must be on the coefficients' device {coefficients.device}, got {weight.device}; move the "
            f"regularizer with .to({str(weight.device)!r})."
        )


def coefficient_tensor(coefficients: torch.Tensor) -> None:
    """The coefficients must be a floating-point matrix, or one number in a 0-d tensor."""
    if not isinstance(coefficients, torch.Tensor):
        raise TypeError(f"coefficients must be a tensor, got {shown(coefficients)}; pass torch.as_tensor(...).")
    if coefficients.dtype not in FLOATING:
        raise TypeError(f"coefficients must be floating point, got {coefficients.dtype}; convert them with .float().")
    if coefficients.dim() not in (0, 2):
        raise ValueError(
            f"coefficients must have shape (rows, columns), or () for one everywhere, got "
            f"{tuple(coefficients.shape)}; reshape them."
        )


# --- regularizers ----------------------------------------------------------------------------------------------

def embedding_size(name: str, n: Any) -> None:
    """The number of neurons must be an integer of at least 0."""
    if isinstance(n, bool) or not isinstance(n, numbers.Integral):
        raise TypeError(
            f"{name} must be a number of neurons or a ManifoldEmbedding, got {shown(n)}; pass for example 128."
        )
    positive_int(name, n, minimum=0)  # pyright: ignore[reportArgumentType]


def embedding_manifold(name: str, got: Any, manifold: Any) -> None:
    """An embedding must be in the regularizer's own manifold."""
    if got != manifold:
        raise ValueError(
            f"{name} must be an embedding in the regularizer's manifold {manifold}, got one in {got}; pass "
            f"manifold={got}."
        )


def warn_untrainable(inhibitor: Any) -> None:
    """Warns where points are trained under an inhibitor with which that is of no use."""
    if not inhibitor.trainable:
        warnings.warn(
            f"inhibitor should not be monotone where points are trained, got {inhibitor}: every neuron is drawn to "
            "one point (or none moves) and the penalty becomes plain L_l; use DifferenceOfGaussians, Sinusoid or "
            "RickerWavelet, or frozen points.",
            UserWarning, stacklevel=3,
        )


def saved_setting(name: str, saved: Any, mine: Any) -> NoReturn:
    """Raises for a state dict with another setting than the regularizer which loads it."""
    raise ValueError(
        f"{name} of the saved regularizer must equal this one's {mine!r}, got {saved!r}; build the regularizer "
        "with the saved setting."
    )


def saved_columns(key: str, rows: Any, cols: torch.Tensor, errors: list[str]) -> None:
    """Points of columns in a state dict must be those of the rows, where rows and columns are the same neurons."""
    if isinstance(rows, torch.Tensor) and not (rows.is_meta or cols.is_meta) and not torch.equal(rows, cols):
        errors.append(
            f"{key} must equal the points of the rows, since this regularizer has one embedding for rows and columns, "
            "got others; build it with cols= too."
        )


# --- regularize ------------------------------------------------------------------------------------------------

def no_target(model: Any) -> NoReturn:
    """Raises for a model in which there is no weight to regularize."""
    raise ValueError(
        f"model must hold a recurrent weight (weight_hh_l* of RNN, GRU, LSTM or weight_hh of a cell), found none in "
        f"{type(model).__name__}; name the weights: targets=[(module, \"weight\")]."
    )


def no_projection(module: Any) -> None:
    """An LSTM must not project its state: its hidden weight then joins two kinds of neurons."""
    if getattr(module, "proj_size", 0):
        raise ValueError(
            f"model must not hold an LSTM with proj_size (its weight_hh joins {module.hidden_size} neurons to "
            f"{module.proj_size} projections), got proj_size={module.proj_size}; use proj_size=0 or targets= with "
            "row and column embeddings of your own."
        )


def model_to_search(model: Any) -> None:
    """The model must be an nn.Module."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"model must be an nn.Module, got {shown(model)}; pass the model, and single weights as targets=.")


def no_pair(target: Any) -> NoReturn:
    """Raises for a target that is neither a Target nor a (module, name) pair."""
    raise TypeError(
        f"targets must hold (module, name) pairs or mk.Target, got {shown(target)}; pass for example "
        "targets=[(module, \"weight\")]."
    )


def target_module(module: Any, name: Any) -> None:
    """A target must name a tensor of an nn.Module."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"targets must hold (module, name) pairs or mk.Target, got {shown(module)} as module; pass the nn.Module.")
    if not isinstance(name, str) or origin(module, name) is None:
        known = ", ".join(repr(n) for n, _ in module.named_parameters(recurse=False)) or "none"
        raise ValueError(
            f"targets must name a weight of {type(module).__name__}, got {name!r}; its parameters are {known}."
        )


def unknown_origin(module: torch.nn.Module, name: str) -> NoReturn:
    """Raises for a weight that is a plain tensor, which code that is unknown here writes before each forward pass."""
    own = [n for n, _ in module.named_parameters(recurse=False) if n.startswith(name)]
    behind = own[0] if own else f"{name}_raw"
    where = "" if own else ", where `module` is the one that owns it,"
    raise ValueError(
        f"{name} of {type(module).__name__} must be a Parameter or what torch.nn.utils makes of one (parametrize, "
        "spectral_norm, weight_norm, prune), got a plain tensor that something else writes (as a WeightDrop does), and "
        f"that may be out of date; name the Parameter behind it{where} such as targets=[(module, {behind!r})]."
    )


ALLOW_RNN = (
    "reg() reads the weights of an nn.RNN, GRU or LSTM, which torch.compile takes into a graph only if asked: set "
    "torch._dynamo.config.allow_rnn = True before fullgraph=True, or call reg() outside of the compiled function."
)


def several_strengths(found: dict[str, float]) -> NoReturn:
    """Raises for weights of which no one strength can be told."""
    each = ", ".join(f"{name}: {value}" for name, value in found.items())
    raise ValueError(
        f"strength must be the same for all weights to be read as one number, got {each}; read each regularizer's "
        "own from reg.items(), or set reg.strength."
    )


def no_argument(got: Any) -> NoReturn:
    """Raises for a regularization that is called with something."""
    raise TypeError(
        f"reg() must be called without arguments (it reads the model's weights itself), got {shown(got)}; for one "
        "weight call moduli_penalty(weight, points, manifold=...) or a ModuliRegularizer."
    )


def no_points(name: str, regularizer: Any) -> NoReturn:
    """Raises for a control whose points are to be drawn again."""
    raise TypeError(
        f"regularizers must have points to be drawn again, got a {type(regularizer).__name__} for {name}; reset the "
        "regularization that this control was made from, and make the control anew."
    )


def replaced(title: str, path: str, model: str) -> NoReturn:
    """Raises for a weight whose module was taken out of the model."""
    raise ValueError(
        f"{title} must still be a weight of the {model} that was regularized, got another module without its "
        f"Parameters at {path!r}; call regularize again, and give the optimizer the new parameters."
    )


def untied(title: str, other: str) -> NoReturn:
    """Raises for two weights that were one Parameter, and were regularized as one."""
    raise ValueError(
        f"{other} must still be the Parameter of {title}, with which it was regularized as one weight, got another one "
        "(load_state_dict(assign=True) unties weights, for instance); tie them again, or call regularize again."
    )


def replaced_in_graph(title: str) -> NoReturn:
    """Raises for a weight whose module was taken out of the model, in code that torch.compile traces."""
    raise ValueError(
        f"{title} must be where it was when a compiled step is traced, got another module there; call reg() once "
        "outside of the compiled step, which follows or explains the change."
    )


def model_gone(title: str, kind: str) -> NoReturn:
    """Raises for a regularization whose model is gone."""
    raise ValueError(
        f"{title} must be a weight of a model that exists, got a {kind} that is gone: it was replaced or deleted, or "
        "this regularization was copied or pickled without it; copy and pickle (model, reg) together, or call "
        "regularize for the new model."
    )


def share_and_loss(share: float, loss: Any) -> float:
    """The share as a float, which must be positive, beside a loss that can be differentiated."""
    share = positive("share", share)
    if not isinstance(loss, torch.Tensor):
        raise TypeError(f"loss must be a tensor, got {shown(loss)}; pass criterion(model(x), y).")
    if loss.dim() or not loss.requires_grad:
        raise ValueError(
            f"loss must be 0-d with a graph to the weights, got shape {tuple(loss.shape)}"
            f"{'' if loss.requires_grad else ' without a graph'}; pass criterion(model(x), y), computed with gradients."
        )
    return share


def norms(loss: float, penalty: float) -> float:
    """The ratio of the norms of two gradients in the regularized weights, neither of which may be 0."""
    for name, norm, advice in (
        ("loss", loss, "pass the loss of a forward pass through the regularized model"),
        ("the penalty", penalty, "ask before all weights are 0, for weights that require grad")):
        if not 0 < norm < float("inf"):
            raise ValueError(
                f"{name} must have a finite gradient other than 0 in the regularized weights, got norm {norm}; "
                f"{advice}.")
    return loss / penalty


def target_blocks(name: str, rows: int, blocks: int) -> None:
    """The number of gate blocks must divide the rows of the weight."""
    positive_int("blocks", blocks)
    if rows % blocks:
        raise ValueError(f"blocks must divide the {rows} rows of {name}, got {blocks}; LSTM has 4, GRU 3.")


def target_columns(name: str, columns: Any) -> None:
    """The columns must be all (None) or a slice without gaps."""
    if columns is not None and (not isinstance(columns, slice) or columns.step not in (None, 1)):
        raise TypeError(
            f"columns of target {name!r} must be None or a slice with step 1, got {columns!r}; pass for example "
            "slice(2, None)."
        )
