"""What several manifolds and inhibitors compute in the same way."""
from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..checks import positive_int


def reduced(x: Tensor, period: float) -> Tensor:
    """x modulo `period`, in [0, period]: rounding may give the period itself. The kernels reduce in the same way."""
    return x - period * torch.floor(x / period)


def remainder(x: Tensor, period: float) -> Tensor:
    """x modulo `period`, in [0, period). The exact remainder of a tiny negative x rounds to the period, which is 0."""
    r = torch.remainder(x, period)
    return torch.where(r >= period, torch.zeros_like(r), r)


def wrap(d: Tensor, period: float | Tensor) -> Tensor:
    """The nearest to 0 of d, d - period and d + period, for a difference d of reduced coordinates; d at a tie.

    So wrap(-d) = -wrap(d) everywhere: two points pull at each other with opposite gradients on the cut locus too.
    """
    return torch.where(d.abs() > period / 2, d - period * torch.sign(d), d)


def sqrt_of_square(s: Tensor) -> Tensor:
    """sqrt(s), whose derivative at s = 0 is 0 rather than infinite; NaN stays NaN."""
    zero = s == 0
    return torch.where(zero, torch.zeros_like(s), torch.sqrt(torch.where(zero, torch.ones_like(s), s)))


def total(parts: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    return sum(parts)  # pyright: ignore[reportReturnType]  # it would be 0 if there were none


def floating(d: Tensor | float) -> Tensor:
    """d as a floating-point tensor, on its own device; a number is put on torch's default device."""
    if not isinstance(d, Tensor):  # as_tensor would also move a tensor to the default device
        d = torch.as_tensor(d)
    return d if d.is_floating_point() else d.to(torch.get_default_dtype())


def draw(n: int, columns: int, kind: str, generator: torch.Generator | None, dtype: torch.dtype | None,
         device: torch.device | str | None) -> Tensor:
    """Random numbers (n, columns): uniform in [0, 1) if kind is "uniform", else standard normal.

    They are drawn on the generator's device and then moved. Without device and generator they are on torch's default
    device.
    """
    positive_int("n", n, minimum=0)
    source = generator.device if generator is not None else device
    drawn = torch.rand if kind == "uniform" else torch.randn
    points = drawn(int(n), columns, generator=generator, dtype=dtype, device=source)
    return points if device is None else points.to(device)


def lattice(n: int, sides: tuple[float, ...]) -> Tensor:
    """n evenly picked nodes of a lattice with nearly cubic cells in the box with these sides: (n, len(sides)), on the
    CPU."""
    cell = (math.prod(sides) / max(n, 1)) ** (1 / len(sides))
    counts = [max(1, math.ceil(side / cell - 1e-9)) for side in sides]
    index = torch.arange(n, device="cpu") * math.prod(counts) // max(n, 1)
    columns: list[Tensor] = []
    for side, count in zip(reversed(sides), reversed(counts)):
        columns.append((index % count).double() * (side / count))
        index = index // count
    return torch.stack(columns[::-1], 1)
