"""The cases of the penalty on a GPU, and the goals they are to reach."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..harness.goals import GpuGoal
from .cases import ACCURACY_GOALS, MEMORY_GOAL, Case

# dW of a 16-bit weight is rounded once; in float16 the gradient of a mean lies below the normal numbers.
ACCURACY_16_BIT = {torch.bfloat16: ACCURACY_GOALS | {"weight": 4e-3},
                   torch.float16: ACCURACY_GOALS | {"weight": 1.5e-2}}
KEPT = 0.02  # the share of the entries that the masked case keeps
LAYERS, LAYER = 3, 128  # the small net has so many recurrent weights of so many neurons


@dataclass(frozen=True)
class GpuCase(Case):
    """A case on a GPU."""

    dtype: torch.dtype = torch.float32
    kept: float | None = None  # the share of entries that a mask keeps; None without a mask
    device: str = "cuda"

    @property
    def stacked(self) -> bool:
        return self.peers == "all"

    @property
    def accuracy(self) -> dict[str, float]:
        return ACCURACY_16_BIT.get(self.dtype, ACCURACY_GOALS)

    def inputs(self) -> tuple[Tensor, Tensor]:
        weight, points = super().inputs()
        if self.kept is not None:
            weight = weight * self.mask(torch.device("cpu"))
        return weight.to(self.device, self.dtype), points.to(self.device)

    def mask(self, device: torch.device) -> Tensor:
        """Draws the mask, (n, n) bool, True = kept."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return (torch.rand(self.n, self.n, generator=generator) < self.kept).to(device)

    def rounds(self, quick: bool) -> int:
        return 3 if quick else 60


def _torus(n: int, trained: bool, suffix: str = "", **options) -> GpuCase:
    return GpuCase(f"torus-dog-{n}-{'trained' if trained else 'frozen'}{suffix}", "torus", "dog", n, trained, **options)


MASKED = _torus(4096, True, "-masked", peers="none", kept=KEPT)
# The most important cases come first, since a run that is out of time leaves out the last ones.
GPU_CASES: tuple[GpuCase, ...] = (
    _torus(8192, False, peers="none"),
    _torus(8192, True, peers="none"),
    _torus(4096, False, peers="all"),
    _torus(4096, True, peers="all"),
    *(GpuCase(f"{m}-dog-4096-trained", m, "dog", 4096, True) for m in ("sphere", "torus6", "klein")),
    MASKED,
    dataclasses.replace(MASKED, name="torus-dog-4096-frozen-masked", trained=False),
    _torus(4096, False, "-scaled", peers="fast", grad_output=0.5),
    _torus(4096, True, "-scaled", peers="fast", grad_output=0.5),
    *(_torus(4096, trained, f"-{name}", peers="formula", dtype=dtype)
      for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")) for trained in (True, False)),
    _torus(4096, True, "-value", peers="formula", gradients=False),
    *(_torus(n, trained, peers="fast") for n in (2048, 1024, 512, 16384) for trained in (True, False)),
)
MEMORY_CASES = [case for case in GPU_CASES if case.n == 4096 and case.kept is None and case.gradients]


# --- goals -----------------------------------------------------------------------------------------------------

COPY = "copy into a buffer"
MASKED_INTO, MASKED_VALUES = "masked, into .grad", "masked, compressed values"
GRAPH = "ours, under a CUDA graph"


@dataclass(frozen=True)
class Share(GpuGoal):
    """The share of the copy's bandwidth in the same run; both count one read and one write of n x n."""

    def goal(self) -> str:
        return f">= {100 * self.limit:.0f} % of the copy"

    def figure(self, run):
        copy = [one for one in self.contestants(run) if one["name"] == COPY]
        if not copy:
            return None
        low, share, high = copy[0]["ratio"]
        return f"{100 * share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]", share >= self.limit


@dataclass(frozen=True)
class Faster(GpuGoal):
    """Ours is faster by that factor than the fastest contestant of `against`, which is a kind or a name."""

    against: str

    def goal(self) -> str:
        return f">= {self.limit:g} x"

    def figure(self, run):
        found = [one for one in self.contestants(run) if self.against in (one["kind"], one["name"])]
        if not found:
            return None
        best = min(found, key=lambda one: one["ratio"][1])
        low, ratio, high = best["ratio"]
        return f"{ratio:.2f} x [{low:.2f}, {high:.2f}] ({best['name']})", ratio >= self.limit


@dataclass(frozen=True)
class FasterThanDense(GpuGoal):
    """`subject`, which works on a masked weight, is faster by that factor than the dense kernel `ours`."""

    subject: str

    def goal(self) -> str:
        return f">= {self.limit:g} x"

    def figure(self, run):
        found = [one for one in self.contestants(run) if one["name"] == self.subject]
        if not found:
            return None
        low, ratio, high = (1 / r for r in reversed(found[0]["ratio"]))
        return f"{ratio:.2f} x [{low:.2f}, {high:.2f}]", ratio >= self.limit


@dataclass(frozen=True)
class Seconds(GpuGoal):
    """Ours takes at most so many seconds under a CUDA graph."""

    def goal(self) -> str:
        return f"<= {1e6 * self.limit:g} us"

    def figure(self, run):
        ours = [one for one in self.contestants(run) if one["name"] == GRAPH]
        if not ours:
            return None
        low, seconds, high = (1e6 * t for t in ours[0]["time"])
        return f"{seconds:.1f} us [{low:.1f}, {high:.1f}]", seconds <= 1e6 * self.limit


@dataclass(frozen=True)
class Memory(GpuGoal):
    """Ours needs less memory beyond W and its gradients than that share of W for each column of a point."""

    def goal(self) -> str:
        return f"< {100 * self.limit:g} % x columns of a point, of W"

    def figure(self, run):
        found = [one for one in run["memory"] if one["case"] == self.case]
        if not found:
            return None
        share = found[0]["beyond"] / found[0]["weight"]
        return f"{100 * share:.2f} % of W", share < self.limit * found[0]["columns"]


GPU_GOALS: tuple[GpuGoal, ...] = (
    Share("torus-dog-8192-frozen", "n = 8192 torus, frozen: bandwidth", 0.85),
    Share("torus-dog-8192-trained", "n = 8192 torus, trained: bandwidth", 0.75),
    Faster("torus-dog-4096-frozen", "n = 4096 torus, frozen: torch.compile of the formula", 1.4, "compiled"),
    Faster("torus-dog-4096-frozen", "n = 4096 torus, frozen: cached coefficients, forward + backward", 2.2, "cached"),
    *(Faster(f"{m}-dog-4096-trained", f"n = 4096 {name}, trained: fastest torch.compile form", ratio, "compiled")
      for m, name, ratio in (("torus", "torus", 3.0), ("sphere", "sphere", 4.0), ("torus6", "6-torus", 7.0),
                             ("klein", "Klein bottle", 20.0))),
    Faster("torus-dog-4096-trained", "n = 4096 torus, trained: eager PyTorch", 15.0, "eager formula"),
    Faster("torus-dog-4096-trained", "n = 4096 torus, trained: the authors' procedure", 15.0, "authors' procedure"),
    Seconds("three-layers", f"n = {LAYER}, {LAYERS} layers, forward + backward in a CUDA graph", 15e-6),
    FasterThanDense(MASKED.name, "n = 4096, 98 % masked, trained: into .grad, than dense", 3.0, MASKED_INTO),
    FasterThanDense(MASKED.name, "n = 4096, 98 % masked, trained: compressed values, than dense", 10.0, MASKED_VALUES),
    *(Memory(case, f"n = 4096 {name}: peak memory beyond W and dW", MEMORY_GOAL) for case, name in (
        ("torus-dog-4096-trained", "torus, trained"), ("torus-dog-4096-frozen", "torus, frozen"),
        ("torus6-dog-4096-trained", "6-torus, trained"))),
)
