"""The part of SparseRNN that decides which path it takes: torch's own RNN ("dense") or the masked op ("sparse")."""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import backends
from ..checks import positive_int
from ..graphs import constant_at_compile_time
from ..masks import get_mask
from . import crossovers, timing
from .layer import autocast_dtype, has_kernel
from .masked_module import Counted, kept_share, used_weight
from .ordered_module import OrderedModule

MANY_ZEROS = 0.9  # explain() advises a mask where at most this share of a weight differs from 0


class Measured(NamedTuple):
    """What `SparseRNN.tune` found.

    path: the faster path, "dense" or "sparse".
    seconds: path -> median time of a pass.
    training: whether a pass was forward and backward.
    """

    path: str
    seconds: dict[str, float]
    training: bool


class PathChoice(OrderedModule):
    """Chooses the path of a module with nn.RNN's attributes and with `path` and `leak`."""

    # The case of _case_of in which a net without masks was last found to be fastest by torch's own RNN.
    _straight: tuple | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._tuned: dict[tuple, str] = {}
        self._seen = (32, 50)  # batch and steps of the last input, for explain()

    def _case_of(self, input: Tensor) -> tuple:
        """All that the path of a net without masks depends on, parameters that are frozen or not aside."""
        device = input.device
        autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        return (input.shape, input.dtype, device, torch.is_grad_enabled(), autocast, self._path, self._leak,
                backends.forced)

    def _choice(self, device: str, dtype: torch.dtype, batch: int, steps: int, training: bool,
                counted: Counted | None) -> tuple[str, str | tuple[float, float]]:
        """Returns ("sparse" or "dense", why: in words, or as the predicted ratio and what it has to exceed)."""
        if self._leak != 1:
            return "sparse", f"leak is {self._leak}, which torch's RNN does not know"
        if self._path != "auto":
            return self._path, f"path is {self._path!r}"
        if counted is None:
            return "dense", "the call is recorded or transformed, and that any device and program can run"
        if backends.forced == "reference":
            return "sparse", "the backend 'reference' is asked for"
        if not has_kernel(device):
            return "dense", f"no compiled kernel serves {device} here (python -m moduli_kernels.env_report says why)"
        densities = self._densities(counted)
        tuned = self._tuned and self._tuned.get(_tuning_key(device, dtype, batch, training, densities))
        if tuned:
            return tuned, "tune() measured it"
        ratio = self._predicted(device, dtype, batch, steps, training, densities)
        if ratio is None:
            return "dense", f"the table of crossovers has nothing for {dtype} on {device}; tune() measures it"
        least = crossovers.margin(any(density is not None for density in densities), training)
        return "sparse" if ratio > least else "dense", (ratio, least)

    def _predicted(self, device: str, dtype: torch.dtype, batch: int, steps: int, training: bool,
                   densities: tuple[float | None, float | None]) -> float | None:
        return crossovers.predicted(device, dtype, self.hidden_size, batch, *densities, training, steps,
                                    inputs=self._mean_inputs())

    @constant_at_compile_time
    def _path_at_compile_time(self, device, dtype, batch, steps, training) -> str:
        """The path for a compiled graph. batch and steps are None where they vary; those seen before count then."""
        self._seen = (self._seen[0] if batch is None else batch, self._seen[1] if steps is None else steps)
        return self._choice(device, dtype, *self._seen, training, {})[0]

    def _densities(self, counted: Counted) -> tuple[float | None, float | None]:
        """The kept share of the input weights and of the hidden weights of all layers; None where none has a mask."""
        shares = []
        for kind in (0, 1):
            found = [self._share(names[kind], counted) for names in self._all_weights]
            if found == [None] * len(found) or len(found) == 1:
                shares.append(found[0])
                continue
            sizes = [weight.numel() for weight in self._flat_weights[kind::len(self._all_weights[0])]]
            shares.append(sum(size * (1 if share is None else share) for size, share in zip(sizes, found)) / sum(sizes))
        return tuple(shares)

    def _mean_inputs(self) -> int:
        """The number of columns of the input weights, averaged over all layers."""
        inner = self.hidden_size * (2 if self.bidirectional else 1)
        return round((self.input_size + (self.num_layers - 1) * inner) / self.num_layers)

    def explain(self, batch: int | None = None, steps: int | None = None) -> str:
        """Describes which path each layer and direction takes, why, what share of its weights is kept, and how
        many blocks its masks have.

        Args:
            batch: size of the batch to explain it for; None: that of the last input (before any: 32).
            steps: length of the sequence to explain it for; None: that of the last input (before any: 50).

        Raises:
            RuntimeError: a backend asked for by `mk.backend` or MODULI_KERNELS_BACKEND does not serve this device.
            ValueError: batch or steps is negative.
            TypeError: batch or steps is no integer.
        """
        batch, steps = self._seen[0] if batch is None else batch, self._seen[1] if steps is None else steps
        for name, value in (("batch", batch), ("steps", steps)):
            positive_int(name, value, minimum=0)
        weight = self._flat_weights[1]
        device, dtype = weight.device.type, autocast_dtype(weight.device.type, weight) or weight.dtype
        training = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        counted: Counted = {name: None if (mask := get_mask(self, name)) is None else kept_share(mask)
                            for names in self._all_weights for name in names[:2]}
        path, why = self._choice(device, dtype, batch, steps, training, counted)
        if isinstance(why, tuple):
            why = f"by the table of crossovers {crossovers.in_words(*why)}"
        by = "the reference in plain PyTorch"
        if path == "dense":
            by = "torch's own RNN over the whole stack"
        elif has_kernel(device):
            by = f"the masked kernel ({backends.active(device)})"
        lines = [f"{path}: {by}, for {steps} steps of a batch of {batch}, {dtype} on {device}, "
                 f"{'forward and backward' if training else 'forward'}; {why}."]
        to_mask = self._worth_a_mask(device, dtype, batch, steps, training, counted)
        for names in self._all_weights:
            words = ", ".join(self._share_in_words(name, counted[name], to_mask.get(name)) for name in names[:2])
            words += self._layouts_in_words(names[:2], weight, batch, counted) if path == "sparse" else ""
            lines.append(f"  layer {names[0].removeprefix('weight_ih_l').replace('_', ', ')}: {path}; {words}")
        return "\n".join(lines)

    def _share_in_words(self, name: str, share: float | None, of_numbers: float | None) -> str:
        if share is not None:
            return f"{name} {100 * share:.3g} % kept"
        if of_numbers is None:
            return f"{name} without a mask"
        return (f"{name} without a mask, though {100 * (1 - of_numbers):.3g} % of it is 0, which the sparse path would "
                f"skip after set_mask({name!r}, rnn.{name} != 0)")

    def _worth_a_mask(self, device: str, dtype: torch.dtype, batch: int, steps: int, training: bool,
                      counted: Counted) -> dict[str, float]:
        """The weights that have no mask and many zeros, and the share of the others: if masks would make it faster."""
        found: Counted = {}
        if self._path == "dense" or not has_kernel(device):
            return {}
        with torch.no_grad():
            for name in [name for name, share in counted.items() if share is None]:
                share = kept_share(used_weight(self, name))
                if share <= MANY_ZEROS:
                    found[name] = share
        if not found:
            return {}
        before, after = (self._predicted(device, dtype, batch, steps, training, self._densities(each))
                         for each in (counted, counted | found))
        pays = before is not None and after is not None and after > max(before, crossovers.margin(True, training))
        return found if pays else {}  # pyright: ignore[reportReturnType]

    def tune(self, input: Tensor | PackedSequence, hx: Tensor | None = None) -> Measured:
        """Measures both paths with this input on this machine, and has "auto" take the faster one from now on.

        In training mode, where a parameter requires a gradient, a pass is forward and backward, else forward alone. The
        result is the median of 7 passes of each path, in alternation. It is remembered on this module, also through
        copies and pickles but not in the state_dict, for inputs of the same device, dtype and mode and of about the
        same batch size and densities (the nearest powers of 2). Gradients, buffers and random numbers stay as they
        were. With a leak there is the sparse path alone.

        Args:
            input: as of a call: a tensor or a PackedSequence of the sizes to come.
            hx: as of a call.

        Returns:
            `path`, the faster one; `seconds`, {path: median time of a pass}; `training`, whether backward is in it.

        Raises:
            ValueError, RuntimeError: input or hx does not fit, in the words of torch.nn.RNN; RuntimeError also as by
                `explain`.
        """
        weight = self._flat_weights[1]
        device, parameters = weight.device, [p for p in self.parameters() if p.requires_grad]
        training = self.training and bool(parameters)

        def run(path: str):
            self._path = path
            with torch.set_grad_enabled(training):
                output, _ = self(input, hx)
                if training:
                    output = output.data if isinstance(output, PackedSequence) else output
                    torch.autograd.grad(output, parameters, torch.ones_like(output), allow_unused=True)

        before, choices = self._path, ("dense", "sparse") if self.leak == 1 else ("sparse",)
        buffers = {buffer: buffer.clone() for buffer in self.buffers() if buffer.is_floating_point()}
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                seconds = timing.alternating({p: (lambda p=p: run(p)) for p in choices}, device)
        finally:
            self._path = before
            with torch.no_grad():
                for buffer, then in buffers.items():  # of spectral_norm, whose power iteration makes steps
                    buffer.copy_(then)
        path = min(seconds, key=seconds.get)
        dtype = autocast_dtype(device.type, weight) or weight.dtype
        key = _tuning_key(device.type, dtype, self._seen[0], training, self._densities({}))
        self._tuned[key], self._straight = path, None
        return Measured(path, seconds, training)


def _tuning_key(device: str, dtype: torch.dtype, batch: int, training: bool, densities: tuple) -> tuple:
    """What counts as the same case: batch sizes and densities with the same nearest power of 2."""
    def near(value):
        return None if value is None else round(math.log2(max(value, 1e-6)))
    return device, backends.active(device), dtype, training, near(batch), *map(near, densities)
