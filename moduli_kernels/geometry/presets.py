"""The manifolds of the paper's experiments, by name."""
from __future__ import annotations

from .base import Manifold
from .flat import Circle, Euclidean, FlatTorus
from .klein import KleinBottle
from .product import Product
from .sphere import Sphere

__all__ = ["manifold"]

PRESETS: dict[str, Manifold] = {
    "torus": FlatTorus(),
    "torus6": FlatTorus((10.0,) * 6),
    "circle": Circle(),
    "sphere": Sphere(),
    "s3": Sphere(dim=3),
    "klein": KleinBottle(),
    "r3": Euclidean(),
    "mixed": Product(Sphere(), FlatTorus()),
}


def manifold(name: str | Manifold) -> Manifold:
    """The paper's preset of that name; a Manifold is handed back unchanged.

    Args:
        name: "torus" (FlatTorus of periods 10 and 10), "torus6" (six periods of 10), "circle" (radius 5), "sphere" (the
            2-sphere of radius 5), "s3" (the 3-sphere of radius 5; the authors' code has distances as on
            Sphere(dim=3, radius=10) where points are fixed), "klein" (KleinBottle, 10 by 10), "r3" (Euclidean,
            points in a cube of side 10), "mixed" (Product of "sphere" and "torus"); or a Manifold.

    Raises:
        ValueError: name is neither.
    """
    if isinstance(name, Manifold):
        return name
    if not isinstance(name, str) or name not in PRESETS:
        choices = ", ".join(repr(p) for p in PRESETS)
        raise ValueError(f"manifold must be a Manifold or one of {choices}, got {name!r}; pick one of them.")
    return PRESETS[name]
