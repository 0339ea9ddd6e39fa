"""Trains several nets at once, a process each, and shows how they come along in one terminal."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from . import checkpoint
from .config import Config, Result, finished
from .report import with_unit
from .trainer import Run

LINE_SECONDS = 5.0  # between plain progress lines of a net


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train_all(configs: list[Config], root: Path) -> list[Result]:
    """The results of all runs, in order; as many processes at once as there are cores (on a GPU at most 2).

    Ctrl-C stops all processes at once and raises KeyboardInterrupt here; what they had saved stays.
    RuntimeError if one failed; the others are trained all the same.
    """
    at_once = cores() if configs[0].device == "cpu" else min(2, cores())
    kept = {index: finished(config, config.folder(root)) for index, config in enumerate(configs)}
    results = {index: result for index, result in kept.items() if result is not None}
    waiting = [(index, config) for index, config in enumerate(configs) if index not in results]
    running: dict[Connection, tuple[int, multiprocessing.Process]] = {}
    failures: dict[int, str] = {}
    try:
        with _terminated_as_interrupted(), _display(dict(waiting)) as show:
            while waiting or running:
                while waiting and len(running) < at_once:
                    index, config = waiting.pop(0)
                    pipe, process = _start(config, root)
                    running[pipe] = index, process
                for pipe in wait(list(running)):
                    index, process = running[pipe]
                    try:
                        kind, content = pipe.recv()
                    except EOFError:
                        process.join()
                        del running[pipe]
                        if index not in results:
                            failures.setdefault(index, f"process ended with exit code {process.exitcode}")
                        continue
                    if kind == "progress":
                        show(index, content)
                    elif kind == "result":
                        results[index] = content
                    else:
                        failures[index] = content
    finally:
        _stop([process for _, process in running.values()])
    if failures:
        named = (f"{configs[i].net}, seed {configs[i].seed}: {text}" for i, text in failures.items())
        raise RuntimeError("; ".join(named))
    return [results[index] for index in range(len(configs))]


def _start(config: Config, root: Path) -> tuple[Connection, multiprocessing.Process]:
    context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(config, root, sender), name=config.net, daemon=True)
    # A child inherits that SIGINT is ignored: Ctrl-C reaches the parent alone, which ends its children.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    sender.close()  # else the pipe never ends when the child does
    return receiver, process


def _work(config: Config, root: Path, sender: Connection) -> None:
    try:
        folder = config.folder(root)
        with checkpoint.only_writer(folder):
            result = Run(config, folder).train(lambda progress: sender.send(("progress", progress)))
        sender.send(("result", result))
    except BrokenPipeError:  # the parent is gone: nobody waits for the rest
        os._exit(1)
    except Exception as error:
        if not isinstance(error, RuntimeError):  # those say plainly what is wrong
            traceback.print_exc()
        sender.send(("failure", f"{type(error).__name__}: {error}"))


def _stop(processes: list[multiprocessing.Process]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(2)
        if process.is_alive():
            process.kill()
            process.join()


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """`kill` then stops the children too, as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -- progress --

LABELS = ("loss", "error", "sparsity", "left")


def _texts(config: Config, p: dict[str, Any]) -> dict[str, str]:
    error = "-" if p["error"] is None else with_unit(config.task, p["error"])
    minutes, seconds = divmod(round(p["left"]), 60)
    return {
        "loss": f"{p['loss']:.4f}", "error": error, "sparsity": f"{100 * p['sparsity']:.0f} %",
        "left": f"{minutes}:{seconds:02d}",
    }


@contextlib.contextmanager
def _display(configs: dict[int, Config]) -> Iterator[Any]:
    """Gives show(index, progress): live bars in a terminal that rich can draw in, else lines."""
    names = {index: f"{config.net} seed {config.seed}" for index, config in configs.items()}
    width = max(map(len, names.values()), default=0)
    names = {index: name.ljust(width) for index, name in names.items()}
    try:
        from rich.progress import BarColumn, Progress, TextColumn
    except ImportError:
        Progress = None
    if Progress is not None and sys.stdout.isatty():
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=None)]
        for label in LABELS:
            columns.append(TextColumn(f"[dim]{label}[/] {{task.fields[{label}]}}"))
        with Progress(*columns, expand=True) as progress:
            blank = dict.fromkeys(LABELS, "-")
            bars = {
                index: progress.add_task(name, total=None, start=False, **blank) for index, name in names.items()
            }

            def show(index: int, p: dict[str, Any]) -> None:
                progress.start_task(bars[index])
                texts = _texts(configs[index], p)
                progress.update(bars[index], total=p["steps"], completed=p["step"], **texts)

            yield show
    else:
        last = dict.fromkeys(configs, -LINE_SECONDS)

        def show(index: int, p: dict[str, Any]) -> None:
            now = time.monotonic()
            if now - last[index] >= LINE_SECONDS or p["step"] == p["steps"]:
                last[index] = now
                t = _texts(configs[index], p)
                done = f"{names[index]}  {100 * p['step'] / p['steps']:3.0f} %"
                state = "  ".join(f"{label} {t[label]}" for label in LABELS)
                print(f"{done}  {state}", flush=True)

        yield show
