"""Downloads files, checks them and caches them with pooch. A broken download goes on where it stopped."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..training import files

RETRIES = 3  # tries of a download within one run, after the first
TIMEOUT = 30  # seconds without a byte
CHUNK = 2**16  # bytes read at a time; an incomplete one is lost when the connection breaks


class DataError(RuntimeError):
    """Data are missing, truncated or altered. The message says which file, what was expected and what came."""


def cache() -> Path:
    """Returns the folder for what was fetched or unpacked, inside the user's cache folder."""
    return Path(_pooch().os_cache("moduli_kernels"))


def fetch(url: str, checksum: str, path: Path) -> Path:
    """Returns `path`, after downloading it if no file with this checksum is there. One process at a time does so.

    Raises DataError where that fails. What had arrived is kept in `<path>.partial` for the next try, unless it was
    wrong.

    Args:
        checksum: "sha256:..." or "md5:...".
    """
    pooch = _pooch()
    pooch.get_logger().setLevel("WARNING")
    store = pooch.create(path.parent, base_url="", registry={path.name: checksum}, urls={path.name: url},
                         retry_if_failed=RETRIES)
    try:
        with locked(path):
            return Path(store.fetch(path.name, downloader=Resuming(path.with_name(f"{path.name}.partial"))))
    except (OSError, ValueError) as error:  # ValueError: pooch, of a wrong checksum; OSError: requests too
        raise DataError(f"{url} ({checksum}) must be fetched to {path}, got: {error}; try again, or pass a folder that "
                        f"has the data as data") from error


@dataclass(frozen=True)
class Resuming:
    """A downloader for pooch that goes on from what an earlier try has left in `partial`, by HTTP Range."""

    partial: Path

    def __call__(self, url: str, output_file: str, pooch) -> None:
        import requests

        have = self.partial.stat().st_size if self.partial.exists() else 0
        # "identity": of a file that is compressed on the way, a part could not be asked for by its bytes.
        headers = {"User-Agent": "moduli_kernels", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            begin, total = _content_range(response.headers.get("Content-Range", ""))
            if response.status_code == 416 and total == have:  # nothing was missing
                os.replace(self.partial, output_file)
                return
            if response.status_code == 416 or response.status_code == 206 and begin != have:
                self.partial.unlink()  # it was another file's: pooch's next try begins afresh
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
    """Copies the response into the file and returns the bytes in it. Shows a bar where stderr is a terminal."""
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
    """Returns (first byte, bytes of the whole) of "bytes 5-9/10" or "bytes */10", None for what it does not say."""
    span, _, total = header.removeprefix("bytes ").partition("/")
    begin = span.partition("-")[0]
    return (int(begin) if begin.isdigit() else None, int(total) if total.isdigit() else None)


def locked(path: Path) -> contextlib.AbstractContextManager[None]:
    """Waits until no other process fetches or unpacks `path`, and holds it."""
    return files.locked(path.with_name(f"{path.name}.lock"))


def _pooch():
    try:
        import pooch
    except ImportError as error:
        raise DataError("fetching or unpacking data needs pooch, got no such package; install it") from error
    return pooch
