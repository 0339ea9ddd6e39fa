"""TensorBoard logs of a run. Look at them with `tensorboard --logdir examples/runs`."""

from __future__ import annotations

from pathlib import Path


class TensorBoardLog:
    """Writes one point an epoch.

    Args:
        first: the number of epochs that are finished. Points that an interrupted run wrote beyond them are dropped.
    """

    def __init__(self, folder: Path, first: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RuntimeError(f"--logs needs TensorBoard, got {error}; install tensorboard") from error
        self._writer = SummaryWriter(str(folder), purge_step=first + 1)

    def write(self, entry: dict[str, float], parts: dict[str, float]) -> None:
        """Writes an epoch.

        Args:
            entry: the epoch's entry in Result.history.
            parts: seconds that each part of the training steps has taken so far.
        """
        for name, value in entry.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, entry["epoch"])
        whole = sum(parts.values()) or 1.0
        for name, seconds in parts.items():
            self._writer.add_scalar(f"share of a step/{name}", seconds / whole, entry["epoch"])
        self._writer.flush()
