"""Holds every user-facing error of the recurrent nets (sparse_rnn.py, cell.py, compressed.py).

Bad input to SparseRNN and SparseRNNCell is refused in the words of torch.nn.RNN and torch.nn.RNNCell. All other
messages name the argument, what was expected, what came and what to do. Only the checks of orders and of what is loaded
wait for a GPU.
"""
from __future__ import annotations

import numbers
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import RNN  # torch's own class, also where torch.nn.RNN is replaced later

from ..checks import FLOATING, one_of, shown
from ..masks import buffer_name, described, is_mask, names_pruned_by_torch

NONLINEARITY_OF = {"RNN_TANH": "tanh", "RNN_RELU": "relu"}  # by torch's name of the mode
NONLINEARITIES = tuple(NONLINEARITY_OF.values())
PATHS = ("auto", "dense", "sparse")


# --- settings --------------------------------------------------------------------------------------------------

def leak(value: Any) -> float:
    """Checks the share of the new state, in (0, 1], and returns it as float."""
    how = "pass a float such as 0.1, or 1.0 for none."
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"leak must be a number in (0, 1], got {shown(value)}; {how}")
    if not 0 < value <= 1:
        raise ValueError(f"leak must be a number in (0, 1], got {value!r}; {how}")
    return float(value)


def mode(value: Any) -> str:
    """Checks torch's name of a nonlinearity, in the words of torch.nn.RNNBase."""
    if value not in tuple(NONLINEARITY_OF):
        raise ValueError(f"Unrecognized RNN mode: {value}")
    return value


def mode_of(nonlinearity: Any) -> str:
    """Checks a nonlinearity, in the words of torch.nn.RNN, and returns torch's name of it."""
    for name, its in NONLINEARITY_OF.items():
        if its == nonlinearity:
            return name
    raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")


def path(value: Any, its_leak: float) -> str:
    """Checks the name of a path, and that the leak goes with it."""
    one_of("path", value, PATHS)
    if value == "dense" and its_leak != 1:
        raise ValueError(
            f"path must be 'auto' or 'sparse' where leak is not 1 (torch.nn.RNN knows no leak), got 'dense' with "
            f"leak={its_leak!r}; leave it at 'auto'."
        )
    return value


# --- masks -----------------------------------------------------------------------------------------------------

def maskable(module: nn.Module, name: Any, names: list[str]) -> None:
    """Checks that name is one of the module's weights or biases, and a plain Parameter."""
    kind = type(module).__name__
    if name not in names:
        raise ValueError(f"name must be a weight of this {kind}, got {shown(name)}; it has {', '.join(names)}.")
    if name in names_pruned_by_torch(module):
        raise ValueError(
            f"name must be a plain parameter, got {name} of {kind} pruned by torch.nn.utils.prune, whose mask decides; "
            "take it over with MagnitudePruner.from_torch_prune(module) first."
        )


def new_mask(name: str, mask: Any, weight: Tensor) -> None:
    """Checks a mask that a user sets for the weight `name`."""
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"mask must be a bool tensor (True = kept) or None, got {shown(mask)}; pass weight != 0, or None.")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor (True = kept), got {mask.dtype}; convert it with .bool().")
    if mask.shape != weight.shape:
        raise ValueError(
            f"mask must have the shape {tuple(weight.shape)} of {name}, got {tuple(mask.shape)}; build it with "
            f"torch.ones_like(module.{name}, dtype=torch.bool)."
        )


def saved_mask_problem(key: str, mask: Any, weight: Tensor) -> str | None:
    """Says why a mask in a state_dict does not fit; None where it does."""
    if is_mask(mask, weight):
        return None
    return (f"{key} must be a torch.bool mask {tuple(weight.shape)}, got {described(mask)}; save the state_dict of a "
            "net with the same sizes, pruned by MagnitudePruner or set_mask.")


def found_mask(module: nn.Module, name: str, mask: Tensor, weight: Tensor) -> None:
    """Checks the mask that a forward pass finds for the parameter `name`."""
    if mask.shape != weight.shape:
        raise ValueError(
            f"{buffer_name(name)} of {type(module).__name__} must have the shape {tuple(weight.shape)} of {name}, got "
            f"{tuple(mask.shape)}; set it with set_mask({name!r}, mask)."
        )
    if mask.device != weight.device:
        raise RuntimeError(
            f"{buffer_name(name)} of {type(module).__name__} must be on the device of {name}, {weight.device}, got "
            f"{mask.device}; move this net with .to() as well (another net has its Parameters, and was moved)."
        )


def hidden_weight(module: nn.Module, name: Any, names: list[str]) -> None:
    """Checks that name is one of the module's hidden weights, which are `names`."""
    if name not in names:
        raise ValueError(f"name must be a hidden weight of this {type(module).__name__}, got {shown(name)}; it has "
                         f"{', '.join(names)}.")


def new_order(order: Any, hidden: int) -> None:
    """Checks an order of the neurons that a user sets. Waits for a GPU."""
    wanted = f"order must be an int64 permutation ({hidden},) of the neurons or None"
    how = "manifold_order(points, manifold) gives one."
    if not isinstance(order, Tensor):
        raise TypeError(f"{wanted}, got {shown(order)}; {how}")
    if order.dtype != torch.int64:
        raise TypeError(f"{wanted}, got {order.dtype}; {how}")
    if not _permutes(order, hidden):
        raise ValueError(f"{wanted}, got {_order_in_words(order, hidden)}; {how}")


def saved_order_problem(key: str, order: Any, hidden: int) -> str | None:
    """Says why an order in a state_dict does not fit; None where it does."""
    if isinstance(order, Tensor) and order.dtype == torch.int64 and _permutes(order, hidden):
        return None
    return (f"{key} must be an int64 permutation ({hidden},) of the neurons, got {_order_in_words(order, hidden)}; "
            "save the state_dict of a net with the same sizes, ordered by set_order.")


def _permutes(order: Tensor, hidden: int) -> bool:
    return order.shape == (hidden,) and torch.equal(order.cpu().sort().values, torch.arange(hidden, device="cpu"))


def _order_in_words(order: Any, hidden: int) -> str:
    fits = isinstance(order, Tensor) and order.dtype == torch.int64 and order.shape == (hidden,)
    return "entries that repeat or lie outside" if fits else described(order)


# --- input of the nets over sequences: the words of torch.nn.RNN -----------------------------------------------

def sequence_dim(input: Tensor, hx: Tensor | None) -> bool:
    """Whether an input that is not packed has a batch dimension."""
    if input.dim() not in (2, 3):
        raise ValueError(f"RNN: Expected input to be 2D or 3D, got {input.dim()}D tensor instead")
    batched = input.dim() == 3
    if hx is not None and hx.dim() != input.dim():
        if batched:
            raise RuntimeError(f"For batched 3-D input, hx should also be 3-D but got {hx.dim()}-D tensor")
        raise RuntimeError(f"For unbatched 2-D input, hx should also be 2-D but got {hx.dim()}-D tensor")
    return batched


def sequence_tensors(data: Tensor, hx: Tensor, weight: Tensor, steps: int, autocast: bool) -> None:
    """Checks devices, dtypes and the length, after nn.RNN's own check of the shapes."""
    for name, tensor in (("hidden", hx), ("parameter", weight)):
        if tensor.device != data.device:
            raise RuntimeError(
                f"Input and {name} tensors are not at the same device, found input tensor at {data.device} and {name} "
                f"tensor at {tensor.device}"
            )
        # Under autocast floating dtypes may differ, but float64 does not mix with others.
        meets = autocast and data.dtype in FLOATING and (data.dtype == torch.float64) == (tensor.dtype == torch.float64)
        if tensor.dtype != data.dtype and not meets:
            raise RuntimeError(
                f"Input and {name} tensors are not the same dtype, found input tensor with {data.dtype} and {name} "
                f"tensor with {tensor.dtype}"
            )
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")


def tensors_with_a_leak(data: Any, hx: Any) -> None:
    """Checks that input and hx are tensors, where other objects with __torch_function__ would be right without leak."""
    for name, value in (("input", data), ("hx", hx)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a tensor where leak is not 1 (torch.nn.RNN, which takes any object with "
                f"__torch_function__, knows no leak), got {shown(value)}; pass a tensor or a subclass of it.")


# --- input of a step -------------------------------------------------------------------------------------------

def cell_input(input: Tensor, hx: Tensor | None, hidden_size: int, input_size: int, nonlinearity: str) -> None:
    """Checks the input of a cell, in the words of torch.nn.RNNCell."""
    if input.dim() not in (1, 2):
        raise ValueError(f"RNNCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
    if hx is not None and hx.dim() not in (1, 2):
        raise ValueError(f"RNNCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
    if input.shape[-1] != input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {input.shape[-1]} expected {input_size}")
    if nonlinearity not in NONLINEARITIES:
        raise RuntimeError(f"Unknown nonlinearity: {nonlinearity}")
    if hx is None:
        return
    batch, sizes = (len(input), hx.shape) if input.dim() == 2 else (1, (1, *hx.shape))
    if sizes[0] != batch:
        raise RuntimeError(f"Input batch size {batch} doesn't match hidden0 batch size {sizes[0]}")
    if len(sizes) > 1 and sizes[1] != hidden_size:
        raise RuntimeError(f"hidden0 has inconsistent hidden_size: got {sizes[1]}, expected {hidden_size}")


def step_arguments(x: Any, h: Any, w_ih: Any, w_hh: Any, biases: dict[str, Any], masks: dict[str, tuple[Any, Any]],
                   autocast: bool) -> None:
    """Checks the arguments of `masked_rnn_step`: biases by name, and masks by name, each with its weight."""
    tensors = {"x": x, "h": h, "w_ih": w_ih, "w_hh": w_hh, **{n: b for n, b in biases.items() if b is not None}}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {shown(tensor)}; pass torch.as_tensor(...).")
    if w_hh.dim() != 2 or w_hh.shape[0] != w_hh.shape[1]:
        raise ValueError(
            f"w_hh must be square (hidden, hidden), got shape {tuple(w_hh.shape)}; pass one layer's weight.")
    hidden = len(w_hh)
    if w_ih.dim() != 2 or len(w_ih) != hidden:
        raise ValueError(
            f"w_ih must have shape ({hidden}, inputs) to fit w_hh, got {tuple(w_ih.shape)}; give it a row a neuron.")
    expected = {"x": (*x.shape[:-1], w_ih.shape[1]) if x.dim() in (1, 2) else ("batch", w_ih.shape[1]),
                "h": (*x.shape[:-1], hidden), **{name: (hidden,) for name in biases}}
    for name, shape in expected.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{name} must have shape ({', '.join(map(str, shape))}{',' * (len(shape) == 1)}), got "
                f"{tuple(tensors[name].shape)}; x is (batch, inputs) and h (batch, hidden), both without batch for one."
            )
    for name, (mask, weight) in masks.items():
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else shown(mask)
            raise TypeError(f"{name} must be a bool tensor (True = kept), got {got}; convert it with .bool().")
        if mask.shape != weight.shape:
            raise ValueError(
                f"{name} must have the shape {tuple(weight.shape)} of its weight, got {tuple(mask.shape)}; build it "
                "with torch.ones_like(weight, dtype=torch.bool)."
            )
        tensors[name] = mask
    for name, tensor in tensors.items():
        if tensor.device != w_hh.device:
            raise ValueError(
                f"{name} must be on the device of w_hh, {w_hh.device}, got {tensor.device}; move it with .to().")
        if tensor.dtype == torch.bool:
            continue
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}; convert it with .float().")
        if tensor.dtype != w_hh.dtype and not (autocast and torch.float64 not in (tensor.dtype, w_hh.dtype)):
            raise TypeError(
                f"{name} must have the dtype of w_hh, {w_hh.dtype}, got {tensor.dtype}; convert it with "
                f".to({w_hh.dtype})."
            )


# --- derivatives -----------------------------------------------------------------------------------------------

def second_derivative() -> None:
    raise NotImplementedError(
        "the masked RNN is differentiable once, got a second derivative (double backward); use path='dense' (needs "
        "leak=1 and no cuDNN), or leave it out of what you differentiate twice."
    )


def forward_mode() -> None:
    raise NotImplementedError(
        "the masked RNN has no forward-mode derivative, got a dual tensor; use backward(), or path='dense' (needs "
        "leak=1)."
    )


def functorch() -> None:
    raise NotImplementedError(
        "the masked RNN does not work under torch.func transforms (grad, vmap, jvp, ...), got one; use backward(), or "
        "path='dense' (needs leak=1)."
    )


# --- to and from other nets ------------------------------------------------------------------------------------

def rnn_module(rnn: Any) -> None:
    if not isinstance(rnn, RNN):
        raise TypeError(f"rnn must be a torch.nn.RNN, got {shown(rnn)}; LSTM and GRU have no sparse form.")


def leakless(its_leak: float) -> None:
    if its_leak != 1:
        raise ValueError(
            f"leak must be 1 for to_rnn() (torch.nn.RNN knows no leak), got {its_leak!r}; keep the SparseRNN.")


def no_gradient(name: str) -> NoReturn:
    raise NotImplementedError(
        f"{name} must not require a gradient in a CompressedRNN (it is for inference), got one that does; call it "
        "under torch.no_grad(), or train the SparseRNN it came from (to_sparse_rnn())."
    )


def compressed_problem(name: str, values: Tensor, columns: Tensor, rows: Tensor, shape: tuple[int, int]) -> str | None:
    """Says why saved entries are no torch.sparse_csr matrix of this shape; None where they are."""
    what = ""
    if {columns.dtype, rows.dtype} <= {torch.int16, torch.int32, torch.int64}:
        try:
            torch._validate_sparse_csr_tensor_args(rows.to(torch.int64), columns.to(torch.int64), values, shape)
            return None
        except RuntimeError as error:
            what = f" ({error})"
    return (f"{name}_rows, _columns and _values must be a torch.sparse_csr matrix {shape}, got none{what}; load the "
            "state_dict of a CompressedRNN of the same sizes.")


def compressed_file(path: Any, what: str) -> NoReturn:
    raise ValueError(f"path must be a file written by CompressedRNN.save, got {str(path)!r} {what}; save it again.")


def no_safetensors() -> None:
    raise ImportError(
        "CompressedRNN.save and load need safetensors, which is not installed; run pip install safetensors.")


# --- other tools -----------------------------------------------------------------------------------------------

def no_script(module: nn.Module, other: str) -> NoReturn:
    """other: what torch.jit.script can compile."""
    raise RuntimeError(
        f"torch.jit.script cannot compile a {type(module).__name__}, whose forward pass is not TorchScript; put "
        f"{other} in its place before, or use torch.jit.trace.")
