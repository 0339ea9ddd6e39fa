"""Rounds in which all contestants take a turn each, so that whatever else the machine does hits all of them alike."""
from __future__ import annotations

import gc
import random
import statistics
from collections import defaultdict
from typing import Any

from .measuring import cpu_seconds, quartiles, share_of_others


class Contest:
    """A case, measured. A subclass says who takes part, how they are checked and what a turn is.

    Call `verify()`, then `warm_up()`, then in each round `others()` and `ours()`, then `record()`.

    Attributes:
        SLOW, SLOW_ROUNDS: a contestant that is slower than SLOW seconds sits out after SLOW_ROUNDS rounds.
        times: name -> round -> seconds.
        round: the number of rounds so far.
    """

    SLOW = 0.25
    SLOW_ROUNDS = 5

    def __init__(self, seed: int) -> None:
        self.times: dict[str, dict[int, float]] = defaultdict(dict)
        self.round = 0
        self._cpu = cpu_seconds()
        self._shuffle = random.Random(seed)

    def names(self) -> list[str]:
        """Returns the contestants' names, ours first."""
        raise NotImplementedError

    def verify(self) -> None:
        """Checks all contestants; raises AssertionError where ours is wrong, since a wrong kernel has no speed."""
        raise NotImplementedError

    def take_turn(self, name: str) -> None:
        """Lets a contestant compute once and puts what it took into times[name][round]."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """Returns what the report reads."""
        raise NotImplementedError

    def others(self) -> None:
        """Begins a round: all but ours take a turn, in an order drawn anew, so that neighbours change."""
        self.round += 1
        turn = self.names()[1:]
        self._shuffle.shuffle(turn)
        for name in turn:
            taken = self.times[name]
            if len(taken) < self.SLOW_ROUNDS or statistics.median(taken.values()) < self.SLOW:
                self.take_turn(name)

    def ours(self) -> None:
        """Ends a round with our turn."""
        self.take_turn(self.names()[0])

    def warm_up(self, rounds: int) -> None:
        """Takes some rounds and forgets them."""
        for _ in range(rounds):
            self.others()
            self.ours()
        self.forget()

    def forget(self) -> None:
        """Forgets all rounds so far."""
        self.times.clear()
        self.round = 0
        self._cpu = cpu_seconds()

    def summary(self, name: str) -> dict[str, Any]:
        """Returns quartiles of a contestant's times in seconds, and of its time over ours in the same round."""
        taken, ours = self.times[name], self.times[self.names()[0]]
        return {"name": name, "time": quartiles(list(taken.values())),
                "ratio": quartiles([seconds / ours[r] for r, seconds in taken.items()])}

    def others_cpu(self) -> float | None:
        """Returns the share of the machine that other processes used since the warm-up."""
        return share_of_others(self._cpu)


def measure(contest: Contest, benchmark: Any, rounds: int, warm_up: int) -> dict[str, Any]:
    """Checks and times a contest and returns its record.

    pytest-benchmark clocks our turn; the turns of all others are its `setup`, which it does not clock.
    """
    contest.verify()
    contest.warm_up(warm_up)
    gc.collect()
    gc.disable()  # a collection would fall into somebody's turn
    try:
        benchmark.pedantic(contest.ours, setup=contest.others, rounds=rounds)
    finally:
        gc.enable()
    record = contest.record()
    for one in record["contestants"]:
        if one["name"] != contest.names()[0]:
            benchmark.extra_info[one["name"]] = f"{one['ratio'][1]:.2f} x our time"
    return record
