"""The record of every trial: one JSON object a line, append-only, safe with several writers."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from .config import Config, Result


class Ledger:
    """A file of trials. Lines are only ever added, so files of several machines are put together with `cat`; of two
    trials with one key the first counts.

    A record: key, config, error (after the last epoch; None: collapsed), pruned_error (after the first epoch at the
    last sparsity), errors (of each epoch), last (all that was measured after the last epoch), seconds, parts,
    peak_mib, collapsed, references, environment (device, versions, commit), finished (UTC).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int] | None = None
        self._trials: dict[str, dict[str, Any]] = {}

    def trials(self) -> dict[str, dict[str, Any]]:
        """Key -> record. A torn line (a writer was killed, a disk full) counts as none."""
        if not self.path.exists():
            return {}
        stat = self.path.stat()
        if self._seen != (stat.st_size, stat.st_mtime_ns):
            found: dict[str, dict[str, Any]] = {}
            for line in self.path.read_text().splitlines():
                try:
                    trial = json.loads(line)
                    found.setdefault(trial["key"], trial)
                except (ValueError, KeyError, TypeError):
                    continue
            self._seen, self._trials = (stat.st_size, stat.st_mtime_ns), found
        return self._trials

    def append(self, config: Config, result: Result) -> None:
        """OSError where the line cannot be written whole; the lines before it stay as they are."""
        line = (json.dumps(_record(config, result)) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # a torn line stays one line
                    line = b"\n" + line
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), end)
                raise


def _record(config: Config, result: Result) -> dict[str, Any]:
    history = result.history
    errors = [float(f"{entry['error']:.6g}") for entry in history]
    whole = len(history) == len(config.schedule) and not result.collapsed
    return {
        "key": config.key, "config": config.described(), "error": errors[-1] if whole else None,
        "pruned_error": errors[config.pruned_at()] if whole else None, "errors": errors,
        "last": history[-1] if history else None,
        "seconds": round(result.seconds, 1), "parts": {name: round(s, 1) for name, s in result.parts.items()},
        "peak_mib": round(result.peak_mib), "collapsed": result.collapsed, "references": result.references,
        "environment": result.environment, "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
