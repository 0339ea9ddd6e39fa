"""Shows how several nets come along: live bars in a terminal, else a line a net from time to time."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from .config import Config, task_class

LABELS = ("loss", "error", "sparsity", "left")
MANY = 12  # above so many nets, one bar counts them all, and a net's own bar goes when the net has ended
LINE_SECONDS, LINE_SECONDS_OF_MANY = 5.0, 30.0  # between two lines of a net


class Display:
    """Use it in a `with` block: `show` reports on a net, `end` says that its training has ended."""

    def __init__(self, configs: list[Config]) -> None:
        self._names = _names(configs)
        self._many = len(configs) > MANY
        self._live = sys.stdout.isatty()
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=None)]
        columns += [TextColumn(f"[dim]{label}[/] {{task.fields[{label}]}}") for label in LABELS]
        self._progress = Progress(*columns, expand=True, disable=not self._live)
        self._bars: dict[str, TaskID] = {}
        self._last_line: dict[str, float] = {}  # when a net's last line was printed
        self._begun, self._ended = time.monotonic(), 0
        if self._many:
            self._whole = self._add("all nets", total=len(configs))
        else:
            for config in configs:
                self._bars[config.key] = self._add(self._names[config.key], start=False)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, config: Config, progress: dict[str, Any]) -> None:
        """Shows what Run.train reports on a net."""
        key, texts = config.key, _texts(config, progress)
        if key not in self._bars:
            self._bars[key] = self._add(self._names[key])
        self._progress.start_task(self._bars[key])
        self._progress.update(self._bars[key], total=progress["steps"], completed=progress["step"], **texts)
        if not self._live:
            self._line(key, progress, texts)

    def end(self, config: Config) -> None:
        """Counts a net as ended."""
        self._ended += 1
        if not self._many:
            return
        whole = len(self._names)
        left = _clock((time.monotonic() - self._begun) * (whole - self._ended) / self._ended)
        self._progress.update(self._whole, completed=self._ended, left=left)
        if config.key in self._bars:
            self._progress.remove_task(self._bars.pop(config.key))
        if not self._live:
            print(f"{self._ended} of {whole} nets, {left} left", flush=True)

    def _add(self, name: str, total: int | None = None, start: bool = True) -> TaskID:
        return self._progress.add_task(name, total=total, start=start, **dict.fromkeys(LABELS, "-"))

    def _line(self, key: str, progress: dict[str, Any], texts: dict[str, str]) -> None:
        now, pause = time.monotonic(), LINE_SECONDS_OF_MANY if self._many else LINE_SECONDS
        if now - self._last_line.get(key, -pause) >= pause or progress["step"] == progress["steps"]:
            self._last_line[key] = now
            done = f"{self._names[key]}  {100 * progress['step'] / progress['steps']:3.0f} %"
            print(f"{done}  " + "  ".join(f"{label} {texts[label]}" for label in LABELS), flush=True)


def _names(configs: list[Config]) -> dict[str, str]:
    """Returns a name of the same width for each net."""
    def name(c: Config) -> str:
        return f"{c.net}{' lottery' if c.lottery else ''} {100 * c.schedule[-1]:g} % seed {c.seed}"

    width = max((len(name(c)) for c in configs), default=0)
    return {c.key: name(c).ljust(width) for c in configs}


def _texts(config: Config, progress: dict[str, Any]) -> dict[str, str]:
    error = progress["error"]
    return {"loss": f"{progress['loss']:.4f}",
            "error": "-" if error is None else task_class(config.task).with_unit(error),
            "sparsity": f"{100 * progress['sparsity']:.0f} %", "left": _clock(progress["left"])}


def _clock(seconds: float) -> str:
    """Writes a time as 4:05 or 1:04:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
