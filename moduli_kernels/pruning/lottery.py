"""Lottery tickets: fresh or earlier weights under the masks that pruning has found (paper, section 5)."""
from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import is_sharded, shard_of
from ..masks import LOADED_UNDER_A_MASK, buffer_name
from .checkpoints import restored_on_error
from .pruner import MagnitudePruner


@torch.no_grad()
def reinitialize_(model: nn.Module, pruner: MagnitudePruner,
                  init_fn: Callable[[nn.Module], Any] | None = None,
                  generator: torch.Generator | None = None) -> None:
    """Initializes all weights anew and keeps the masks. Make a new optimizer afterwards, and a new pruner on it.

    Args:
        model: the net that contains the pruner's modules.
        pruner: the pruner whose masks stay.
        init_fn: a function that is called with the model and initializes it. With None the `reset_parameters()` of
            every submodule is called, children first, so that a parent may refine them; a frozen parameter of a module
            that has no such method stays as it is.
        generator: makes torch's draws reproducible and leaves the global generators (CPU, CUDA) as they were.

    Raises:
        ValueError: the pruner's modules are not in the model; without init_fn, some trainable parameter was not
            initialized; a generator was given for a model outside CPU and CUDA. The model is then as it was, and so it
            is where init_fn raises.
        TypeError: generator is no torch.Generator.
    """
    _mask_keys(model, pruner)
    with restored_on_error(model), _drawing_from(generator, model):
        if init_fn is None:
            _reset(model)
        else:
            init_fn(model)
        pruner.apply()


def _reset(model: nn.Module) -> None:
    """Calls every submodule's reset_parameters(); raises where a trainable parameter is left without a new value."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for _, parameter in trainable:
        parameter.fill_(math.nan)  # a parameter that no module resets is still NaN below
    for module in reversed(list(model.modules())):
        # nn.MultiheadAttention and nn.Transformer call the method _reset_parameters.
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            reset()
    stale = [name for name, p in trainable if p.isnan().any()]
    if stale:
        raise ValueError(
            f"model must set every trainable parameter in some reset_parameters(), got none that sets "
            f"{', '.join(stale)}; pass init_fn, or freeze what should stay."
        )


@torch.no_grad()
def rewind_(model: nn.Module, pruner: MagnitudePruner, state_dict: Mapping[str, Any]) -> None:
    """Loads earlier weights into the model and keeps the masks; the literature calls it rewinding.

    Args:
        model: the net that contains the pruner's modules.
        pruner: the pruner whose masks stay.
        state_dict: a copy of an earlier `model.state_dict()`. Its masks are ignored; everything else must fit exactly.

    Raises:
        ValueError: state_dict does not fit, or holds the model's own live tensors (a `state_dict()` that was not
            copied), or the pruner's modules are not in the model. The model is then as it was.
    """
    masks = _mask_keys(model, pruner)
    for key, parameter in model.named_parameters():
        earlier = state_dict.get(key)
        if isinstance(earlier, Tensor) and _same_memory(earlier, parameter):
            raise ValueError(
                f"state_dict must hold earlier weights, got the model's own live tensor at {key!r}; save "
                "copy.deepcopy(model.state_dict()) before training."
            )
    now = model.state_dict()
    merged = {key: value for key, value in state_dict.items() if key not in masks}
    merged.update((key, now[key]) for key in masks if key in now)
    with restored_on_error(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{LOADED_UNDER_A_MASK}")  # which is what rewinding means
        try:
            model.load_state_dict(merged)
        except RuntimeError as error:
            message = f"state_dict must fit the model, pass one saved from this model: {error}"
            raise ValueError(message) from error
        pruner.apply()


def _same_memory(earlier: Tensor, parameter: Tensor) -> bool:
    """Whether the two tensors start at the same address; for a sharded one, its rows on this rank are looked at."""
    # the data_ptr() of a DTensor itself is always 0
    a, b = (shard_of(t).local if is_sharded(t) else t for t in (earlier, parameter))
    return a.numel() > 0 and a.data_ptr() == b.data_ptr()


def _mask_keys(model: nn.Module, pruner: MagnitudePruner) -> set[str]:
    """Returns the keys of the pruner's masks in the model's state_dict, several for a module that is found twice."""
    paths = list(model.named_modules(remove_duplicate=False))
    keys = set()
    for weight in pruner.weights:
        for module, name in weight.owners:
            found = [path for path, m in paths if m is module]
            if not found:
                raise ValueError(
                    f"pruner must prune modules of the model, got {weight.key} of a {type(module).__name__} "
                    "that is not in it; after a deepcopy make a new MagnitudePruner on the copy."
                )
            keys.update(f"{path}.{buffer_name(name)}".removeprefix(".") for path in found)
    return keys


@contextlib.contextmanager
def _drawing_from(generator: torch.Generator | None, model: nn.Module) -> Iterator[None]:
    """Makes global draws in the `with` statement follow from `generator`; later draws go on as if there were none."""
    if generator is None:
        yield
        return
    if not isinstance(generator, torch.Generator):
        kind = type(generator).__name__
        raise TypeError(
            f"generator must be a torch.Generator, got a {kind}; pass torch.Generator().manual_seed(0)."
        )
    devices = {p.device for p in model.parameters()}
    others = {d.type for d in devices} - {"cpu", "cuda"}
    if others:
        raise ValueError(
            "generator must be None for a model outside CPU and CUDA, got one for "
            f"{', '.join(sorted(others))}; initialize the model on the CPU."
        )
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    gpus = sorted(d.index for d in devices if d.type == "cuda")
    with torch.random.fork_rng(devices=gpus, device_type="cuda"):
        # torch.manual_seed would seed other GPUs too, whose generators fork_rng does not put back.
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield
