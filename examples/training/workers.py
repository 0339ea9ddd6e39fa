"""Trains several nets at once, a process each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from . import checkpoint
from .config import Config, Result, finished
from .progress import display
from .trainer import Run

NETS_A_GPU = 2  # at once
BUSY_SECONDS = 5.0  # before another look at runs that other processes hold


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def places(device: str, jobs: int | None = None) -> list[int | None]:
    """Where processes run: None for a core, else a GPU's number; jobs: how many in all, by default one a core, or
    NETS_A_GPU a GPU."""
    if device == "cpu":
        return [None] * (jobs or cores())
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(f"device must be cpu here, got {device}: torch finds no CUDA GPU")
    gpus = list(range(max(1, torch.cuda.device_count())))
    jobs = jobs or min(NETS_A_GPU * len(gpus), cores())
    return [gpus[i % len(gpus)] for i in range(jobs)]


def train_all(configs: list[Config], root: Path, *, logs: bool = False) -> list[Result]:
    """The results of all runs, in order. logs: of TensorBoard, in each run's folder.

    Ctrl-C stops all processes at once and raises KeyboardInterrupt here; what they had saved stays.
    RuntimeError if one failed, or is being trained by another process; the others are trained all the same.
    """
    results = dict(train_each(configs, root, logs=logs))
    busy = [config for config in configs if config.key not in results]
    if busy:
        names = ", ".join(f"{c.net}, seed {c.seed}" for c in busy)
        raise RuntimeError(f"{names}: being trained by another process; wait for it or stop it")
    return [results[config.key] for config in configs]


def train_each(
    configs: list[Config], root: Path, *, jobs: int | None = None, recorded: Callable[[], set[str]] = set,
    patient: bool = False, logs: bool = False,
) -> Iterator[tuple[str, Result]]:
    """(key, result) of each run as it ends; every configuration's key occurs once in `configs`.

    A lottery run begins when its antecedent has ended. recorded: keys that need no training any more, asked before
    each start. A run that another process holds is left to it; patient: looked at again until it is recorded or free.
    RuntimeError at the end if some failed; two that fail with the same words end it: no other would do better.
    """
    keys = [config.key for config in configs]
    kept = [(key, finished(config, config.folder(root))) for key, config in zip(keys, configs)]
    ended = {key for key, result in kept if result is not None}
    yield from ((key, result) for key, result in kept if result is not None)
    waiting = [config for key, config in zip(keys, configs) if key not in ended]
    needs = {config.key: config.antecedent().key for config in waiting if config.lottery}
    free = places(configs[0].device, jobs) if configs else []
    running: dict[Connection, tuple[Config, multiprocessing.Process, int | None]] = {}
    failures: dict[str, str] = {}
    look_again = 0.0
    try:
        with _terminated_as_interrupted(), display(waiting) as show:
            while waiting or running:
                if free and waiting and time.monotonic() >= look_again:
                    known = recorded()
                    for config in [c for c in waiting if c.key in known]:
                        waiting.remove(config)
                        show.end(config)
                    unfinished = {c.key for c in waiting} | {c.key for c, *_ in running.values()}
                    ready = [c for c in waiting if needs.get(c.key) not in unfinished]
                    for config, place in zip(ready, list(free)):
                        waiting.remove(config)
                        free.remove(place)
                        pipe, process = _start(config, root, place, logs)
                        running[pipe] = config, process, place
                for pipe in wait(list(running), timeout=BUSY_SECONDS) if running else ():
                    config, process, place = running[pipe]
                    try:
                        kind, content = pipe.recv()
                    except EOFError:
                        process.join()
                        del running[pipe]
                        free.append(place)
                        show.end(config)
                        if config.key not in ended and config not in waiting:
                            failures.setdefault(config.key, f"process ended with exit code {process.exitcode}")
                            if list(failures.values()).count(failures[config.key]) > 1:
                                waiting.clear()
                        continue
                    if kind == "progress":
                        show(config, content)
                    elif kind == "result":
                        ended.add(config.key)
                        yield config.key, content
                    elif kind == "busy" and patient:
                        waiting.append(config)
                        look_again = time.monotonic() + BUSY_SECONDS
                    elif kind == "busy":
                        ended.add(config.key)  # as far as this process goes
                    else:
                        failures[config.key] = content
                if not running and waiting:
                    time.sleep(max(0.0, look_again - time.monotonic()))
    finally:
        _stop([process for _, process, _ in running.values()])
    if failures:
        told = {text: [c for c in configs if failures.get(c.key) == text] for text in failures.values()}
        raise RuntimeError("; ".join(
            f"{of[0].net}, seed {of[0].seed}{f' and {len(of) - 1} more' if len(of) > 1 else ''}: {text}"
            for text, of in told.items()))


def _start(config: Config, root: Path, place: int | None, logs: bool) -> tuple[Connection, multiprocessing.Process]:
    context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(config, root, place, logs, sender), name=config.net, daemon=True)
    # A child inherits that SIGINT is ignored: Ctrl-C reaches the parent alone, which ends its children.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    sender.close()  # else the pipe never ends when the child does
    return receiver, process


def _work(config: Config, root: Path, place: int | None, logs: bool, sender: Connection) -> None:
    if place is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(place)  # read when CUDA starts, at the first use of it
    try:
        for each in (config.antecedent(), config) if config.lottery else (config,):
            folder = each.folder(root)
            with checkpoint.only_writer(folder):
                result = Run(each, folder, logs=logs).train(lambda progress: sender.send(("progress", progress)))
            if result.collapsed and each is not config:
                result = Result(collapsed=f"its antecedent: {result.collapsed}", environment=result.environment)
                break
        sender.send(("result", result))
    except checkpoint.Held:
        sender.send(("busy", None))
    except BrokenPipeError:  # the parent is gone: nobody waits for the rest
        os._exit(1)
    except Exception as error:
        if not isinstance(error, (RuntimeError, OSError)):  # those say plainly what is wrong
            traceback.print_exc()
        sender.send(("failure", f"{type(error).__name__}: {error}"))


def _visible(place: int) -> str:
    """The name of the GPU that is number `place` here."""
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return names[place] if place < len(names) else str(place)


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
