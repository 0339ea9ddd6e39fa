"""A run's checkpoint: one safetensors file that is written whole or not at all.

The file holds the tensors and, in its header, one JSON text for everything else. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from . import files

NAME = "checkpoint.safetensors"


class Held(RuntimeError):
    """Another process is working in the folder."""


def save(folder: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Writes `folder`/checkpoint.safetensors; `info` must be JSON."""
    from safetensors.torch import save as serialize

    ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    data = serialize(ready, {"info": json.dumps(info)})
    with files.whole_file(folder / NAME) as file:
        file.write(data)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Reads (tensors on the CPU, info); None where there is no checkpoint. Raises RuntimeError for a damaged one."""
    return _read(folder, lambda file: {key: file.get_tensor(key) for key in file.keys()})


def load_info(folder: Path) -> dict[str, Any] | None:
    """Reads the info alone, from the file's header, since a full-size net's tensors take seconds to read.

    Returns None where there is no checkpoint; raises RuntimeError for a damaged one.
    """
    read = _read(folder, lambda file: {})
    return None if read is None else read[1]


def _read(folder: Path, tensors: Callable[[Any], dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    from safetensors import SafetensorError, safe_open

    path = folder / NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return tensors(file), json.loads(file.metadata()["info"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"the checkpoint {path} must be a whole safetensors file of this trainer, got a damaged one "
            f"({error}); delete the folder {folder} to train this run afresh"
        ) from error


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Makes the folder, holds it, and clears what a killed process left. Raises Held if another process has it."""
    try:
        with files.locked(folder / "lock", wait=False):
            files.clear_partial(folder / NAME)
            yield
    except files.Locked as error:
        raise Held(f"{folder} is being trained by another process; wait for it or stop it") from error


def flatten(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Puts the prefix and a dot before every key."""
    return {f"{prefix}.{key}": tensor for key, tensor in state.items()}


def select(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors whose keys have the prefix, without it: the inverse of `flatten`."""
    return {k.removeprefix(f"{prefix}."): t for k, t in tensors.items() if k.startswith(f"{prefix}.")}
