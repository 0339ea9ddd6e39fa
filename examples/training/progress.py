"""How several nets come along, in one terminal: live bars where rich can draw them, else lines."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from .config import Config
from .report import with_unit

LABELS = ("loss", "error", "sparsity", "left")
MANY = 12  # nets, from which on ended ones make room
LINE_SECONDS, LINE_SECONDS_OF_MANY = 5.0, 30.0  # between plain lines of a net


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _texts(config: Config, p: dict[str, Any]) -> dict[str, str]:
    error = "-" if p["error"] is None else with_unit(config.task, p["error"])
    return {"loss": f"{p['loss']:.4f}", "error": error, "sparsity": f"{100 * p['sparsity']:.0f} %",
            "left": _clock(p["left"])}


def _names(configs: list[Config]) -> dict[str, str]:
    def name(c: Config) -> str:
        return f"{c.net}{' lottery' if c.lottery else ''} {100 * c.schedule[-1]:g} % seed {c.seed}"

    width = max((len(name(c)) for c in configs), default=0)
    return {c.key: name(c).ljust(width) for c in configs}


class _Lines:
    def __init__(self, configs: list[Config]) -> None:
        self.names, self.begun, self.ended = _names(configs), time.monotonic(), 0
        self.seconds = LINE_SECONDS if len(configs) <= MANY else LINE_SECONDS_OF_MANY
        self.last: dict[str, float] = {}

    def __call__(self, config: Config, p: dict[str, Any]) -> None:
        now, key = time.monotonic(), config.key
        if now - self.last.get(key, -self.seconds) >= self.seconds or p["step"] == p["steps"]:
            self.last[key] = now
            t = _texts(config, p)
            done = f"{self.names[key]}  {100 * p['step'] / p['steps']:3.0f} %"
            print(f"{done}  " + "  ".join(f"{label} {t[label]}" for label in LABELS), flush=True)

    def end(self, config: Config) -> None:
        self.ended += 1
        whole = len(self.names)
        if whole > MANY:
            left = (time.monotonic() - self.begun) * (whole - self.ended) / self.ended
            print(f"{self.ended} of {whole} nets, {_clock(left)} left", flush=True)


class _Bars:
    def __init__(self, configs: list[Config], progress: Any) -> None:
        self.names, self.progress, self.bars = _names(configs), progress, {}
        self.begun, self.ended = time.monotonic(), 0
        self.whole = None
        if len(configs) > MANY:
            self.whole = progress.add_task("all nets", total=len(configs), **dict.fromkeys(LABELS, "-"))
        else:
            for config in configs:
                self._bar(config, start=False)

    def _bar(self, config: Config, *, start: bool = True) -> Any:
        key = config.key
        if key not in self.bars:
            blank = dict.fromkeys(LABELS, "-")
            self.bars[key] = self.progress.add_task(self.names[key], total=None, start=start, **blank)
        return self.bars[key]

    def __call__(self, config: Config, p: dict[str, Any]) -> None:
        bar = self._bar(config)
        self.progress.start_task(bar)
        self.progress.update(bar, total=p["steps"], completed=p["step"], **_texts(config, p))

    def end(self, config: Config) -> None:
        self.ended += 1
        if self.whole is not None:
            left = (time.monotonic() - self.begun) * (len(self.names) - self.ended) / self.ended
            self.progress.update(self.whole, completed=self.ended, left=_clock(left))
            if config.key in self.bars:
                self.progress.remove_task(self.bars.pop(config.key))


@contextlib.contextmanager
def display(configs: list[Config]) -> Iterator[Any]:
    """Gives show(config, progress) and show.end(config)."""
    try:
        from rich.progress import BarColumn, Progress, TextColumn
    except ImportError:
        Progress = None
    if Progress is None or not sys.stdout.isatty():
        yield _Lines(configs)
        return
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=None)]
    columns += [TextColumn(f"[dim]{label}[/] {{task.fields[{label}]}}") for label in LABELS]
    with Progress(*columns, expand=True) as progress:
        yield _Bars(configs, progress)
