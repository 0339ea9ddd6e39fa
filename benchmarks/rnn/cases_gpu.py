"""The cases of the RNN on a GPU, and the goals they are to reach."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..harness.goals import GpuGoal

OURS, OURS_GRAPH, VENDOR, PRODUCTS = "ours", "ours, under a CUDA graph", "torch.nn.RNN", "vendor's products"


@dataclass(frozen=True)
class RnnGpuCase:
    """One contest."""

    name: str
    n: int
    batch: int
    steps: int = 50
    inputs: int = 16
    layers: int = 1
    nonlinearity: str = "tanh"
    density: float | None = None  # the share of W_hh that is kept; None without a mask
    mask_inputs: bool = False  # whether W_ih is masked too
    side: int | None = None  # kept entries fill blocks of that side, in a random order; None: single entries
    kept: bool = False  # whether the op that walks a layout of the mask is used
    device: str = "cuda"

    def smaller(self) -> RnnGpuCase:
        """Returns the same case at a size that shows quickly whether everything works."""
        density = None if self.density is None else max(self.density, 0.2)
        return replace(self, n=min(self.n, 256), batch=min(self.batch, 24), steps=4, density=density)


RNN_GPU_CASES = (
    RnnGpuCase("rnn-128", 128, 32, inputs=128, nonlinearity="relu"),
    RnnGpuCase("rnn-650-3-layers", 650, 20, 35, inputs=650, layers=3),
    RnnGpuCase("rnn-650-3-layers-10", 650, 20, 35, inputs=650, layers=3, density=0.1, mask_inputs=True),
    *(RnnGpuCase(f"rnn-4096-{round(100 * density)}-blocks-{side}", 4096, 200, nonlinearity="relu", density=density,
                 side=side, kept=True) for density in (0.1, 0.02) for side in (32, 64)),
    RnnGpuCase("rnn-4096-2-unstructured", 4096, 20, nonlinearity="relu", density=0.02, kept=True),
)


# --- goals -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class RnnFaster(GpuGoal):
    """Ours is faster by that factor than the faster of torch.nn.RNN and the vendor's products."""

    def goal(self) -> str:
        return f">= {self.limit:g} x"

    def figure(self, run: dict[str, Any]) -> tuple[str, bool] | None:
        found = [one for one in run.get("rnn", []) if one["case"] == self.case]
        if not found:
            return None
        others = [one for one in found[0]["contestants"] if one["name"] in (VENDOR, PRODUCTS)]
        best = min(others, key=lambda one: one["ratio"][1])
        low, ratio, high = best["ratio"]
        return f"{ratio:.2f} x [{low:.2f}, {high:.2f}] ({best['name']})", ratio >= self.limit


RNN_GPU_GOALS: tuple[RnnFaster, ...] = (
    RnnFaster("rnn-128", "RNN n = 128, B = 32, dense", 2.0),
    RnnFaster("rnn-650-3-layers", "RNN n = 650, 3 layers, B = 20, T = 35, dense", 3.0),
    RnnFaster("rnn-650-3-layers-10", "RNN n = 650, 3 layers, B = 20, T = 35, 90 % masked", 4.0),
    *(RnnFaster(f"rnn-4096-{share}-blocks-{side}", f"RNN n = 4096, B = 200, {share} % of blocks of {side}",
                max(2.0, 70 / share)) for share in (10, 2) for side in (32, 64)),
    RnnFaster("rnn-4096-2-unstructured", "RNN n = 4096, B = 20, 98 % masked, unstructured", 3.0),
)
