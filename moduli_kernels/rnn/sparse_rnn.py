"""`SparseRNN`: torch.nn.RNN whose masked weights cost nothing."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..masks import get_mask, original_name
from ..reference.rnn import kept
from . import checks, crossovers, stack
from .compressed import CompressedRNN
from .layer import Weights, autocast_dtype, untraced
from .masked_module import mask_of, order_of
from .path_choice import PathChoice


class SparseRNN(PathChoice, nn.RNN):
    """Replaces torch.nn.RNN where weights are masked, with a leak if wanted, and skips what is masked.

    In each layer and direction, with s = tanh or ReLU,

        h'_t = (1 - leak) h'_(t-1) + leak s((mask_ih * W_ih) x_t + b_ih + (mask_hh * W_hh) h'_(t-1) + b_hh)

    Every argument, parameter name, shape, output and error is that of torch.nn.RNN: layers, both directions, dropout
    between layers (the same random numbers on the CPU), batch_first, no batch dimension, PackedSequence. It is a
    subclass of nn.RNN, loads an nn.RNN's state_dict strictly, and saves keys of masks only where there are any.

    Args:
        *args: as torch.nn.RNN.
        **kwargs: as torch.nn.RNN.
        leak: share of the new state, in (0, 1]; 1 is torch.nn.RNN.
        path: "auto", "dense" (torch's own RNN over masked weights; needs leak=1) or "sparse" (the masked kernel).
            "auto" takes what `tune` has measured, else what the shipped table of measurements predicts.

    A mask is a bool buffer `<weight>_mask` (True = kept), made by `set_mask`, MagnitudePruner or load_state_dict. A
    masked weight counts as 0 whatever its value, NaN included, and its gradient is exactly 0. A mask of floats 0 and 1
    by torch.nn.utils.prune works as well. To load a state_dict without masks into a net that has some, take them away
    first (`set_mask(name, None)`), or load with strict=False to keep them.

    On CUDA the sparse path multiplies a large masked hidden weight in blocks, and the kept weights beside the blocks
    one by one, where that is predicted to be faster. `set_order` with `mk.manifold_order` makes the blocks few. They
    are found once per version of a mask (writes through `mask.data` do not count), so a CUDA graph must be recorded
    again when a mask changes.

    Under autocast the output has the dtypes of torch.nn.RNN. The sparse path computes in float32 (float64 for float64
    weights) and rounds at the end, also for 16-bit weights.

    "auto" decides from the share of weights that the masks keep, counted once per version of a mask. Without
    gradients, masked weights that have been found to be 0 are not checked again until weight or mask change (on the
    sparse path where that is faster, on the CPU). Writes through `weight.data` do not count as change.

    Under torch.compile with torch._dynamo.config.allow_rnn = True, which every nn.RNN needs, it becomes part of one
    graph; else it runs in eager mode outside the graph. In a graph the path is chosen at compile time, and masks that
    change in place take effect.

    Not supported are: on the sparse path a second or a forward-mode derivative and torch.func (NotImplementedError);
    PackedSequence under torch.compile(fullgraph=True); torch.jit.script (script `to_rnn()` instead).

    Raises:
        ValueError, TypeError: as torch.nn.RNN; leak outside (0, 1]; an unknown path, or "dense" with a leak.
    """

    weight_hh_l0: Tensor

    def __init__(self, *args: Any, leak: float = 1.0, path: str = "auto", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._leak = checks.leak(leak)
        self._path = checks.path(path, self._leak)

    @property
    def leak(self) -> float:
        """Share of the new state, in (0, 1]; may be set.

        Raises:
            ValueError: it is set outside (0, 1], or to less than 1 while the path is "dense".
            TypeError: it is set to what is no number.
        """
        return self._leak

    @leak.setter
    def leak(self, value: float) -> None:
        value = checks.leak(value)
        checks.path(self._path, value)
        self._leak = value

    @property
    def path(self) -> str:
        """"auto", "dense" or "sparse"; may be set.

        Raises:
            ValueError: it is set to anything else, or to "dense" while leak is not 1.
        """
        return self._path

    @path.setter
    def path(self, value: str) -> None:
        self._path = checks.path(value, self._leak)

    def extra_repr(self) -> str:
        defaults = {"nonlinearity": "tanh", "leak": 1, "path": "auto"}
        settings = [f"{name}={getattr(self, name)}" for name, default in defaults.items()
                    if getattr(self, name) != default]
        masked = [name for name in self._weight_names() if get_mask(self, name) is not None]
        return ", ".join([super().extra_repr(), *settings, *([f"masks of {', '.join(masked)}"] if masked else [])])

    # -- forward --

    def forward(self, input: Tensor | PackedSequence,
                hx: Tensor | None = None) -> tuple[Tensor | PackedSequence, Tensor]:
        """Returns (output, h_n), of the shapes of torch.nn.RNN.

        Raises:
            ValueError, RuntimeError: input or hx does not fit, in the words of torch.nn.RNN.
        """
        if torch.compiler.is_compiling():
            return self._forward(input, hx)
        if self._straight is not None and self._straight == self._case_of(input):
            return nn.RNN.forward(self, input, hx)
        self._update_flat_weights()
        return self._forward_untraced(input, hx)

    def _forward(self, input: Tensor | PackedSequence, hx: Tensor | None) -> tuple[Tensor | PackedSequence, Tensor]:
        weight = self.weight_hh_l0
        batch = stack.batch_of(self, input, hx, weight)
        training = torch.is_grad_enabled() and (
            batch.data.requires_grad or batch.hx.requires_grad
            or any(p.requires_grad for p in self._parameters.values()))  # pyright: ignore[reportOptionalMemberAccess]
        dtype = autocast_dtype(weight.device.type, weight) or weight.dtype
        if torch.compiler.is_compiling():
            from torch.fx.experimental.symbolic_shapes import has_static_value

            sizes = [size if has_static_value(size) else None for size in (batch.size, batch.steps)]
            path = self._path_at_compile_time(weight.device.type, dtype, *sizes, training)
        else:
            self._seen = (batch.size, batch.steps)
            path = self._last_choice(weight.device.type, dtype, batch.size, batch.steps, training)
        if path == "sparse":
            output, h_n = stack.sparse(self, batch, self._layers(batch.size))
        else:
            unchanged = not self._buffers and not torch.compiler.is_compiling()
            weights = self._flat_weights if unchanged else [self._kept(name) for name in self._weight_names()]
            if not torch.compiler.is_compiling():
                same = all(weight is own for weight, own in zip(weights, self._flat_weights))
                self._straight = self._case_of(input) if same else None
            output, h_n = stack.dense(self, batch, weights)  # pyright: ignore[reportArgumentType]
        return stack.results(self, batch, output, h_n)

    _forward_untraced = untraced(_forward)

    def _weight_names(self) -> list[str]:
        return self._flat_weights_names

    def _layers(self, batch: int | None = None) -> list[Weights]:
        """Returns the weights of each layer and direction; for a batch of a given size, as the op should get them."""
        layers = []
        for names in self._all_weights:
            tensors = [getattr(self, name) for name in names]
            masks = [mask_of(self, name, tensor) for name, tensor in zip(names, tensors)]
            (w_ih, w_hh, *biases), (mask_ih, mask_hh, *bias_masks) = tensors, masks
            b_ih, b_hh = map(kept, biases, bias_masks) if self.bias else (None, None)
            layout = None
            if batch is not None:
                mask_ih = None if self._may_drop_mask(names[0], w_ih, mask_ih, batch) else mask_ih
                mask_hh = None if self._may_drop_mask(names[1], w_hh, mask_hh, batch) else mask_hh
                layout = self._layout(names[1], batch)
            layers.append(Weights(w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh, layout=layout))
        return layers

    def _kept(self, name: str) -> Tensor:
        """The weight with 0 where it is masked: the weight itself where it is known to be 0 there and no gradient needs
        the mask, else a copy."""
        weight = getattr(self, name)
        mask = mask_of(self, name, weight)
        if mask is None or not _mask_counts(weight) and self._facts.zero_where_masked(name, weight, mask):
            return weight
        return kept(weight, mask)

    def _may_drop_mask(self, name: str, weight: Tensor, mask: Tensor | None, batch: int) -> bool:
        """Whether the op gets no mask on the sparse path, because nothing needs it and it costs more than it saves."""
        if mask is None or weight.device.type != "cpu" or _mask_counts(weight):
            return False
        if mask is not get_mask(self, name):  # a mask of floats, of which nothing is remembered
            return False
        density = self._facts.density(name, mask)
        return (density is not None and crossovers.is_dense_product_best(density, batch, mask.numel())
                and self._facts.zero_where_masked(name, weight, mask))

    # -- to and from other nets --

    @classmethod
    def from_rnn(cls, rnn: nn.RNN, *, path: str = "auto") -> SparseRNN:
        """Makes a SparseRNN that computes what rnn does, with copies of its weights and masks (MagnitudePruner's or
        torch.nn.utils.prune's) and without its hooks. The leak and the orders of a SparseRNN are kept.

        Args:
            rnn: a torch.nn.RNN, or a SparseRNN.
            path: "auto", "dense" or "sparse", of the new net.

        Raises:
            TypeError: rnn is no nn.RNN.
            ValueError: an unknown path, or "dense" with a leak.
        """
        checks.rnn_module(rnn)
        new = cls(**_settings(rnn), leak=getattr(rnn, "leak", 1.0), path=path, device="meta")
        _copy_weights(rnn, new)
        for name in rnn._flat_weights_names:
            weight = getattr(new, name)
            if (mask := mask_of(rnn, name, weight)) is not None:
                new.set_mask(name, mask)
            if (order := order_of(rnn, name)) is not None:
                new.set_order(name, order)
        return new

    def to_rnn(self) -> nn.RNN:
        """Makes a plain torch.nn.RNN with copies of the weights, 0 where they are masked, for ONNX or torch.export.

        Raises:
            ValueError: leak is not 1.
        """
        checks.leakless(self.leak)
        new = nn.RNN(**_settings(self), device="meta")
        _copy_weights(self, new)
        return new

    def compress(self) -> CompressedRNN:
        """Makes the inference form, which holds the kept weights alone."""
        return CompressedRNN.from_layers(_settings(self), self.leak, self._layers())


CompressedRNN.trainable_form = SparseRNN  # compressed.py, below this file, makes one in to_sparse_rnn


def _mask_counts(weight: Tensor) -> bool:
    """Whether a mask of this weight matters even where the weight is 0: for its gradient, and in a compiled graph, in
    which both may change."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled() and weight.requires_grad


def _settings(rnn: nn.RNN) -> dict[str, Any]:
    names = ("input_size", "hidden_size", "num_layers", "nonlinearity", "bias", "batch_first", "dropout",
             "bidirectional")
    return {name: getattr(rnn, name) for name in names} | {"dtype": rnn.weight_hh_l0.dtype}


def _copy_weights(source: nn.RNN, to: nn.RNN) -> None:
    """Copies the weights of `source`, masked ones as 0, and their requires_grad, into a module on the meta device."""
    to.to_empty(device=source.weight_hh_l0.device).train(source.training)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for name in source._flat_weights_names:
            weight = source._parameters.get(name)
            weight = getattr(source, original_name(name)) if weight is None else weight  # torch.nn.utils.prune
            parameter = getattr(to, name)
            parameter.copy_(kept(weight, mask_of(source, name, weight)))
            parameter.requires_grad_(weight.requires_grad)
