"""The record of every trial: one JSON object a line, append-only, safe with several writers."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from . import files
from .config import Config, Result


class Ledger:
    """A file of trials. Lines are only ever added, so the files of several machines can be joined with `cat`.

    Of two trials with one key the first counts. A record has these fields:

        key, config      the experiment
        error            after the last epoch; None if the run collapsed
        pruned_error     after the first epoch at the last sparsity
        errors           after each epoch
        last             everything that was measured after the last epoch
        seconds, parts   time in all, and for each part of the training steps
        peak_mib         peak memory, MiB
        collapsed        how the run ended, if not well
        references       errors of simple answers to the same tests
        environment      device, versions, commit
        finished         UTC time
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int] | None = None  # size and time of the file when it was last read
        self._trials: dict[str, dict[str, Any]] = {}

    def trials(self) -> dict[str, dict[str, Any]]:
        """Returns key -> record. A torn line (a writer was killed, or the disk was full) is skipped."""
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
        """Adds the line of a run. Raises OSError as `add` does."""
        self.add(_record(config, result))

    def add(self, record: dict[str, Any]) -> None:
        """Adds a line; the record must be JSON and have a "key".

        Raises OSError where the line cannot be written whole; the lines before it stay as they are.
        """
        line = (json.dumps(record) + "\n").encode()
        with files.locked(self.path.with_name(f"{self.path.name}.lock")), open(self.path, "a+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # the last line is torn: it must not run into the new one
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
