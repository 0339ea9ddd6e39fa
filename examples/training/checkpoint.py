"""One checkpoint file, written so that a kill at any moment leaves the old or the new one, never half of one.

safetensors holds the tensors and, in its header, one JSON text for the rest; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

NAME = "checkpoint.safetensors"


class Held(RuntimeError):
    """The folder is another process's."""


def save(folder: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Writes `folder`/checkpoint.safetensors; `info` must be JSON."""
    from safetensors.torch import save as serialize

    ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    data = serialize(ready, {"info": json.dumps(info)})
    # In the same folder, since os.replace is atomic within one file system only.
    descriptor, partial = tempfile.mkstemp(dir=folder, prefix=NAME, suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # the data is on disk before the name points to it
        os.replace(partial, folder / NAME)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors on the CPU, info), or None where there is no checkpoint; RuntimeError for a damaged one."""
    return _read(folder, lambda file: {key: file.get_tensor(key) for key in file.keys()})


def load_info(folder: Path) -> dict[str, Any] | None:
    """The info alone, from the file's header: a full-size net's tensors take seconds. As `load` otherwise."""
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
    """Makes and holds the folder, clears what a killed process left; Held if another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with its process, however that ends
        except OSError as error:
            raise Held(f"{folder} is being trained by another process; wait for it or stop it") from error
        for partial in folder.glob(f"{NAME}*.partial"):
            partial.unlink(missing_ok=True)
        yield


def flatten(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": tensor for key, tensor in state.items()}


def select(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `flatten`."""
    return {k.removeprefix(f"{prefix}."): t for k, t in tensors.items() if k.startswith(f"{prefix}.")}
