"""The nets that are compared: which points, which penalty."""

from __future__ import annotations

import torch

import moduli_kernels as mk

from .task import Task

MANIFOLDS = ("torus", "torus6", "circle", "sphere", "s3", "klein", "r3", "mixed")  # presets of mk.manifold
CONTROLS = {
    "l1": "constant penalty with coefficient 1",
    "l1_matched": "constant penalty, the torus penalty's mean coefficient",
    "shuffled": "the torus coefficients, permuted at random",
    "none": "no penalty: magnitude pruning alone",
}
NETS = {
    **{name: f"{name} penalty, fixed points" for name in MANIFOLDS},
    **{f"{name}_trained": f"{name} penalty, trained points" for name in MANIFOLDS},
    **CONTROLS,
}
R3 = ("paper", "code")
SCALE = 100.0  # the coefficient of the experiments' inhibitors, as in the authors' code
# The tables reach to 18, since two points on a compact preset are at most 17.2 apart (mixed).
INHIBITORS = {
    "dog": lambda: mk.DifferenceOfGaussians(c=SCALE, sigma1=0.25, sigma2=5.0),
    # The authors' code lets the cheapest pair of points cost 0, and "dog" the cheapest distance.
    "dog_sampled": lambda: mk.DifferenceOfGaussians(c=SCALE, sigma1=0.25, sigma2=5.0, zero_min="sampled"),
    "diffusion": lambda: mk.Diffusion(c=1.0, exponent=2.0),
    "distance": lambda: mk.Diffusion(c=1.0, exponent=1.0),
    "sinusoid": lambda: mk.Sinusoid(c=SCALE / 2, mu=2.0),
    "ricker": lambda: mk.RickerWavelet(sigma=1.0, c=SCALE),
    "gauss": lambda: mk.TabulatedInhibitor(lambda d: SCALE * torch.exp(-d * d / 3), max_distance=18.0),
    # The authors' language-model script subtracts each entry from the largest one, that of the torus' farthest points.
    "diffusion_inverted": lambda: mk.TabulatedInhibitor(lambda d: (50.0 - d * d).clamp(min=0), max_distance=18.0),
    "distance_inverted": lambda: mk.TabulatedInhibitor(lambda d: (50.0**0.5 - d).clamp(min=0), max_distance=18.0),
    "constant": lambda: mk.Constant(c=1.0),
}


def manifold_of(net: str) -> str:
    """Returns the preset that the net's neurons live on. Controls take their points from the torus."""
    return "torus" if net in CONTROLS else net.removesuffix("_trained")


def geometry(task: Task, net: str, inhibitor: str, *, strength: float, reduction: str, r3: str,
             generator: torch.Generator) -> mk.Regularization:
    """Makes the points of the net's neurons and the penalty over them.

    Nets with one seed on one manifold have the same points, so that controls can be drawn on the torus too.

    Args:
        r3: "code" gives R^3 as the authors' navigation and adding code has it: trained points start normal with the
            task's R3_SPREAD. (Fixed points have no penalty at all there: see `penalty`.)
    """
    made = mk.regularize(
        task.model, task.targets(), manifold=manifold_of(net), inhibitor=INHIBITORS[inhibitor](), strength=strength,
        reduction=reduction, trainable=net.endswith("_trained"), generator=generator,
    )
    if r3 == "code" and net == "r3_trained":
        with torch.no_grad():
            for points in made.parameters():
                points.normal_(0.0, task.R3_SPREAD, generator=generator)
    return made


def penalty(geometry: mk.Regularization, task: Task, net: str, *, strength: float, reduction: str, r3: str,
            generator: torch.Generator) -> mk.Regularization | None:
    """Returns the penalty in the net's loss, or None for a net without one. Arguments are those of `geometry`."""
    if net == "none" or r3 == "code" and net == "r3":
        return None
    if net == "l1":
        return mk.regularize(task.model, task.targets(), inhibitor=mk.Constant(c=1.0), strength=strength,
                             reduction=reduction, generator=generator)
    if net == "l1_matched":
        return geometry.matched()
    if net == "shuffled":
        return geometry.shuffled(generator)
    return geometry
