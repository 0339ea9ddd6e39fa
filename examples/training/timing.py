"""How much of a training step each part takes."""

from __future__ import annotations

import time

import torch

EVERY = 20  # on a GPU, steps from one measured step to the next


class Parts:
    """A clock read between the parts of a step.

    CPU: every step counts. CUDA: one step of EVERY, by events on the current stream, so that no step waits for
    the GPU; they are read in `seconds`, which waits.
    """

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.total: dict[str, float] = {}
        self.steps = 0
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self._last = 0.0
        self._measured = True

    def begin(self) -> None:
        """A step begins."""
        self._measured = not self.cuda or self.steps % EVERY == 0
        self.steps += 1
        self._mark(None)

    def end(self, part: str) -> None:
        """`part` of the step is done; the next one begins."""
        self._mark(part)

    def _mark(self, part: str | None) -> None:
        if not self._measured:
            return
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((part or "", event))
            return
        now = time.perf_counter()
        if part is not None:
            self.total[part] = self.total.get(part, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Time of each part over all steps (on a GPU: EVERY times that of the measured ones)."""
        if self._events:
            torch.cuda.synchronize()
            for (_, before), (part, after) in zip(self._events, self._events[1:]):
                if part:
                    spent = EVERY * before.elapsed_time(after) / 1000
                    self.total[part] = self.total.get(part, 0.0) + spent
            self._events.clear()
        return dict(self.total)


def shares(seconds: dict[str, float]) -> str:
    """In words, the largest first: "backward 52 %, forward 30 %, ..."."""
    whole = sum(seconds.values())
    if whole <= 0:
        return "-"
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {100 * spent / whole:.1f} %" for name, spent in ordered)
