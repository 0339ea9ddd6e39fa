"""Maps where in the arena each hidden unit of a navigation net is active, and how much that looks like a grid cell.

A rate map is a unit's mean state in each bin of the arena. Two scores describe it: the spatial information (Skaggs et
al. 1993) and the grid score (Sargolini et al. 2006, over several rings as Banino et al. 2018 do). For comparison, both
are also computed for maps in which every walk's states are counted at another walk's positions: they show what smooth
noise scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moduli_kernels import plots

from ..navigation import BOX, walks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..navigation import NavigationTask

BINS = 40  # along a side of the arena, 5.5 cm each
SIGMA = 1.5  # width of the Gaussian that smooths the maps, bins
LEAST_VISITS = 5.0  # a bin with fewer (smoothed) visits has no rate
LEAST_ACTIVE = 0.01  # a unit that is above 0 in a smaller share of all steps is called silent
LEAST_OVERLAP = 20  # bins that a map and its shifted copy must share for their correlation (Sargolini et al.)
RING_INSIDE = 0.2  # inner radius in sides of the arena; the central peak lies within it
RING_OUTSIDES = tuple(0.4 + 0.6 * i / 9 for i in range(10))  # outer radii; the best ring counts
ANGLES = (30, 60, 90, 120, 150)
WALK_SEED = 4  # all nets see the same walks
BATCH = 250  # walks at once
SAMPLES = 100_000  # steps in all, 62 a bin
SHUFFLES = 10
SHUFFLED_UNITS = 512  # at most so many units, picked at random, give the threshold by their pooled shuffled scores
QUANTILE = 0.95  # the share of shuffled scores that a unit must exceed


class Accumulator:
    """Sums states over the bins of the arena, for as many batches as are added.

    Bin [i, j] is the i-th from below and the j-th from the left.

    Args:
        units: how many the net has.
        bins: how many along a side of the arena.
        box: side of the arena in metres; it is centred at 0.
    """

    def __init__(self, units: int, *, bins: int = BINS, box: float = BOX, device: str | torch.device = "cpu") -> None:
        self.bins, self.box = bins, box
        # An extra bin at the end counts the steps that end outside the box.
        self.sums = torch.zeros(bins * bins + 1, units, device=device)
        self.visits = torch.zeros(bins * bins + 1, dtype=torch.float64, device=device)

    def add(self, states: Tensor, positions: Tensor) -> None:
        """Adds states (..., units) at positions (..., 2) in metres."""
        place = torch.floor((positions.reshape(-1, 2) / self.box + 0.5) * self.bins).long()
        inside = ((place >= 0) & (place < self.bins)).all(dim=1)
        cell = torch.where(inside, place[:, 1] * self.bins + place[:, 0], self.bins**2)
        self.sums.index_add_(0, cell, states.reshape(len(cell), -1).to(self.sums.dtype))
        self.visits += torch.bincount(cell, minlength=self.bins**2 + 1)

    def maps(self, sigma: float = SIGMA) -> tuple[Tensor, Tensor]:
        """Returns rate maps (units, bins, bins), NaN where too few came, and visits (bins, bins).

        Args:
            sigma: width of the Gaussian that smooths sums and visits alike, bins; 0 for none.
        """
        square = (self.bins, self.bins)
        visits = self.visits[:-1].reshape(square)
        seen = _smooth(visits, sigma)
        sums = _smooth(self.sums[:-1].double().T.reshape(-1, *square), sigma)
        return torch.where(seen >= LEAST_VISITS, sums / seen, torch.nan), visits


def _smooth(image: Tensor, sigma: float) -> Tensor:
    """Smooths with a Gaussian over the last two (square) dimensions; nothing comes from beyond the border."""
    if sigma == 0:
        return image
    at = torch.arange(image.shape[-1], dtype=image.dtype, device=image.device)
    kernel = torch.exp(-((at[:, None] - at) ** 2) / (2 * sigma**2)) / (sigma * (2 * torch.pi) ** 0.5)
    return kernel @ image @ kernel


def spatial_information(maps: Tensor, visits: Tensor) -> Tensor:
    """Returns the bits that a unit's activity says about the place, per unit of mean activity (Skaggs et al. 1993).

    This is sum_i p_i (r_i / r) log2(r_i / r), where p_i is the share of visits to bin i, r_i >= 0 its rate and r the
    mean rate over all visits.

    Args:
        maps: (units, bins, bins).
        visits: (bins, bins).

    Returns:
        (units,), NaN for a unit that is 0 everywhere.
    """
    rates = maps.flatten(1)
    known = ~rates.isnan()
    share = known * visits.flatten().to(rates)
    share = share / share.sum(dim=1, keepdim=True)
    rates = torch.where(known, rates, 0.0)
    mean = (share * rates).sum(dim=1, keepdim=True)
    ratio = rates / mean
    return (share * torch.xlogy(ratio, ratio)).sum(dim=1) / math.log(2)


def autocorrelograms(maps: Tensor) -> Tensor:
    """Correlates each map with itself, shifted, over the bins that both have.

    Args:
        maps: (units, b, b).

    Returns:
        (units, 2b - 1, 2b - 1), with shift 0 in the middle; NaN where fewer than LEAST_OVERLAP bins overlap or one part
        is constant.
    """
    b = maps.shape[-1]
    known = (~maps.isnan()).double()
    values = torch.nan_to_num(maps.double())
    # Correlations do not depend on mean and scale, but rounding errors do, so both are taken out first.
    values = values - values.sum(dim=(1, 2), keepdim=True) / known.sum(dim=(1, 2), keepdim=True).clamp(min=1)
    values = values / values.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-300) * known

    def lagged(a: Tensor, c: Tensor) -> Tensor:
        whole = torch.fft.irfft2(a * c.conj(), s=(2 * b, 2 * b))
        return whole.roll((b - 1, b - 1), dims=(1, 2))[:, : 2 * b - 1, : 2 * b - 1]

    ones, first, second = (torch.fft.rfft2(x, s=(2 * b, 2 * b)) for x in (known, values, values.square()))
    count = lagged(ones, ones).round().clamp(min=1)
    here, there = lagged(first, ones) / count, lagged(ones, first) / count
    spread = (lagged(second, ones) / count - here**2) * (lagged(ones, second) / count - there**2)
    correlation = (lagged(first, first) / count - here * there) / spread.clamp(min=0).sqrt()
    enough = (count >= LEAST_OVERLAP) & (spread > 1e-12)
    return torch.where(enough, correlation.clamp(-1, 1), torch.nan)


def grid_scores(maps: Tensor, chunk: int = 128) -> Tensor:
    """Returns each unit's grid score, (units, b, b) -> (units,), between -2 and 2 and NaN for a constant map.

    It is high for fields on a hexagonal lattice and low for other ones: the autocorrelogram, cut to a ring around its
    middle, is correlated with itself rotated, and the score is the lower of the correlations at 60 and 120 degrees less
    the highest of those at 30, 90 and 150 (Sargolini et al. 2006). The ring with the highest score counts.
    """
    return torch.cat([_grid_scores(part) for part in maps.split(chunk)])


def _grid_scores(maps: Tensor) -> Tensor:
    b = maps.shape[-1]
    correlation = autocorrelograms(maps)
    known, correlation = (~correlation.isnan()).double(), torch.nan_to_num(correlation)
    at = torch.linspace(-1, 1, 2 * b - 1, dtype=torch.float64, device=maps.device)
    y, x = torch.meshgrid(at, at, indexing="ij")
    lag = torch.hypot(x, y) * (b - 1) / b  # in sides of the arena
    rings = torch.stack([((lag >= RING_INSIDE) & (lag <= outside)).flatten() for outside in RING_OUTSIDES]).double()
    both = torch.stack((correlation * known, known), dim=1)
    found = {}
    for degrees in ANGLES:
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        grid = torch.stack((c * x - s * y, s * x + c * y), dim=-1).expand(len(maps), -1, -1, -1)
        turned = torch.nn.functional.grid_sample(both, grid, align_corners=True, padding_mode="zeros")
        weight = (known * (turned[:, 1] > 0.999)).flatten(1)
        found[degrees] = _ring_correlation(correlation.flatten(1), turned[:, 0].flatten(1), weight, rings)
    low = torch.minimum(found[60], found[120])
    high = torch.maximum(torch.maximum(found[30], found[90]), found[150])
    score = (low - high).nan_to_num(nan=-torch.inf).amax(dim=1)
    return torch.where(score.isinf(), torch.nan, score)


def _ring_correlation(a: Tensor, c: Tensor, weight: Tensor, rings: Tensor) -> Tensor:
    """Returns Pearson's correlation of a and c, both (units, lags), within each ring (rings, lags) where weight is 1:
    (units, rings)."""
    count = weight @ rings.T

    def mean(v: Tensor) -> Tensor:
        return (weight * v) @ rings.T / count

    spread = (mean(a * a) - mean(a) ** 2) * (mean(c * c) - mean(c) ** 2)
    value = (mean(a * c) - mean(a) * mean(c)) / spread.clamp(min=0).sqrt()
    return torch.where((count >= LEAST_OVERLAP) & (spread > 1e-12), value, torch.nan)


@dataclass
class Measured:
    """What was measured on one net. Silent units have the score NaN."""

    maps: Tensor  # (units, bins, bins)
    visits: Tensor  # (bins, bins)
    active: Tensor  # (units,) bool: not silent
    scores: dict[str, Tensor]  # "grid_score", "spatial_information": (units,)
    shuffled: dict[str, Tensor]  # the same for shuffled maps: (shuffles, some of the units)

    def threshold(self, score: str) -> float:
        """Returns the QUANTILE of the shuffled scores of all active units together; NaN without any."""
        return self.shuffled[score].nanquantile(QUANTILE).item()

    def share(self, score: str) -> float:
        """Returns the share of active units whose score exceeds the threshold; by chance it is about 1 - QUANTILE."""
        return (self.scores[score][self.active] > self.threshold(score)).double().mean().item()

    def numbers(self) -> dict[str, Any]:
        """Returns the numbers for a JSON record."""
        found: dict[str, Any] = {"units": len(self.active), "active": int(self.active.sum())}
        found["visits of a bin"] = {"least": self.visits.min().item(), "median": self.visits.median().item()}
        for name, values in self.scores.items():
            each = [None if math.isnan(v) else round(v, 4) for v in values.tolist()]
            found[name] = {"threshold": self.threshold(name), "share_above": self.share(name),
                           "median": values.nanmedian().item(), "largest": max(v for v in each if v is not None),
                           "of each unit": each}
        return found


@torch.no_grad()
def measure(task: NavigationTask, *, samples: int = SAMPLES, bins: int = BINS, sigma: float = SIGMA,
            shuffles: int = SHUFFLES, seed: int = WALK_SEED) -> Measured:
    """Measures rate maps and scores of the task's net over fresh walks of about `samples` steps in all.

    The state of the task's generator does not change.
    """
    count = math.ceil(samples / task.steps)
    model, device, units = task.model, task.generator.device, task.model.rnn.hidden_size
    generator = torch.Generator(device).manual_seed(seed)
    some = torch.randperm(units, generator=generator, device=device)[:SHUFFLED_UNITS]
    real = Accumulator(units, bins=bins, device=device)
    nulls = [Accumulator(len(some), bins=bins, device=device) for _ in range(shuffles)]
    above = torch.zeros(units, dtype=torch.int64, device=device)
    for begin in range(0, count, BATCH):
        batch = walks(min(BATCH, count - begin), task.steps, generator=generator)
        states, _ = model.rnn(batch.moves, model.encoder(task.activation(batch.start))[None])  # (steps, batch, units)
        above += (states > 0).sum(dim=(0, 1))
        real.add(states, batch.positions)
        for null in nulls:  # each walk's states are counted at the positions of the walk `by` places on
            by = int(torch.randint(1, max(2, batch.start.shape[0]), (1,), generator=generator, device=device))
            null.add(states[..., some], batch.positions.roll(by, dims=1))
    active = above.double() / (count * task.steps) >= LEAST_ACTIVE
    maps, visits = real.maps(sigma)
    scores = _scores(maps, visits, active)
    shuffled = [_scores(*null.maps(sigma), active[some]) for null in nulls]
    return Measured(maps, visits, active, scores, {name: torch.stack([s[name] for s in shuffled]) for name in scores})


def _scores(maps: Tensor, visits: Tensor, active: Tensor) -> dict[str, Tensor]:
    found = {"grid_score": grid_scores(maps), "spatial_information": spatial_information(maps, visits)}
    return {name: torch.where(active, values, torch.nan) for name, values in found.items()}


def picture(task: NavigationTask, untrained: NavigationTask, what: str) -> tuple[Figure, dict[str, Any]]:
    """Draws a trained net beside the same net untrained and returns (figure, numbers of both).

    Args:
        what: says in the title which net it is.
    """
    ours, theirs = measure(task), measure(untrained)
    if not ours.active.any():
        raise ValueError("run must be of a net with active hidden units, got one in which all are silent; name another")
    title = (f"Rate maps of hidden units: {what}\n{len(ours.active)} units, {int(ours.active.sum())} active in at "
             f"least {100 * LEAST_ACTIVE:g} % of the steps")
    return _figure(title, ours, theirs), {"trained": ours.numbers(), "untrained": theirs.numbers()}


def _figure(title: str, trained: Measured, untrained: Measured, count: int = 6) -> Figure:
    """Draws the units of highest grid score with their autocorrelograms, those of highest spatial information, and how
    the scores are spread."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(2.15 * count, 11), layout="constrained")
    top, bottom = made.subfigures(2, 1, height_ratios=(3, 1.35))
    axes = top.subplots(3, count, squeeze=False)
    grid, information = (_best(trained.scores[name], count) for name in ("grid_score", "spatial_information"))
    shift = BOX * (1 - 0.5 / trained.maps.shape[-1])  # the outer edge of an autocorrelogram
    shown = ("mean state\n(of the unit's largest)", BOX / 2, "", {"cmap": "viridis", "vmin": 0, "vmax": 1})
    shifted = ("correlation", shift, "shift in ", {"cmap": "PuOr", "vmin": -1, "vmax": 1})
    rows = (("highest grid score", grid, shown), ("their autocorrelograms", grid, shifted),
            ("highest information", information, shown))
    for row, (of, units, (label, edge, kind, limits)) in zip(axes, rows):
        for ax, unit in zip(row, units):
            image = trained.maps[unit].cpu()
            if kind:
                image = autocorrelograms(image[None])[0]
            else:
                image = image / image.nan_to_num().max()
                ax.set_title(f"unit {unit}\ngrid {trained.scores['grid_score'][unit]:.2f}, "
                             f"info {trained.scores['spatial_information'][unit]:.2f} bits", fontsize="small")
            drawn = ax.imshow(image.numpy(), origin="lower", extent=(-edge, edge, -edge, edge), **limits)
            ax.tick_params(labelsize="small", labelleft=ax is row[0])
            ax.set_xlabel(f"{kind}x (m)", fontsize="small")
        row[0].set_ylabel(f"{of}\n{kind}y (m)")
        for ax in row[len(units):]:
            ax.set_visible(False)
        if units:
            top.colorbar(drawn, ax=row, shrink=0.8, label=label)
    left, right = bottom.subplots(1, 2)
    _spread(left, "grid_score", "grid score", trained, untrained)
    _spread(right, "spatial_information", "spatial information (bits)", trained, untrained)
    made.suptitle(title)
    return made


def _best(scores: Tensor, count: int) -> list[int]:
    order = scores.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)[:count]
    return [int(unit) for unit in order if not scores[unit].isnan()]


def _spread(ax: Axes, name: str, label: str, trained: Measured, untrained: Measured) -> None:
    """Draws histograms over units, and the score that a unit must exceed."""
    share = "{:s}: {:.0f} % of the units above the threshold of its own shuffled walks"
    several = [
        (trained.scores[name], share.format("trained net", 100 * trained.share(name)), plots.COLOURS[0], "-"),
        (untrained.scores[name], share.format("untrained", 100 * untrained.share(name)), plots.COLOURS[1], "-."),
        (trained.shuffled[name], "trained net, walks shuffled", "0.45", ":"),
    ]
    several = [(values[~values.isnan()].cpu().numpy(), *style) for values, *style in several]
    ends = [float(of(values)) for values, *_ in several if len(values) for of in (min, max)] or [0.0, 1.0]
    for values, what, colour, style in several:
        if len(values):
            ax.hist(values, 40, range=(min(ends), max(ends)), weights=[100 / len(values)] * len(values),
                    histtype="step", color=colour, linestyle=style, linewidth=1.6, label=what)
    ax.axvline(trained.threshold(name), color="black", linewidth=1,
               label=f"threshold of the trained net: {100 * QUANTILE:.0f} % of its shuffled scores are below")
    ax.set(xlabel=label, ylabel="active units (%)")
    ax.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1))
