"""One step of the masked RNN for hand-written loops: a function, and a module in the place of torch.nn.RNNCell."""
from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import RNNCell  # torch's own class, also where torch.nn.RNNCell is replaced by SparseRNNCell later

from ..checks import one_of
from ..graphs import is_exporting
from ..reference import compute_dtype
from ..reference.rnn import Step, kept
from . import checks
from .layer import Weights, autocast_dtype, masked_rnn
from .masked_module import MaskedModule, mask_of
from .tracing import is_recorded_or_transformed, is_taken_over, recorded


def masked_rnn_step(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
                    b_hh: Tensor | None = None, *, mask_ih: Tensor | None = None, mask_hh: Tensor | None = None,
                    nonlinearity: str = "tanh", leak: float = 1.0) -> Tensor:
    """Computes one step of a recurrent layer with masked weights:

        h' = (1 - leak) h + leak s((mask_ih * w_ih) x + b_ih + (mask_hh * w_hh) h + b_hh)

    Args:
        x: (B, I) or (I,); float32, float64, bfloat16 or float16. All tensors but the masks have one dtype, except under
            autocast.
        h: (B, H) or (H,), with a batch as x.
        w_ih: (H, I).
        w_hh: (H, H).
        b_ih: (H,) or None.
        b_hh: (H,) or None.
        mask_ih: bool, (H, I), True = kept; None keeps all. The values of masked weights, NaN included, do not matter.
        mask_hh: bool, (H, H), likewise.
        nonlinearity: s, "tanh" or "relu".
        leak: share of the new state, in (0, 1].

    Returns:
        h', of the shape of h, in x's dtype or under autocast in autocast's. It is computed in float32, for float64
        weights in float64. It is differentiable once in x, h, weights and biases; the gradient of masked weights is 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which, and what to do.
        NotImplementedError: on a second or a forward-mode derivative.
    """
    weight = w_hh if isinstance(w_hh, Tensor) else x
    autocast = autocast_dtype(weight.device.type, weight) if isinstance(weight, Tensor) else None
    checks.step_arguments(x, h, w_ih, w_hh, {"b_ih": b_ih, "b_hh": b_hh},
                          {"mask_ih": (mask_ih, w_ih), "mask_hh": (mask_hh, w_hh)}, autocast is not None)
    one_of("nonlinearity", nonlinearity, checks.NONLINEARITIES)
    step, dtype = Step(nonlinearity, checks.leak(leak), reverse=False), compute_dtype(w_hh)
    inputs, state = (x, h) if x.dim() == 2 else (x[None], h[None])
    weights = Weights(w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh)
    _, after = masked_rnn(inputs[None].to(dtype), state.to(dtype), weights, None, step)
    return (after if x.dim() == 2 else after[0]).to(autocast or x.dtype)


class SparseRNNCell(MaskedModule, RNNCell):
    """Works as torch.nn.RNNCell, with masks and a leak:

        h' = (1 - leak) h + leak s((mask_ih * W_ih) x + b_ih + (mask_hh * W_hh) h + b_hh)

    A mask is a bool buffer `<weight>_mask` (True = kept), made by `set_mask("weight_hh", mask)`, MagnitudePruner or
    load_state_dict, and treated as SparseRNN treats it. Without masks and leak it runs torch.nn.RNNCell itself. For
    whole sequences use SparseRNN.

    Args:
        input_size: as torch.nn.RNNCell, I.
        hidden_size: as torch.nn.RNNCell, H.
        bias: as torch.nn.RNNCell.
        nonlinearity: s, "tanh" or "relu".
        device: of the weights.
        dtype: of the weights.
        leak: share of the new state, in (0, 1]; 1 is torch.nn.RNNCell.

    Raises:
        ValueError: leak outside (0, 1].
        TypeError: leak is no number.
    """

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh",
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
                 leak: float = 1.0):
        super().__init__(input_size, hidden_size, bias, nonlinearity, device=device, dtype=dtype)
        self._leak = checks.leak(leak)

    @property
    def leak(self) -> float:
        """Share of the new state, in (0, 1]; may be set.

        Raises:
            ValueError: when set outside (0, 1].
            TypeError: when set to what is no number.
        """
        return self._leak

    @leak.setter
    def leak(self, value: float) -> None:
        self._leak = checks.leak(value)

    def _weight_names(self) -> list[str]:
        return ["weight_ih", "weight_hh"] + (["bias_ih", "bias_hh"] if self.bias else [])

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", leak={self.leak}" if self.leak != 1 else "")

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Returns h' (B, hidden_size).

        Args:
            input: (B, input_size), or (input_size,) without a batch.
            hx: (B, hidden_size), without a batch (hidden_size,); None = 0.

        Raises:
            ValueError, RuntimeError: input or hx does not fit, or an unknown nonlinearity, as torch.nn.RNNCell.
        """
        if not torch.compiler.is_compiling() and (node := recorded(self, input, hx)) is not None:
            return node  # pyright: ignore[reportReturnType]
        weights = {name: getattr(self, name) for name in self._weight_names()}
        masks = {name: mask_of(self, name, weight) for name, weight in weights.items()}
        if self._leak == 1:
            if all(mask is None for mask in masks.values()):
                return RNNCell.forward(self, input, hx)
            if not torch.compiler.is_compiling() and (
                    is_recorded_or_transformed() or is_taken_over((input, hx, *weights.values()))):
                weights = {name: kept(weight, masks[name]) for name, weight in weights.items()}
                return RNNCell.forward(self._as_rnn_cell(weights), input, hx)
        checks.cell_input(input, hx, self.hidden_size, self.input_size, self.nonlinearity)
        if hx is None:
            hx = torch.zeros(*input.shape[:-1], self.hidden_size, dtype=input.dtype, device=input.device)
        if self._leak == 1 and is_exporting():
            run = torch._VF.rnn_tanh_cell if self.nonlinearity == "tanh" else torch._VF.rnn_relu_cell
            batched = [t if t.dim() == 2 else t[None] for t in (input, hx)]
            found = [kept(weight, masks[name]) for name, weight in weights.items()] + [None] * (4 - len(weights))
            after = run(*batched, *found)
            return after if input.dim() == 2 else after[0]
        biases = [kept(weights[name], masks[name]) for name in self._weight_names()[2:]]
        return masked_rnn_step(input, hx, weights["weight_ih"], weights["weight_hh"], *biases,
                               mask_ih=masks["weight_ih"], mask_hh=masks["weight_hh"], nonlinearity=self.nonlinearity,
                               leak=self.leak)

    def _as_rnn_cell(self, weights: dict[str, Tensor]) -> RNNCell:
        """Returns a torch.nn.RNNCell with these tensors as its weights, for one call."""
        plain = RNNCell.__new__(RNNCell)
        plain.__dict__.update(self.__dict__, _parameters={"bias_ih": None, "bias_hh": None} | weights)
        return plain

    def __prepare_scriptable__(self) -> NoReturn:
        """torch.jit.script calls it first."""
        checks.no_script(self, "a torch.nn.RNNCell with its weights (0 where they are masked; leak must be 1)")
