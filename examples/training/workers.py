"""Trains several nets at once, each in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from . import checkpoint
from .config import Config, Result, finished
from .progress import Display
from .trainer import REPORT_SECONDS, Run

NETS_A_GPU = 2  # at once
BUSY_SECONDS = 5.0  # before another look at runs that other processes hold
SPAWN = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def places(device: str, jobs: int | None = None) -> list[int | None]:
    """Returns where nets are trained at the same time: None stands for a core, a number for that GPU.

    Args:
        jobs: how many places; by default one for each core, or NETS_A_GPU for each GPU.
    """
    if device == "cpu":
        return [None] * (jobs or cores())
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(f"device must be cpu here, got {device}: torch finds no CUDA GPU")
    gpus = list(range(max(1, torch.cuda.device_count())))
    jobs = jobs or min(NETS_A_GPU * len(gpus), cores())
    return [gpus[i % len(gpus)] for i in range(jobs)]


def train_all(configs: list[Config], root: Path, *, logs: bool = False) -> list[Result]:
    """Trains the runs and returns their results, in order.

    Ctrl-C stops all processes at once and raises KeyboardInterrupt here; what they had saved stays. Raises RuntimeError
    if a run failed or is being trained by another process; the others are trained all the same.

    Args:
        logs: writes TensorBoard logs into each run's folder.
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
    """Yields (key, result) of each run as it ends. No two configurations may have the same key.

    A lottery run begins when its antecedent has ended. A run that another process holds is left to that process.
    Raises RuntimeError at the end if some runs failed. Two that fail with the same words end the training at once,
    since the others would fail as well.

    Args:
        jobs: how many runs at once, see `places`.
        recorded: returns the keys that need no training any more; it is asked before runs are started.
        patient: looks again at a run that another process holds, until it is recorded or free.
        logs: writes TensorBoard logs into each run's folder.
    """
    kept = [(config.key, finished(config, config.folder(root))) for config in configs]
    ended = {key for key, result in kept if result is not None}
    yield from ((key, result) for key, result in kept if result is not None)
    waiting = [config for config in configs if config.key not in ended]
    needs = {config.key: config.antecedent().key for config in waiting if config.lottery}
    free = places(configs[0].device, jobs) if configs else []
    running: dict[Future, _Net] = {}
    failures: dict[str, str] = {}  # key -> what went wrong
    look_again = 0.0
    strangers = set(multiprocessing.active_children())  # processes that are not ours
    try:
        with _terminated_as_interrupted(), Display(waiting) as display:
            while waiting or running:
                # A net that has ended is heard first: its failure may show that the others would fail as well.
                heard = not any(future.done() for future in running)
                if free and waiting and heard and time.monotonic() >= look_again:
                    known = recorded()
                    waiting = [config for config in waiting if config.key not in known]
                    unfinished = {c.key for c in waiting} | {net.config.key for net in running.values()}
                    ready = [c for c in waiting if needs.get(c.key) not in unfinished]
                    for config, place in zip(ready, list(free)):
                        waiting.remove(config)
                        free.remove(place)
                        net = _start(config, root, place, logs)
                        running[net.future] = net
                if not running:
                    time.sleep(max(0.0, look_again - time.monotonic()))
                done = wait(running, REPORT_SECONDS, FIRST_COMPLETED).done
                for net in running.values():
                    for progress in net.reports():
                        display.show(net.config, progress)
                for future in done:
                    net = running.pop(future)
                    net.executor.shutdown()
                    free.append(net.place)
                    display.end(net.config)
                    error = future.exception()
                    if error is None:
                        yield net.config.key, future.result()
                    elif not isinstance(error, checkpoint.Held):
                        failures[net.config.key] = _in_words(error)
                        if list(failures.values()).count(failures[net.config.key]) > 1:
                            waiting.clear()
                    elif patient:
                        waiting.append(net.config)
                        look_again = time.monotonic() + BUSY_SECONDS
    finally:
        for process in set(multiprocessing.active_children()) - strangers:
            process.terminate()
        for net in running.values():
            net.executor.shutdown()
    if failures:
        same = {text: [c for c in configs if failures.get(c.key) == text] for text in failures.values()}
        raise RuntimeError("; ".join(
            f"{of[0].net}, seed {of[0].seed}{f' and {len(of) - 1} more' if len(of) > 1 else ''}: {text}"
            for text, of in same.items()))


@dataclass
class _Net:
    """A net in training. It has an executor of its own, so that a process that dies takes no other net with it."""

    config: Config
    place: int | None
    executor: ProcessPoolExecutor
    future: Future
    pipe: Connection

    def reports(self) -> Iterator[dict[str, Any]]:
        """Yields what Run.train has reported since the last call."""
        with contextlib.suppress(EOFError):
            while self.pipe.poll():
                yield self.pipe.recv()


def _start(config: Config, root: Path, place: int | None, logs: bool) -> _Net:
    receiver, sender = SPAWN.Pipe(duplex=False)
    executor = ProcessPoolExecutor(1, mp_context=SPAWN, initializer=_prepare, initargs=(place, sender))
    # The process inherits that SIGINT is ignored: Ctrl-C then reaches the parent alone, which ends its children.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        future = executor.submit(_train, config, root, logs)
    finally:
        signal.signal(signal.SIGINT, before)
    sender.close()  # this process only receives
    return _Net(config, place, executor, future, receiver)


def _in_words(error: BaseException) -> str:
    """Says what became of a net that failed; shows the traceback of an error that does not speak for itself."""
    if isinstance(error, BrokenProcessPool):
        return "its process was killed or crashed"
    if not isinstance(error, (RuntimeError, OSError)):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


# -- in the process of a net --


def _prepare(place: int | None, sender: Connection) -> None:
    global _sender
    _sender = sender
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if place is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(place)  # CUDA reads it at its first use


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # nobody waits for the rest


def _train(config: Config, root: Path, logs: bool) -> Result:
    """Trains a run; a lottery run's antecedent first."""
    for each in (config.antecedent(), config) if config.lottery else (config,):
        folder = each.folder(root)
        with checkpoint.only_writer(folder):
            result = Run(each, folder, logs=logs).train(_sender.send)
        if result.collapsed and each is not config:
            return Result(collapsed=f"its antecedent: {result.collapsed}", environment=result.environment)
    return result


def _visible(place: int) -> str:
    """Returns the name of the GPU that is number `place` here."""
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return names[place] if place < len(names) else str(place)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Lets `kill` stop the children too, as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
