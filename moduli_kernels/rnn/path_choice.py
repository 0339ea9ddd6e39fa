"""The part of SparseRNN that decides which path it takes: torch's own RNN ("dense") or the masked op ("sparse")."""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import backends
from ..checks import positive_int
from ..masks import get_mask
from . import crossovers, timing
from .layer import autocast_dtype, constant_at_compile_time, has_kernel
from .masked_module import OrderedModule


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

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._tuned: dict[tuple, str] = {}
        self._chosen: tuple = (None, "")  # the last question to `_choice`, and its answer
        self._straight: tuple | None = None  # the case of _case_of in which torch's RNN runs over the weights unchanged
        self._seen = (32, 50)  # batch and steps of the last input, for explain()

    def __getstate__(self):
        # What is remembered of tensors by their ids belongs to no copy.
        return super().__getstate__() | {"_chosen": (None, ""), "_straight": None}

    def _case_of(self, input) -> tuple | None:
        """All that decides whether torch's own RNN runs over the weights unchanged; None for a PackedSequence."""
        if not isinstance(input, Tensor):
            return None
        grad, device = torch.is_grad_enabled(), input.device
        autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        weights = () if grad and not self._buffers else _versions(self._parameters)  # masked ones may no longer be 0
        return (input.shape, input.dtype, device, grad, autocast, weights, *self._asked_for())

    def _asked_for(self) -> tuple:
        """All of the masks and settings that a choice depends on."""
        return _versions(self._buffers), self._path, self._leak, backends.forced

    def _last_choice(self, *case) -> str:
        """The path of `_choice`, which is asked again only where something it depends on has changed.

        Asking costs a few microseconds, which small nets would notice.
        """
        asked = (*case, *self._asked_for())
        if self._chosen[0] != asked:
            self._chosen = (asked, self._choice(*case)[0])
        return self._chosen[1]

    def _choice(self, device: str, dtype: torch.dtype, batch: int, steps: int, training: bool) -> tuple[str, str]:
        """Returns ("sparse" or "dense", why)."""
        if self.leak != 1:
            return "sparse", f"leak is {self.leak}, which torch's RNN does not know"
        if self.path != "auto":
            return self.path, f"path is {self.path!r}"
        if backends.forced == "reference":
            return "sparse", "the backend 'reference' is asked for"
        if not has_kernel(device):
            return "dense", f"no compiled kernel serves {device} here (python -m moduli_kernels.env_report says why)"
        densities = self._densities()
        tuned = self._tuned.get(_tuning_key(device, dtype, batch, training, densities))
        if tuned is not None:
            return tuned, "tune() measured it"
        ratio = crossovers.predicted(device, dtype, self.hidden_size, batch, *densities, training, steps,
                                     inputs=self._mean_inputs())
        if ratio is None:
            return "dense", f"the table of crossovers has nothing for {dtype} on {device}; tune() measures it"
        least = crossovers.margin(any(density is not None for density in densities), training)
        why = f"by the table of crossovers {crossovers.in_words(ratio, least)}"
        return "sparse" if ratio > least else "dense", why

    @constant_at_compile_time
    def _path_at_compile_time(self, device, dtype, batch, steps, training) -> str:
        """The path for a compiled graph. batch and steps are None where they vary; those seen before count then."""
        self._seen = (self._seen[0] if batch is None else batch, self._seen[1] if steps is None else steps)
        return self._choice(device, dtype, *self._seen, training)[0]

    def _density(self, name: str) -> float | None:
        return self._facts.density(name, get_mask(self, name))

    def _densities(self) -> tuple[float | None, float | None]:
        """The kept share of the input weights and of the hidden weights of all layers; None where none has a mask."""
        shares = []
        for kind in ("weight_ih", "weight_hh"):
            names = [name for name in self._weight_names() if name.startswith(kind)]
            found = [self._density(name) for name in names]
            sizes = [getattr(self, name).numel() for name in names]
            kept_entries = sum(size * (1 if share is None else share) for size, share in zip(sizes, found))
            shares.append(None if all(share is None for share in found) else kept_entries / sum(sizes))
        return tuple(shares)

    def _mean_inputs(self) -> int:
        """The number of columns of the input weights, averaged over all layers."""
        inner = self.hidden_size * (2 if self.bidirectional else 1)
        return round((self.input_size + (self.num_layers - 1) * inner) / self.num_layers)

    def explain(self, batch: int | None = None, steps: int | None = None) -> str:
        """Describes which path each layer and direction takes, why, what share of its weights is kept, and on CUDA
        how the hidden weight is read.

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
        weight = self.weight_hh_l0
        device, dtype = weight.device.type, autocast_dtype(weight.device.type, weight) or weight.dtype
        training = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        path, why = self._choice(device, dtype, batch, steps, training)
        by = "the reference in plain PyTorch"
        if path == "dense":
            by = "torch's own RNN over the whole stack"
        elif has_kernel(device):
            by = f"the masked kernel ({backends.active(device)})"
        lines = [f"{path}: {by}, for {steps} steps of a batch of {batch}, {dtype} on {device}, "
                 f"{'forward and backward' if training else 'forward'}; {why}."]
        for names in self._all_weights:
            shares = {name: self._density(name) for name in names[:2]}
            words = ", ".join(f"{name} without a mask" if share is None else f"{name} {100 * share:.3g} % kept"
                              for name, share in shares.items())
            words += self._layout_in_words(names[1], batch) if path == "sparse" else ""
            lines.append(f"  layer {names[0].removeprefix('weight_ih_l').replace('_', ', ')}: {path}; {words}")
        return "\n".join(lines)

    def tune(self, input: Tensor | PackedSequence, hx: Tensor | None = None) -> Measured:
        """Measures both paths with this input on this machine, and has "auto" take the faster one from now on.

        In training mode, where a parameter requires a gradient, a pass is forward and backward, else forward alone. The
        result is the median of 7 passes of each path, in alternation. It is remembered on this module, also through
        copies and pickles but not in the state_dict, for inputs of the same device, dtype and mode and of about the
        same batch size and densities (the nearest powers of 2). Gradients and random numbers stay as they were. With a
        leak there is the sparse path alone.

        Args:
            input: as of a call: a tensor or a PackedSequence of the sizes to come.
            hx: as of a call.

        Returns:
            `path`, the faster one; `seconds`, {path: median time of a pass}; `training`, whether backward is in it.

        Raises:
            ValueError, RuntimeError: input or hx does not fit, in the words of torch.nn.RNN; RuntimeError also as by
                `explain`.
        """
        weight = self.weight_hh_l0
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
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                seconds = timing.alternating({p: (lambda p=p: run(p)) for p in choices}, device)
        finally:
            self._path = before
        path = min(seconds, key=seconds.get)
        dtype = autocast_dtype(device.type, weight) or weight.dtype
        self._tuned[_tuning_key(device.type, dtype, self._seen[0], training, self._densities())] = path
        self._chosen, self._straight = (None, ""), None
        return Measured(path, seconds, training)


def _versions(tensors: dict[str, Tensor | None]) -> list[tuple[int, int]]:
    return [(id(t), 0 if t.is_inference() else t._version) for t in tensors.values() if t is not None]


def _tuning_key(device: str, dtype: torch.dtype, batch: int, training: bool, densities: tuple) -> tuple:
    """What counts as the same case: batch sizes and densities with the same nearest power of 2."""
    def near(value):
        return None if value is None else round(math.log2(max(value, 1e-6)))
    return device, backends.active(device), dtype, training, near(batch), *map(near, densities)
