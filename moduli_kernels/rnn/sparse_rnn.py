"""`SparseRNN`: torch.nn.RNN whose masked weights cost nothing."""
from __future__ import annotations

from copy import deepcopy
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import RNN  # torch's own class, also where torch.nn.RNN is replaced by SparseRNN later
from torch.nn.utils.rnn import PackedSequence

from ..graphs import is_exporting
from ..masks import get_mask, is_zero_where_masked, set_mask
from ..reference.rnn import kept
from . import checks, crossovers, stack
from .compressed import CompressedRNN
from .layer import Weights, autocast_dtype
from .masked_module import Counted, mask_of, needs_gradient
from .ordered_module import order_of, orders_of_layer, share_order
from .other_nets import is_trained, settings_of, shared_weight, used_weights
from .path_choice import PathChoice
from .tracing import is_taken_over, may_look_at, recorded, untraced


class SparseRNN(PathChoice, RNN):
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

    Where kept weights lie in blocks, the sparse path multiplies these whole, and the kept weights beside them one by
    one, where that is predicted to be faster. `set_order` with `mk.manifold_order` says in which order of the neurons
    the blocks show. On the CPU they are found in the masks of input and hidden weights at each call. On CUDA they are
    found in a large hidden weight's mask when it changes, which each call looks up and waits for; a CUDA graph has no
    blocks, and reads the masks as they are when it is replayed.

    Under autocast the output has the dtypes of torch.nn.RNN. The sparse path computes in float32 (float64 for float64
    weights) and rounds at the end, also for 16-bit weights.

    A call uses what masks, weights and settings hold at that moment, whoever wrote them. "auto" decides from the share
    of weights that the masks keep. On the CPU the shares are counted at each call, and without gradients it is looked
    up whether masked weights are 0, where that saves a copy. On CUDA, where a count waits for the device, a share is
    remembered until the mask's version changes: it decides about speed only, never about a result.

    The output may be changed in place (`output += x`) before the backward pass, which then computes it a second time.
    As with every op that autograd needs the output of, a change through `output.data` is not seen.

    Under torch.compile with torch._dynamo.config.allow_rnn = True, which every nn.RNN needs, it becomes part of one
    graph; else it runs in eager mode outside the graph. In a graph the path is chosen at compile time, and masks that
    change in place take effect.

    torch.export, torch.jit.trace and torch.fx work as with torch.nn.RNN. On path "auto", what torch.export and
    torch.jit.trace record is torch's own RNN over masked weights, which runs without this package; torch.func and
    forward-mode derivatives take it too, and so do objects with a __torch_function__ of their own, on every path.

    Not supported are: on the sparse path a second or a forward-mode derivative and torch.func (NotImplementedError);
    PackedSequence under torch.compile(fullgraph=True); torch.jit.script (put `to_rnn()` in its place).

    Raises:
        ValueError, TypeError: as torch.nn.RNN; leak outside (0, 1]; an unknown path, or "dense" with a leak.
    """

    weight_hh_l0: Tensor

    def __init__(self, *args: Any, leak: float = 1.0, path: str = "auto", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._leak = checks.leak(leak)
        self._path = checks.path(path, self._leak)

    @property
    def nonlinearity(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """s, "tanh" or "relu"; may be set.

        Raises:
            ValueError: it is set to anything else.
        """
        return checks.NONLINEARITY_OF[self._mode]

    @nonlinearity.setter
    def nonlinearity(self, value: str) -> None:
        self._mode = checks.mode_of(value)

    @property
    def mode(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """torch's name of the nonlinearity, "RNN_TANH" or "RNN_RELU"; may be set.

        Raises:
            ValueError: it is set to anything else.
        """
        return self._mode

    @mode.setter
    def mode(self, value: str) -> None:
        self._mode = checks.mode(value)

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

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_mode" not in state:  # a pickle of torch.nn.RNN's own attributes, as the first versions made
            state = {**state, "_mode": state["mode"]}
        super().__setstate__(state)

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
        # Without leave for RNNs, torch before 2.15 does not come here, and 2.15 would compile what follows in pieces.
        if torch.compiler.is_compiling() and (is_exporting() or torch._dynamo.config.allow_rnn):
            return self._forward(input, hx)
        return self._forward_eagerly(input, hx)

    @untraced
    def _forward_eagerly(self, input: Tensor | PackedSequence,
                         hx: Tensor | None) -> tuple[Tensor | PackedSequence, Tensor]:
        if (self._straight is not None and not self._buffers and type(input) is Tensor
                and self._straight == self._case_of(input)):
            return RNN.forward(self, input, hx)
        node = recorded(self, input, hx)
        if node is not None:
            return node  # pyright: ignore[reportReturnType]
        self._update_flat_weights()
        data = input.data if isinstance(input, PackedSequence) else input
        if is_taken_over((data, hx, *self._flat_weights)):
            if self._leak == 1:
                return RNN.forward(self._as_nn_rnn(), input, hx)
            checks.tensors_with_a_leak(data, hx)
        return self._forward(input, hx)

    def _forward(self, input: Tensor | PackedSequence, hx: Tensor | None) -> tuple[Tensor | PackedSequence, Tensor]:
        compiling = torch.compiler.is_compiling()
        weights: list[Any] = [getattr(self, name) for name in self._flat_weights_names] if compiling else (
            self._flat_weights)
        weight = weights[1]
        batch = stack.batch_of(self, input, hx, weight)
        training = torch.is_grad_enabled() and any(t.requires_grad for t in (batch.data, batch.hx, *weights))
        dtype = autocast_dtype(weight.device.type, weight) or weight.dtype
        counted: Counted | None = None
        if compiling and not is_exporting():
            from torch.fx.experimental.symbolic_shapes import has_static_value

            sizes = [size if has_static_value(size) else None for size in (batch.size, batch.steps)]
            path = self._path_at_compile_time(weight.device.type, dtype, *sizes, training)
        else:
            if may_look_at((batch.data, batch.hx, *weights, *self._buffers.values())):
                counted = {}
                if self._seen != (batch.size, batch.steps):  # to set an attribute takes a module 10 us
                    self._seen = batch.size, batch.steps
            path, _ = self._choice(weight.device.type, dtype, batch.size, batch.steps, training, counted)
        if path == "sparse":
            output, h_n = stack.sparse(self, batch, self._layers(weights, batch.size, counted))
        else:
            if counted is not None and not self._buffers and isinstance(input, Tensor):
                self._straight = self._case_of(input)
            output, h_n = stack.dense(self, batch, self._masked_weights(weights, counted))
        return stack.results(self, batch, output, h_n)

    def _weight_names(self) -> list[str]:
        return self._flat_weights_names

    def _masked_weights(self, weights: list[Tensor], counted: Counted | None) -> list[Tensor]:
        """Returns what torch's own RNN multiplies: the weights, 0 where they are masked."""
        return [self._masked_weight(name, weight, counted) for name, weight in zip(self._flat_weights_names, weights)]

    def _as_nn_rnn(self) -> nn.RNN:
        """Returns a torch.nn.RNN over the masked weights, for one call."""
        weights: Any = self._flat_weights
        weights, plain = self._masked_weights(weights, None), RNN.__new__(RNN)
        plain.__dict__.update(self.__dict__, mode=self._mode, _parameters=dict(zip(self._flat_weights_names, weights)),
                              _flat_weights=weights, _flat_weight_refs=[None] * len(weights))
        return plain

    def _layers(self, weights: list[Tensor], batch: int, counted: Counted | None) -> list[Weights]:
        """Returns the weights of each layer and direction as the op should get them, for a batch of this size."""
        layers, named = [], dict(zip(self._flat_weights_names, weights))
        for names in self._all_weights:
            tensors = [named[name] for name in names]
            masks = [mask_of(self, name, tensor) for name, tensor in zip(names, tensors)]
            (w_ih, w_hh, *biases), (mask_ih, mask_hh, *bias_masks) = tensors, masks
            b_ih, b_hh = map(kept, biases, bias_masks) if self.bias else (None, None)
            if counted is not None:
                mask_ih = None if self._may_drop_mask(names[0], w_ih, mask_ih, batch, counted) else mask_ih
                mask_hh = None if self._may_drop_mask(names[1], w_hh, mask_hh, batch, counted) else mask_hh
            layout = self._layout(names[1], w_hh, batch, counted)
            order_x, order_h = orders_of_layer(self, names[1]) if w_hh.device.type == "cpu" else (None, None)
            layers.append(Weights(w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh, order_x=order_x, order_h=order_h,
                                  layout=layout))
        return layers

    def _may_drop_mask(self, name: str, weight: Tensor, mask: Tensor | None, batch: int, counted: Counted) -> bool:
        """Whether the op gets no mask on the CPU, because the weight is 0 where it is masked and the op multiplies all
        of it faster than it finds the kept entries."""
        if mask is None or weight.device.type != "cpu" or needs_gradient(weight):
            return False
        share = self._share(name, counted)
        return (share is not None and crossovers.is_dense_product_best(share, batch, mask.numel())
                and is_zero_where_masked(weight, mask))

    # -- tools that read the code of forward --

    def __prepare_scriptable__(self) -> NoReturn:
        """torch.jit.script calls it first."""
        checks.no_script(self, "rnn.to_rnn()")

    # -- to and from other nets --

    @classmethod
    def from_rnn(cls, rnn: nn.RNN, *, path: str = "auto", copy: bool = False) -> SparseRNN:
        """Makes a SparseRNN that computes what rnn does, to be put in its place: `model.rnn =
        SparseRNN.from_rnn(model.rnn)`.

        It shares the Parameters and masks of rnn, so that an optimizer, a regularizer and a MagnitudePruner that were
        made before go on working on it. Moving one of the two nets with .to() moves the Parameters of both, and the
        masks of a SparseRNN along. Hooks of rnn are not taken over; those that hold a mask are registered anew. The
        leak and the orders of a SparseRNN are kept.

        Weights that rnn computes (torch.nn.utils.parametrize, spectral_norm, weight_norm) become new Parameters with
        the values that its forward pass uses, and share nothing. Of a weight pruned by torch.nn.utils.prune, the
        Parameter `<weight>_orig` is shared as `<weight>`, with a bool mask of its own: what torch.nn.utils.prune prunes
        later counts in rnn alone.

        Args:
            rnn: a torch.nn.RNN, or a SparseRNN.
            path: "auto", "dense" or "sparse", of the new net.
            copy: True makes an independent net with copies of weights, masks and orders.

        Raises:
            TypeError: rnn is no nn.RNN.
            ValueError: an unknown path, or "dense" with a leak; a weight of rnn is written by something unknown.
        """
        checks.rnn_module(rnn)
        new = cls(**settings_of(rnn), leak=getattr(rnn, "leak", 1.0), path=path, device="meta")
        new.train(rnn.training)
        for name in rnn._flat_weights_names:
            weight, mask = shared_weight(rnn, name)
            setattr(new, name, weight)
            if mask is not None:
                set_mask(new, name, mask)
            if (order := order_of(rnn, name)) is not None:
                share_order(new, name, order)
        new._init_flat_weights()
        return deepcopy(new) if copy else new

    def to_rnn(self) -> nn.RNN:
        """Makes a plain torch.nn.RNN with copies of the weights that a forward pass uses, 0 where they are masked, for
        ONNX, torch.jit.script and similar tools.

        Raises:
            ValueError: leak is not 1; a weight is written by something unknown.
        """
        checks.leakless(self.leak)
        weights = used_weights(self)
        new = RNN(**settings_of(self), device="meta").to_empty(device=weights[0].device)
        new.train(self.training)
        with torch.no_grad():
            for name, weight in zip(self._flat_weights_names, weights):
                parameter = getattr(new, name)
                parameter.copy_(weight)
                parameter.requires_grad_(is_trained(self, name))
        return new

    def compress(self) -> CompressedRNN:
        """Makes the inference form, which holds copies of the kept weights alone.

        Raises:
            ValueError: a weight is written by something unknown.
        """
        layers = self._layers(used_weights(self), batch=0, counted=None)
        return CompressedRNN.from_layers(settings_of(self), self.leak, layers)


CompressedRNN.trainable_form = SparseRNN  # compressed.py, below this file, makes one in to_sparse_rnn
