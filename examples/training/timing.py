"""Measures how much of a training step each of its parts takes."""

from __future__ import annotations

import time

import torch

EVERY = 20  # on a GPU, one step in so many is measured


class StepClock:
    """A clock that is read between the parts of a step.

    On the CPU every step is measured. On a GPU one step in EVERY is measured, by events on the current stream, so that
    no step waits for the GPU; `seconds` reads the events, and waits for them.
    """

    def __init__(self, device: str) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._total: dict[str, float] = {}
        self._steps = 0
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self._last = 0.0
        self._measured = True

    def begin(self) -> None:
        """Says that a step begins."""
        self._measured = not self._cuda or self._steps % EVERY == 0
        self._steps += 1
        self._mark(None)

    def end(self, part: str) -> None:
        """Says that this part of the step is done and the next one begins."""
        self._mark(part)

    def _mark(self, part: str | None) -> None:
        if not self._measured:
            return
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((part or "", event))
            return
        now = time.perf_counter()
        if part is not None:
            self._total[part] = self._total.get(part, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Returns each part's time over all steps; on a GPU that of the measured steps, times EVERY."""
        if self._events:
            torch.cuda.synchronize()
            for (_, before), (part, after) in zip(self._events, self._events[1:]):
                if part:
                    spent = EVERY * before.elapsed_time(after) / 1000
                    self._total[part] = self._total.get(part, 0.0) + spent
            self._events.clear()
        return dict(self._total)


def shares(seconds: dict[str, float]) -> str:
    """Puts the parts' shares into words, the largest first: "backward 52.0 %, forward 30.0 %, ..."."""
    whole = sum(seconds.values())
    if whole <= 0:
        return "-"
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {100 * spent / whole:.1f} %" for name, spent in ordered)
