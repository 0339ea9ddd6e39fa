"""Files that several processes share: written whole or not at all, and locked while somebody works on them."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

PARTIAL = ".partial"  # ends the name of a file that is not whole yet; `clear_partial` removes what a kill left


class Locked(RuntimeError):
    """Another process holds the lock."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for writing that gets the name `path` when the block ends without an error.

    Until then the old file keeps its name, so that a kill at any moment leaves the old file or the new one, never a
    half-written one. The folder is made if it is missing. An error removes the unfinished file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The unfinished file lies in the same folder, since os.replace is atomic within one file system only.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the content must be on disk before the name points to it
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


def clear_partial(path: Path) -> None:
    """Removes the unfinished versions of `path` that killed processes left. Call it with the file's lock held."""
    for partial in path.parent.glob(f"{path.name}*{PARTIAL}"):
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the lock file `path`, which is released when its process ends, however that happens.

    Args:
        wait: waits for another process that holds it; if False, raises Locked instead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        raise Locked(f"{path} is held by another process") from None
    try:
        yield
    finally:
        lock.release()
