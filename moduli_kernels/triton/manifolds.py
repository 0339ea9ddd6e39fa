"""Manifolds as functions of tiles. All that the Triton kernels know of a manifold stands in this file.

A manifold is three functions, handed to the kernels as constants, and a few facts for the launchers: see `Manifold`.
The functions see one factor of a product alone: x and y are tuples of its coordinates, tiles that broadcast against
each other, and p is the tuple of its parameters.

    prepare(x, p)             once a point: coordinates as `distance` wants them
    distance(x, y, p, GRADS)  for a pair: s, g and h. s is the squared geodesic distance, g = (1/2) ds/dx and
                              h = -(1/2) ds/dy, HALF the derivatives, each a tuple with a tile for each coordinate.
                              Without GRADS only s has to be right.
    finish(g, x)              once a point: its gradient, from g, which is what the gradient would be if the
                              coordinates of x, which is not prepared, were free

To add a manifold, write them, make a `Manifold` of them, and list it at the end of this file. csrc/manifolds.h writes
the same formulas for the CPU, moduli_kernels/geometry for PyTorch.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .math import SIGN_BIT, TINY, atan_of_ratio, numbers, signed_by

# --- what the launchers know -----------------------------------------------------------------------------------

class Manifold(NamedTuple):
    """A manifold for the launchers.

    code: its number in the op's argument `factors`; None if no op names it
    parameters: from the columns of a point to how many parameters the op passes
    prepare, distance, finish: functions of tiles, see the top of this file
    curved: whether a pair takes so many registers that tiles have to be smaller than those of flat manifolds
    runs: for a factor that the kernels walk as several: from its parameters to (manifold, columns, parameters) of each
    """

    code: int | None
    parameters: Callable[[int], int]
    prepare: Any
    distance: Any
    finish: Any
    curved: bool = False
    runs: Callable[[list[float]], list[tuple[Manifold, int, list[float]]]] | None = None

    def source(self) -> int:
        """A number that changes with the code of the functions. Triton's cache on disk names a kernel after its
        constants, where a function in a tuple counts by its name alone."""
        keys = [getattr(function, "cache_key", "0") for function in (self.prepare, self.distance, self.finish)]
        return sum(int(key[:12], 16) << place for place, key in enumerate(keys))


class Factor(NamedTuple):
    """A factor of a product for the compiler; a kernel's constant FACTORS is the tuple of all of them.

    prepare, distance, finish: the functions of its manifold
    first: its first column
    columns: how many it has
    parameter: its first parameter among those of all factors
    parameters: how many it has
    source: see Manifold.source
    """

    prepare: Any
    distance: Any
    finish: Any
    first: int
    columns: int
    parameter: int
    parameters: int
    source: int

    def __hash__(self) -> int:
        """Triton hashes a kernel's constants at every launch, which is slow for functions. `source` stands for them."""
        return hash((self.first, self.columns, self.parameter, self.parameters, self.source))


# Triton 3.6 reads a tuple in a tuple by place and not by name.
PREPARE, DISTANCE, FINISH, FIRST, COLUMNS, PARAMETER, PARAMETERS = (
    tl.constexpr(Factor._fields.index(name))
    for name in ("prepare", "distance", "finish", "first", "columns", "parameter", "parameters"))


class Factors(NamedTuple):
    """A manifold as a launcher hands it over.

    factors: the kernel's constant FACTORS
    parameters: those of all factors, one after the other
    curved: whether one of them is
    """

    factors: tuple[Factor, ...]
    parameters: list[float]
    curved: bool


def factors_of(codes: Sequence[int], parameters: Sequence[float]) -> Factors:
    """The manifold that an op's arguments `factors` (code and columns of each factor) and `factor_parameters` mean."""
    factors: list[Factor] = []
    sent: list[float] = []
    curved, column, read = False, 0, 0
    for code, columns in zip(codes[::2], codes[1::2]):
        manifold = MANIFOLDS[code]
        own = list(parameters[read:read + manifold.parameters(columns)])
        read += len(own)
        for run, width, values in [(manifold, columns, own)] if manifold.runs is None else manifold.runs(own):
            factors.append(Factor(run.prepare, run.distance, run.finish, column, width, len(sent), len(values),
                                  run.source()))
            sent += values
            curved |= run.curved
            column += width
    return Factors(tuple(factors), sent, curved)


# --- products --------------------------------------------------------------------------------------------------

@triton.jit
def columns_of(values, FIRST_COLUMN: tl.constexpr, COUNT: tl.constexpr):
    """The tuple of COUNT of the values from FIRST_COLUMN on."""
    found = ()
    for c in tl.static_range(COUNT):
        found = found + (values[FIRST_COLUMN + c],)
    return found


@triton.jit
def zero_or_nan(points):
    """Returns 0, and NaN where one of the coordinates is not finite."""
    zero = points[0] * 0
    for c in tl.static_range(1, len(points)):
        zero = tl.fma(points[c], 0.0, zero)
    return zero


@triton.jit
def prepare(points, zero, parameters, FACTORS: tl.constexpr):
    """The points as `distance` wants them: the manifolds prepare their coordinates, and all of them are NaN where one
    is not finite, so that it reaches the value. zero is added to each, for the sake of its layout."""
    zero = zero + zero_or_nan(points)
    poisoned = ()
    for c in tl.static_range(len(points)):
        poisoned = poisoned + (points[c] + zero,)
    ready = ()
    for q in tl.static_range(len(FACTORS)):
        ready = ready + FACTORS[q][PREPARE](
            columns_of(poisoned, FACTORS[q][FIRST], FACTORS[q][COLUMNS]),
            numbers(parameters, FACTORS[q][PARAMETER], FACTORS[q][PARAMETERS], points[0].dtype))
    return ready


@triton.jit
def factor_distance(x, y, parameters, FACTORS: tl.constexpr, INDEX: tl.constexpr, GRADS: tl.constexpr):
    """s, g and h of factor number INDEX."""
    return FACTORS[INDEX][DISTANCE](
        columns_of(x, FACTORS[INDEX][FIRST], FACTORS[INDEX][COLUMNS]),
        columns_of(y, FACTORS[INDEX][FIRST], FACTORS[INDEX][COLUMNS]),
        numbers(parameters, FACTORS[INDEX][PARAMETER], FACTORS[INDEX][PARAMETERS], x[0].dtype), GRADS)


@triton.jit
def distance(x, y, parameters, FACTORS: tl.constexpr, GRADS: tl.constexpr):
    """s of a pair of prepared points, the sum over the factors, and the tuples g and h, one tile a coordinate."""
    s, g, h = factor_distance(x, y, parameters, FACTORS, 0, GRADS)
    for q in tl.static_range(1, len(FACTORS)):
        part, g_part, h_part = factor_distance(x, y, parameters, FACTORS, q, GRADS)
        s += part
        g = g + g_part
        h = h + h_part
    return s, g, h


@triton.jit
def finish_gradient(g, points, FACTORS: tl.constexpr):
    """The gradient of the points, from what it would be if their coordinates were free."""
    finished = ()
    for q in tl.static_range(len(FACTORS)):
        finished = finished + FACTORS[q][FINISH](columns_of(g, FACTORS[q][FIRST], FACTORS[q][COLUMNS]),
                                                 columns_of(points, FACTORS[q][FIRST], FACTORS[q][COLUMNS]))
    return finished


@triton.jit
def keep_gradient(g, x):
    """`finish` of a manifold whose coordinates are free."""
    return g


# --- flat: Euclidean space and flat tori -----------------------------------------------------------------------

@triton.jit
def reduce_coordinate(x, period):
    """Returns x modulo the period, in [0, period] but for rounding, and 0 for multiples of the period."""
    return tl.fma(tl.floor(x * (1.0 / period)), -period, x)


@triton.jit
def copy_sign(size, x):
    """Returns size, which is positive, with the sign of x."""
    if x.dtype == tl.float32:
        bits = size.to(tl.int32, bitcast=True)
        # All bits but the sign come from `bits`. The compiler makes one instruction of this form, not of one with |.
        bits = bits ^ ((x.to(tl.int32, bitcast=True) ^ bits) & SIGN_BIT)
        return bits.to(tl.float32, bitcast=True)
    else:
        return tl.where(x < 0, -size, size)


@triton.jit
def nearest_image(d, period):
    """For |d| <= period, that of d, d - period and d + period which is nearest to 0; d at a tie."""
    return tl.where(tl.abs(d) > 0.5 * period, d - copy_sign(period, d), d)


@triton.jit
def nearest_size(d, period):
    """Returns |nearest_image(d, period)|, at less cost."""
    size = tl.abs(d)
    return tl.minimum(size, period - size)


@triton.jit
def sum_of_squares(values):
    total = values[0] * values[0]
    for c in tl.static_range(1, len(values)):
        total += values[c] * values[c]
    return total


@triton.jit
def prepare_line(x, p):
    return x


@triton.jit
def line_distance(x, y, p, GRADS: tl.constexpr):
    """s = sum_c d_c^2 with d_c = x_c - y_c, which is g_c."""
    g = ()
    for c in tl.static_range(len(x)):
        g = g + (x[c] - y[c],)
    return sum_of_squares(g), g, g


@triton.jit
def prepare_flat(x, p):
    """p: a period for each column."""
    ready = ()
    for c in tl.static_range(len(x)):
        ready = ready + (reduce_coordinate(x[c], p[c]),)
    return ready


@triton.jit
def flat_distance(x, y, p, GRADS: tl.constexpr):
    """s = sum_c d_c^2 with d_c the nearest image of x_c - y_c, which is g_c. p: a period for each column."""
    g = ()
    for c in tl.static_range(len(x)):
        d = x[c] - y[c]
        if GRADS:
            d = nearest_image(d, p[c])
        else:
            d = nearest_size(d, p[c])
        g = g + (d,)
    return sum_of_squares(g), g, g


def flat_runs(periods: list[float]) -> list[tuple[Manifold, int, list[float]]]:
    """The columns of a flat factor in runs of periodic ones and of others, whose period is 0."""
    runs: list[tuple[Manifold, int, list[float]]] = []
    for period in periods:
        run, own = (PERIODIC, [period]) if period else (LINE, [])
        if runs and runs[-1][0] is run:
            runs[-1] = (run, runs[-1][1] + 1, runs[-1][2] + own)
        else:
            runs.append((run, 1, own))
    return runs


LINE = Manifold(None, lambda columns: 0, prepare_line, line_distance, keep_gradient)
PERIODIC = Manifold(None, lambda columns: columns, prepare_flat, flat_distance, keep_gradient)
FLAT = PERIODIC._replace(code=0, runs=flat_runs)
# Where distances don't matter, this factor still tells whether the points are finite.
FIRST_COORDINATE = (Factor(LINE.prepare, LINE.distance, LINE.finish, 0, 1, 0, 0, LINE.source()),)


# --- spheres ---------------------------------------------------------------------------------------------------

@triton.jit
def unit_vector(x):
    """Returns x / |x| and 1 / |x|.

    Quotients are rounded once (a step of Newton's method follows the approximate ones), so that those of x and -3x
    along an axis are opposite to the last bit.
    """
    square = x[0] * x[0]
    for c in tl.static_range(1, len(x)):
        square = tl.fma(x[c], x[c], square)
    if square.dtype == tl.float64:
        reciprocal = 1.0 / tl.sqrt(square)
        length = tl.sqrt(square)
    else:
        reciprocal = tl.rsqrt(square)
        length = square * reciprocal
        length = tl.fma(tl.fma(-length, length, square), 0.5 * reciprocal, length)
    unit = ()
    for c in tl.static_range(len(x)):
        quotient = x[c] * reciprocal
        unit = unit + (tl.fma(tl.fma(-quotient, length, x[c]), reciprocal, quotient),)
    return unit, reciprocal


@triton.jit
def prepare_sphere(x, p):
    """Returns x^ = x / |x|."""
    unit, _ = unit_vector(x)
    return unit


@triton.jit
def sphere_angle(minus, plus):
    """Returns theta / 2 and theta / (4 sin(theta)), which is taken as 0 at antipodes, from minus = |x^ - y^|^2 and
    plus = |x^ + y^|^2: theta = 2 atan2(sqrt minus, sqrt plus), 2 sin(theta) = sqrt(minus plus)."""
    far = minus > plus
    less, more = tl.minimum(minus, plus), tl.maximum(minus, plus)
    if minus.dtype == tl.float64:
        reciprocal = 1.0 / tl.sqrt(less * more + 1e-300)
    else:
        reciprocal = tl.rsqrt(less * more + TINY)
    angle = atan_of_ratio(less * reciprocal)  # less / sqrt(less more) = sqrt(less / more)
    # pi/2 is a sum of two numbers, since rounding it to one costs 4.4e-8
    angle = tl.where(far, 1.5707963705062866 - (angle + 4.371139000186241e-8), angle)
    return angle, tl.where(less < TINY, tl.where(far, 0.0, 0.25), angle * reciprocal)


@triton.jit
def sphere_distance(x, y, p, GRADS: tl.constexpr):
    """s = (radius theta)^2; g = radius^2 theta / sin(theta) (x^ - y^), which `finish_sphere` brings into the tangent
    space. p: the radius."""
    radius = p[0]
    difference = (x[0] - y[0],)
    plus = x[0] + y[0]
    minus = difference[0] * difference[0]
    plus = plus * plus
    for c in tl.static_range(1, len(x)):
        difference = difference + (x[c] - y[c],)
        minus += difference[c] * difference[c]
        both = x[c] + y[c]
        plus += both * both
    angle, ratio = sphere_angle(minus, plus)
    d = (2 * radius) * angle
    factor = (4 * radius * radius) * ratio
    g = ()
    for c in tl.static_range(len(x)):
        g = g + (factor * difference[c],)
    return d * d, g, g


@triton.jit
def finish_sphere(g, x):
    """The gradient in the coordinates of x, of which the length doesn't matter: the part of g along the sphere, over
    |x|."""
    unit, reciprocal = unit_vector(x)
    radial = g[0] * unit[0]
    for c in tl.static_range(1, len(x)):
        radial += g[c] * unit[c]
    projected = ()
    for c in tl.static_range(len(x)):
        projected = projected + ((g[c] - radial * unit[c]) * reciprocal,)
    return projected


SPHERE = Manifold(1, lambda columns: 1, prepare_sphere, sphere_distance, finish_sphere, curved=True)


# --- Klein bottles ---------------------------------------------------------------------------------------------

@triton.jit
def prepare_klein(x, p):
    """p: width and height. The first coordinate comes back to itself after twice the width."""
    return reduce_coordinate(x[0], 2 * p[0]), reduce_coordinate(x[1], p[1])


@triton.jit
def klein_distance(x, y, p, GRADS: tl.constexpr):
    """The smaller of s1 = dx^2 + wrap(ya - yb)^2 and s2 = (width - |dx|)^2 + wrap(ya + yb - height)^2; s1 at a tie.
    In s2 the second coordinate is mirrored, so there h is not g. p: width and height."""
    width, height = p[0], p[1]
    dx = nearest_image(x[0] - y[0], 2 * width)
    straight = nearest_image(x[1] - y[1], height)
    flipped = nearest_image(x[1] + y[1] - height, height)
    other = width - tl.abs(dx)
    s1 = dx * dx + straight * straight
    s2 = other * other + flipped * flipped
    second = s2 < s1
    across = tl.where(second, signed_by(-other, dx), dx)
    return (tl.where(second, s2, s1), (across, tl.where(second, flipped, straight)),
            (across, tl.where(second, -flipped, straight)))


KLEIN = Manifold(2, lambda columns: 2, prepare_klein, klein_distance, keep_gradient, curved=True)


# --- all of them -----------------------------------------------------------------------------------------------

MANIFOLDS: dict[int | None, Manifold] = {manifold.code: manifold for manifold in (FLAT, SPHERE, KLEIN)}
