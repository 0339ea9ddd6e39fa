"""`CompressedRNN`: the inference form of a SparseRNN, which holds the kept weights alone.

sparse_rnn.py imports this file, not the other way round. It sets `CompressedRNN.trainable_form` to SparseRNN, so that
`to_sparse_rnn` knows what to make.
"""
from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import RNN, RNNBase  # torch's own classes, also where torch.nn.RNN is replaced later
from torch.nn.utils.rnn import PackedSequence

from . import checks, stack
from .layer import Weights
from .ordered_module import load_orders, order_of, orders_of_layer, share_order
from .tracing import recorded

if TYPE_CHECKING:
    from .sparse_rnn import SparseRNN

METADATA = "moduli_kernels.CompressedRNN"  # the key in a safetensors file under which the settings stand as JSON
SETTINGS = ("input_size", "hidden_size", "num_layers", "nonlinearity", "bias", "batch_first", "dropout",
            "bidirectional")
PARTS = ("values", "columns", "rows")  # the buffers of a compressed weight: <weight>_values, ...


class CompressedRNN(nn.Module):
    """Holds the kept weights of a SparseRNN alone and gives the same outputs, without gradients.

    `SparseRNN.compress()` returns one, and `to_sparse_rnn()` goes back. A new one keeps no weight; `load_state_dict`
    fills it, without a dense matrix on the way. `save` and `load` use a safetensors file that holds the settings too.

    Each masked weight is stored as torch.sparse_csr stores it: `<weight>_values` (entries,) in the net's dtype,
    `<weight>_columns` (entries,) int16 where they fit, else int32, and `<weight>_rows` (hidden_size + 1,) int32, the
    number of entries before each row. In float32 that is 6 bytes an entry, 1/13 of the dense matrix at 95 % sparsity.
    An order of the neurons, in which the kept weights lie in blocks, is kept as `<weight>_order` (hidden_size,) int64.
    Weights without a mask and biases are stored dense. All are buffers, so state_dict and moves between devices and
    dtypes work as usual. The indices are widened to int64 for the length of a call.

    It stays in eval mode, so there is no dropout between its layers.

    Args:
        input_size: as torch.nn.RNN.
        hidden_size: as torch.nn.RNN.
        num_layers: as torch.nn.RNN.
        nonlinearity: "tanh" or "relu".
        bias: as torch.nn.RNN.
        batch_first: as torch.nn.RNN.
        dropout: kept for `to_sparse_rnn()`.
        bidirectional: as torch.nn.RNN.
        leak: share of the new state, in (0, 1], as SparseRNN.
        device: of the buffers.
        dtype: of values and biases.

    Raises:
        ValueError, TypeError: as SparseRNN.
        NotImplementedError: a gradient is asked for, in a call or by `requires_grad_()`.
    """

    trainable_form: ClassVar[type]  # SparseRNN; sparse_rnn.py sets it

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    _buffers: dict[str, Any]
    proj_size = 0  # nn.RNN's own checks, borrowed here, read it
    check_forward_args, check_input = RNNBase.check_forward_args, RNNBase.check_input
    get_expected_hidden_size, check_hidden_size = RNNBase.get_expected_hidden_size, RNNBase.check_hidden_size

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh",
                 bias: bool = True, batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, *,
                 leak: float = 1.0, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        plain: Any = RNN(  # for its checks, names and shapes
            input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional,
            device="meta", dtype=dtype)
        for name in SETTINGS:
            setattr(self, name, getattr(plain, name))
        self.leak = leak
        self._shapes = {name: tuple(weight.shape) for name, weight in plain.named_parameters()}
        self._names = [list(names) for names in plain._all_weights]
        for name, shape in self._shapes.items():
            zeros = torch.zeros(shape if len(shape) == 1 else 0, dtype=plain.weight_hh_l0.dtype, device=device)
            if len(shape) == 1:
                self.register_buffer(name, zeros)
            else:
                rows = torch.zeros(shape[0] + 1, dtype=torch.int32, device=device)
                self._hold(name, zeros, torch.zeros(0, dtype=_index_dtype(shape[1] - 1), device=device), rows)
        self.eval()

    @property
    def nonlinearity(self) -> str:
        """s, "tanh" or "relu"; may be set.

        Raises:
            ValueError: it is set to anything else.
        """
        return self._nonlinearity

    @nonlinearity.setter
    def nonlinearity(self, value: str) -> None:
        checks.mode_of(value)
        self._nonlinearity = value

    @property
    def leak(self) -> float:
        """Share of the new state, in (0, 1]; may be set.

        Raises:
            ValueError: it is set outside (0, 1].
            TypeError: it is set to what is no number.
        """
        return self._leak

    @leak.setter
    def leak(self, value: float) -> None:
        self._leak = checks.leak(value)

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*SETTINGS, "leak")}

    @classmethod
    def from_layers(cls, settings: dict[str, Any], leak: float, layers: list[Weights]) -> CompressedRNN:
        """Makes one from nn.RNN's arguments (with dtype) and the weights and masks of each layer and direction."""
        new = cls(**settings, leak=leak, device=layers[0].w_hh.device)
        with torch.no_grad():
            for names, weights in zip(new._names, layers):
                for name, weight, mask in zip(names, weights[:2], weights[4:6]):
                    if mask is None or bool(mask.all()):
                        new._hold(name, weight.detach().clone(memory_format=torch.contiguous_format))
                    else:
                        new._hold(name, *_compressed(weight.detach(), mask))
                for name, bias in zip(names[2:], weights[2:4]):
                    new._buffers[name].copy_(bias)
                if weights.order_h is not None:
                    share_order(new, names[1], weights.order_h.clone())
        return new

    def _hold(self, name: str, *tensors: Tensor) -> None:
        """Stores a weight as one dense tensor, or as values, columns and rows, in place of what was stored."""
        for key in (name, *(f"{name}_{part}" for part in PARTS)):
            self._buffers.pop(key, None)
        keys = [name] if len(tensors) == 1 else [f"{name}_{part}" for part in PARTS]
        for key, tensor in zip(keys, tensors):
            self.register_buffer(key, tensor)

    def _held(self, name: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns (values, rows, columns), the last two None where the weight is stored dense."""
        if name in self._buffers:
            return self._buffers[name], None, None
        values, columns, rows = (self._buffers[f"{name}_{part}"] for part in PARTS)
        return values, rows, columns

    def _layers(self) -> list[Weights]:
        layers = []
        for names in self._names:
            ih, hh = map(self._held, names[:2])
            biases = [self._buffers[name] for name in names[2:]] or [None, None]
            orders = orders_of_layer(self, names[1])
            layers.append(Weights(ih[0], hh[0], *biases, None, None, *ih[1:], *hh[1:], *orders))  # pyright: ignore[reportCallIssue]
        return layers

    @property
    def _flat_weights(self) -> list[Tensor]:
        """The hidden weights, whose dtype nn.RNN's check reads."""
        return [self._held(names[1])[0] for names in self._names]

    # -- use --

    def forward(self, input: Tensor | PackedSequence,
                hx: Tensor | None = None) -> tuple[Tensor | PackedSequence, Tensor]:
        """Returns (output, h_n) as SparseRNN does.

        Raises:
            NotImplementedError: input or hx requires a gradient.
            ValueError, RuntimeError: input or hx does not fit, in the words of torch.nn.RNN.
        """
        if not torch.compiler.is_compiling() and (node := recorded(self, input, hx)) is not None:
            return node  # pyright: ignore[reportReturnType]
        data = input.data if isinstance(input, PackedSequence) else input
        for name, tensor in (("input", data), ("hx", hx)):
            if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
                checks.no_gradient(name)
        layers = self._layers()
        batch = stack.batch_of(self, input, hx, layers[0].w_hh)
        return stack.results(self, batch, *stack.sparse(self, batch, layers))

    def __prepare_scriptable__(self) -> NoReturn:
        """torch.jit.script calls it first."""
        checks.no_script(self, "small.to_sparse_rnn().to_rnn()")

    def train(self, mode: bool = True) -> CompressedRNN:
        """Leaves the module in eval mode, whatever the model around it does."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> CompressedRNN:
        """Returns the module itself, since there is nothing to train.

        Raises:
            NotImplementedError: for True.
        """
        if requires_grad:
            checks.no_gradient("weights")
        return self

    def extra_repr(self) -> str:
        kept = ", ".join(f"{name}: {self._held(name)[0].numel()} of {math.prod(shape)}"
                         for name, shape in self._shapes.items() if len(shape) == 2)
        return f"{self.input_size}, {self.hidden_size}, kept {kept}"

    def to_sparse_rnn(self) -> SparseRNN:
        """Returns a SparseRNN with these weights and their masks, to train or prune further."""
        weights = self._layers()
        new = self.trainable_form(**self._settings(), device="meta", dtype=weights[0].w_hh.dtype)
        new.to_empty(device=weights[0].w_hh.device).eval()
        with torch.no_grad():
            for name, shape in self._shapes.items():
                values, rows, columns = self._held(name)
                if rows is None or columns is None:
                    getattr(new, name).copy_(values)
                    continue
                row = torch.arange(shape[0], device=rows.device).repeat_interleave(rows.diff())
                mask = torch.zeros(shape, dtype=torch.bool, device=rows.device)
                mask[row, columns.long()] = True
                getattr(new, name).zero_()[row, columns.long()] = values
                new.set_mask(name, mask)
            for _, name, *_ in self._names:
                new.set_order(name, order_of(self, name))
        return new

    # -- files --

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file: the state_dict, and the settings as metadata.

        Raises:
            ImportError: safetensors is not installed.
        """
        _safetensors()
        from safetensors.torch import save_file

        save_file(self.state_dict(), path, metadata={METADATA: json.dumps(self._settings())})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> CompressedRNN:
        """Reads a file that `save` wrote.

        Args:
            path: of the file.
            device: where the buffers go.

        Raises:
            ValueError: the file is of another kind, or incomplete.
            RuntimeError: its tensors do not fit its settings.
            FileNotFoundError: there is no such file.
            ImportError: safetensors is not installed.
        """
        _safetensors()
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt", device=str(device)) as file:
                settings: str | None = (file.metadata() or {}).get(METADATA)
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            checks.compressed_file(path, f"which safetensors cannot read ({error})")
        dtypes = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
        if settings is None or not dtypes:
            checks.compressed_file(path, "without its settings" if settings is None else "without weights")
        new = cls(**json.loads(settings), device=device, dtype=dtypes[0])
        new.load_state_dict(tensors, assign=True)
        return new

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any],
                              strict: bool, missing_keys: list[str], *rest: Any) -> None:
        """Makes room for as many entries as were saved, once their indices are checked, since the kernels trust them.

        What does not fit stays away from the buffers, also from those of its shape.
        """
        state_dict, refused = dict(state_dict), set()
        for name, shape in self._shapes.items():
            if len(shape) == 1:
                continue
            keys = [f"{prefix}{name}_{part}" for part in PARTS]
            whole, parts = state_dict.get(f"{prefix}{name}"), [state_dict.get(key) for key in keys]
            own = self._held(name)[0]
            if whole is not None and whole.shape == shape:
                self._hold(name, own.new_empty(shape))
            elif all(part is not None for part in parts):
                problem = checks.compressed_problem(f"{prefix}{name}", *parts, shape)  # pyright: ignore[reportCallIssue]
                if problem is None:
                    self._hold(name, own.new_empty(len(parts[0])),  # pyright: ignore[reportArgumentType]
                               *(torch.empty_like(part, device=own.device) for part in parts[1:]))  # pyright: ignore[reportArgumentType]
                    continue
                rest[-1].append(problem)
                refused.update(keys)
            for key in keys:
                state_dict.pop(key, None)
        load_orders(self, [names[1] for names in self._names], state_dict, prefix, rest[-1])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        missing_keys[:] = [key for key in missing_keys if key not in refused]


def _index_dtype(largest: int) -> torch.dtype:
    return next(dtype for dtype in (torch.int16, torch.int32, torch.int64) if largest <= torch.iinfo(dtype).max)


def _compressed(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (values, columns, rows) of the entries that the mask keeps, row by row."""
    ends = mask.sum(1).cumsum(0)
    entries = int(ends[-1])
    rows = torch.zeros(len(mask) + 1, dtype=torch.int32 if entries < 2**31 else torch.int64, device=mask.device)
    rows[1:] = ends
    return weight[mask], mask.nonzero()[:, 1].to(_index_dtype(mask.shape[1] - 1)), rows


def _safetensors() -> None:
    try:
        import safetensors  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        checks.no_safetensors()
