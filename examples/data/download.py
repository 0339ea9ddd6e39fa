"""Downloads: checked, cached by pooch, and gone on with where they broke off, in the same run or in the next one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

RETRIES = 3  # of a download within one run
TIMEOUT = 30  # s without a byte
CHUNK = 2**16  # bytes at a time; what had come of the last one is lost when the connection breaks


class DataError(RuntimeError):
    """Data that are missing, truncated or altered; says which file, what was expected and what came."""


def cache() -> Path:
    """The folder of what was fetched or unpacked; the system's cache folder decides where."""
    return Path(_pooch().os_cache("moduli_kernels"))


def fetch(url: str, checksum: str, path: Path) -> Path:
    """`path`, downloaded if it is not there with this checksum ("sha256:..." or "md5:..."); one process at a time.

    Raises DataError, with what had arrived kept in `<path>.partial` for the next try, unless it was wrong.
    """
    pooch = _pooch()
    pooch.get_logger().setLevel("WARNING")
    store = pooch.create(path.parent, base_url="", registry={path.name: checksum}, urls={path.name: url},
                         retry_if_failed=RETRIES)
    try:
        with lock(path):
            return Path(store.fetch(path.name, downloader=Resuming(path.with_name(f"{path.name}.partial"))))
    except (OSError, ValueError) as error:  # pooch: ValueError for a wrong checksum; requests' errors are OSErrors
        raise DataError(f"{url} ({checksum}) must be fetched to {path}, got: {error}; try again, or pass a folder that "
                        f"has the data as data") from error


@dataclass(frozen=True)
class Resuming:
    """A downloader for pooch that goes on from what an earlier try has left in `partial` (HTTP Range)."""

    partial: Path

    def __call__(self, url: str, output_file: str, pooch) -> None:
        import requests

        have = self.partial.stat().st_size if self.partial.exists() else 0
        # Compressed on the way, a part of a file could not be asked for by its bytes.
        headers = {"User-Agent": "moduli_kernels", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            begin, total = _content_range(response.headers.get("Content-Range", ""))
            if response.status_code == 416 and total == have:  # nothing was missing
                os.replace(self.partial, output_file)
                return
            if response.status_code == 416 or response.status_code == 206 and begin != have:
                self.partial.unlink()  # of another file: pooch's next try begins afresh
                raise requests.ConnectionError(f"no bytes from {have} on")
            if 400 <= response.status_code < 500:
                raise DataError(f"{url} must be there, got HTTP status {response.status_code} ({response.reason}); "
                                f"pass a folder that has the data as data")
            response.raise_for_status()
            if response.status_code != 206:
                have, total = 0, int(response.headers.get("Content-Length", 0)) or None
            with open(self.partial, "ab" if have else "wb") as file:
                got = _copy(response, file, have, total, Path(url).name)
        if total and got != total:
            raise requests.ConnectionError(f"{got} of {total} bytes")
        os.replace(self.partial, output_file)


def _copy(response, file: IO[bytes], have: int, total: int | None, name: str) -> int:
    """Bytes in the file afterwards; a progress bar where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(name, completed=have, total=total)
        for chunk in response.iter_content(CHUNK):
            file.write(chunk)
            have += len(chunk)
            progress.update(task, completed=have)
    return have


def _content_range(header: str) -> tuple[int | None, int | None]:
    """(first byte, bytes of the whole) of "bytes 5-9/10" or "bytes */10"; None what it does not say."""
    span, _, total = header.removeprefix("bytes ").partition("/")
    begin = span.partition("-")[0]
    return (int(begin) if begin.isdigit() else None, int(total) if total.isdigit() else None)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Waits until no other process fetches or unpacks `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _pooch():
    try:
        import pooch
    except ImportError as error:
        raise DataError("fetching or unpacking data needs pooch, got no such package; install it") from error
    return pooch
