"""What a goal on a GPU is: a case, a limit, and how a run is judged by it."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GpuGoal:
    """A line of the table: what is measured and the limit that it is to reach."""

    case: str
    label: str
    limit: float

    def goal(self) -> str:
        """Puts the goal into words."""
        raise NotImplementedError

    def figure(self, run: dict[str, Any]) -> tuple[str, bool] | None:
        """Returns (the value in words, whether it reaches the goal), or None where the run lacks it."""
        raise NotImplementedError

    def contestants(self, run: dict[str, Any]) -> list[dict]:
        """Returns the contestants of this case, ours first."""
        return next((one["contestants"] for one in run["penalty"] if one["case"] == self.case), [])
