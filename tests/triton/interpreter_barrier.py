"""The barrier between steps of the masked RNN's kernels, in Triton's interpreter. Programs are threads here, of which
one runs at a time in a random order; they change places where they arrive and where they wait. A program that went on
too early would read states that nobody has written, which are NaN here. test_interpreter_rnn.py runs this file.

It tests the protocol: who counts, what they wait for, and that all go on. Fences and caches show in the machine code
(test_machine_code_rnn.py) and on a GPU (tests/cuda/test_cuda_only_rnn.py).
"""
from __future__ import annotations

import ctypes
import inspect
import random
import threading
from collections.abc import Callable

import pytest
import triton
import triton.language as tl  # noqa: F401 - the interpreter needs it in the module of a kernel
from triton.runtime import interpreter

from moduli_kernels.reference.rnn import Step
from moduli_kernels.triton import device
from moduli_kernels.triton.device import Device
from moduli_kernels.triton.rnn import backward as rnn_backward, forward as rnn_forward, shares as shares_table
from tests.triton.interpreter_blocks import Blocked
from tests.triton.interpreter_rnn import Layer, force

builder = interpreter.interpreter_builder
pytestmark = [
    pytest.mark.usefixtures("on_triton"),
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning"),
]


class Program(threading.Thread):
    """One program of a grid. It runs while it has the turn; `ready` tells whether it can go on."""

    def __init__(self, index: tuple[int, ...], work: Callable[[], None]):
        super().__init__(daemon=True)
        self.index, self.work, self.turn, self.back = index, work, threading.Event(), threading.Event()
        self.ready: Callable[[], bool] = lambda: True
        self.error: BaseException | None = None
        self.ended = False

    def run(self) -> None:
        self._take_turn()
        try:
            self.work()
        except BaseException as error:  # noqa: BLE001 - raised again by whoever started it
            self.error = error
        self.ended = True
        self.back.set()

    def _take_turn(self) -> None:
        self.turn.wait()
        self.turn.clear()
        builder.grid_idx = self.index

    def give_turn(self, ready: Callable[[], bool] = lambda: True) -> None:
        self.ready = ready
        self.back.set()
        self._take_turn()


class Together(interpreter.GridExecutor):
    """Runs all programs of a grid at once; counts how often one had to wait."""

    draw = random.Random(0)
    waits = 0

    def __init__(self, fn, *rest):
        def collect(**arguments):
            self.indices.append(builder.grid_idx)
            if builder.grid_idx == tuple(n - 1 for n in builder.grid_dim):
                self._all(lambda: fn(**arguments))

        collect.__signature__, collect.__annotations__ = inspect.signature(fn), fn.__annotations__
        super().__init__(collect, *rest)
        self.indices: list[tuple[int, ...]] = []

    def _all(self, work: Callable[[], None]) -> None:
        programs = [Program(index, work) for index in self.indices]
        for program in programs:
            program.start()
        while left := [program for program in programs if not program.ended]:
            ready = [program for program in left if program.ready()]
            assert ready, f"{len(left)} programs wait for each other"
            program = self.draw.choice(ready)
            program.turn.set()
            program.back.wait()
            program.back.clear()
            if program.error is not None:
                raise program.error


def number_at(pointer) -> ctypes.c_int32:
    return ctypes.c_int32.from_address(int(pointer.handle.data.item()))


def wait(counter, target) -> None:
    number, target = number_at(counter), int(target)
    Together.waits += number.value < target
    threading.current_thread().give_turn(lambda: number.value >= target)


def arrive(counter) -> None:
    number_at(counter).value += 1
    threading.current_thread().give_turn()


@pytest.fixture(autouse=True)
def together(monkeypatch):
    monkeypatch.setattr(interpreter, "GridExecutor", Together)
    monkeypatch.setattr(device, "INTERPRETED", device.INTERPRETED._replace(interpreted=False))
    for module in (rnn_forward, rnn_backward):
        monkeypatch.setattr(module, "wait", wait)
        monkeypatch.setattr(module, "arrive", arrive)
    Together.draw, Together.waits = random.Random(0), 0


STEPS = [Step("tanh", 1.0, False), Step("relu", 0.5, True)]


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize(("way", "n", "strips"), [("held", 40, 3), ("streamed", 40, 2)])
def test_strips_and_parts(monkeypatch, way, n, strips, step):
    """The batch has two parts, whose programs do not wait for those of the other."""
    force(monkeypatch, way, n, 9, strips=strips)
    Layer(n, 9, 4, lengths=step.reverse).check(step)
    assert Together.waits > 0


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_blocks_and_strays(monkeypatch, step):
    monkeypatch.setattr(shares_table, "KEPT_TILE", 128)
    monkeypatch.setattr(device, "INTERPRETED", Device(9, 6, 99 * 1024))
    Blocked(40, 20, 3, threshold=20, lengths=step.reverse).check(step)
    assert Together.waits > 0


@pytest.mark.parametrize("broken", ["wait", "arrive"])
def test_a_broken_barrier_shows(monkeypatch, broken):
    """Without the wait, states are NaN; without the count, nobody goes on."""
    for module in (rnn_forward, rnn_backward):
        monkeypatch.setattr(module, broken, lambda *_: threading.current_thread().give_turn())
    force(monkeypatch, "held", 40, 9, strips=3)
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError)):
        Layer(40, 9, 4).check()
