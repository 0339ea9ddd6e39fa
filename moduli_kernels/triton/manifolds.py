"""Squared geodesic distances s and HALF their derivatives, as in csrc/distance.h: g = (1/2) ds/dx and
h = -(1/2) ds/dy, which is g itself but for the second coordinate of a Klein bottle.

Points are tuples of coordinates, tiles that broadcast against each other, made ready by `prepare`. FACTORS describes
a manifold to the compiler: for each factor its kind, first column, number of columns and first parameter; s is the
sum over the factors. Kinds are the codes of moduli_kernels/_encoding.py, but that axes of a FLAT factor that are not
periodic are a factor of the kind LINE. Parameters: the periods if FLAT, the radius if SPHERE, width and height if
KLEIN.
"""
from __future__ import annotations

import triton
import triton.language as tl

from .math import SIGN_BIT, TINY, atan_of_ratio, parameter, signed_by

FLAT = tl.constexpr(0)
SPHERE = tl.constexpr(1)
KLEIN = tl.constexpr(2)
LINE = tl.constexpr(3)


# --- points ----------------------------------------------------------------------------------------------------

@triton.jit
def zero_or_nan(points):
    """0, or NaN where a coordinate is not finite."""
    zero = points[0] * 0
    for c in tl.static_range(1, len(points)):
        zero = tl.fma(points[c], 0.0, zero)
    return zero


@triton.jit
def reduce_coordinate(x, period):
    """x modulo period, in [0, period] but for rounding; 0 for multiples of it."""
    return tl.fma(tl.floor(x * (1.0 / period)), -period, x)


@triton.jit
def unit_vector(points, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    """Some of the coordinates divided by the length of their vector, and 1/length. Quotients are rounded once (a step
    of Newton's method after the approximate ones): of x and -3x along an axis they are opposite to the last bit."""
    square = points[FIRST] * points[FIRST]
    for c in tl.static_range(FIRST + 1, FIRST + COLUMNS):
        square = tl.fma(points[c], points[c], square)
    if square.dtype == tl.float64:
        reciprocal = 1.0 / tl.sqrt(square)
        length = tl.sqrt(square)
    else:
        reciprocal = tl.rsqrt(square)
        length = square * reciprocal
        length = tl.fma(tl.fma(-length, length, square), 0.5 * reciprocal, length)
    unit = ()
    for c in tl.static_range(FIRST, FIRST + COLUMNS):
        quotient = points[c] * reciprocal
        unit = unit + (tl.fma(tl.fma(-quotient, length, points[c]), reciprocal, quotient),)
    return unit, reciprocal


@triton.jit
def prepare_factor(points, parameters, KIND: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr,
                   PARAMETER: tl.constexpr):
    if KIND == SPHERE:
        ready, _ = unit_vector(points, FIRST, COLUMNS)
        return ready
    elif KIND == KLEIN:
        width = parameter(parameters, PARAMETER, points[0].dtype)
        height = parameter(parameters, PARAMETER + 1, points[0].dtype)
        return reduce_coordinate(points[FIRST], 2 * width), reduce_coordinate(points[FIRST + 1], height)
    else:
        ready = ()
        for c in tl.static_range(COLUMNS):
            x = points[FIRST + c]
            if KIND == FLAT:
                x = reduce_coordinate(x, parameter(parameters, PARAMETER + c, x.dtype))
            ready = ready + (x,)
        return ready


@triton.jit
def prepare(points, zero, parameters, FACTORS: tl.constexpr):
    """Coordinates as `distance` wants them: periodic ones reduced, spheres normalized, and all of them NaN where one
    is not finite, so that it reaches the value. zero is added to each."""
    zero = zero + zero_or_nan(points)
    poisoned = ()
    for c in tl.static_range(len(points)):
        poisoned = poisoned + (points[c] + zero,)
    ready = ()
    for q in tl.static_range(len(FACTORS)):
        ready = ready + prepare_factor(poisoned, parameters, FACTORS[q][0], FACTORS[q][1], FACTORS[q][2], FACTORS[q][3])
    return ready


# --- pairs -----------------------------------------------------------------------------------------------------

@triton.jit
def copy_sign(size, x):
    """size > 0 with the sign of x."""
    if x.dtype == tl.float32:
        bits = size.to(tl.int32, bitcast=True)
        # all bits but the sign from `bits`: the compiler makes one operation of this form, of a plain | it does not
        bits = bits ^ ((x.to(tl.int32, bitcast=True) ^ bits) & SIGN_BIT)
        return bits.to(tl.float32, bitcast=True)
    else:
        return tl.where(x < 0, -size, size)


@triton.jit
def nearest_image(d, period):
    """The nearest to 0 of d, d - period and d + period, for |d| <= period; d itself at a tie."""
    return tl.where(tl.abs(d) > 0.5 * period, d - copy_sign(period, d), d)


@triton.jit
def nearest_size(d, period):
    """|nearest_image(d, period)|."""
    size = tl.abs(d)
    return tl.minimum(size, period - size)


@triton.jit
def klein_distance(xa, ya, xb, yb, width, height):
    """s1 = dx^2 + wrap(ya - yb)^2; s2 = (width - |dx|)^2 + wrap(ya + yb - height)^2; s1 at a tie."""
    dx = nearest_image(xa - xb, 2 * width)
    straight = nearest_image(ya - yb, height)
    flipped = nearest_image(ya + yb - height, height)
    other = width - tl.abs(dx)
    s1 = dx * dx + straight * straight
    s2 = other * other + flipped * flipped
    second = s2 < s1
    across = tl.where(second, signed_by(-other, dx), dx)
    return (tl.where(second, s2, s1), (across, tl.where(second, flipped, straight)),
            (across, tl.where(second, -flipped, straight)))


@triton.jit
def sphere_angle(minus, plus):
    """theta / 2 and theta / (4 sin(theta)), 0 at antipodes, from the squares of |x^ - y^| and |x^ + y^|:
    theta = 2 atan2(sqrt minus, sqrt plus), 2 sin(theta) = sqrt(minus plus)."""
    far = minus > plus
    less, more = tl.minimum(minus, plus), tl.maximum(minus, plus)
    if minus.dtype == tl.float64:
        reciprocal = 1.0 / tl.sqrt(less * more + 1e-300)
    else:
        reciprocal = tl.rsqrt(less * more + TINY)
    angle = atan_of_ratio(less * reciprocal)  # less / sqrt(less more) = sqrt(less / more)
    # pi/2 in two parts, for its rounding alone is 4.4e-8
    angle = tl.where(far, 1.5707963705062866 - (angle + 4.371139000186241e-8), angle)
    return angle, tl.where(less < TINY, tl.where(far, 0.0, 0.25), angle * reciprocal)


@triton.jit
def sphere_distance(x, y, radius, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    """s = (radius theta)^2; g = radius^2 theta / sin(theta) (x^ - y^), before its projection on the tangent space and
    division by |x|, once a point."""
    difference = (x[FIRST] - y[FIRST],)
    plus = x[FIRST] + y[FIRST]
    minus = difference[0] * difference[0]
    plus = plus * plus
    for c in tl.static_range(1, COLUMNS):
        difference = difference + (x[FIRST + c] - y[FIRST + c],)
        minus += difference[c] * difference[c]
        both = x[FIRST + c] + y[FIRST + c]
        plus += both * both
    angle, ratio = sphere_angle(minus, plus)
    d = (2 * radius) * angle
    factor = (4 * radius * radius) * ratio
    g = ()
    for c in tl.static_range(COLUMNS):
        g = g + (factor * difference[c],)
    return d * d, g


@triton.jit
def flat_distance(x, y, parameters, FIRST: tl.constexpr, COLUMNS: tl.constexpr, PARAMETER: tl.constexpr,
                  PERIODIC: tl.constexpr, GRADS: tl.constexpr):
    """s = sum_c delta_c^2 with delta_c = wrap(x_c - y_c, period_c), which is g."""
    g = ()
    for c in tl.static_range(COLUMNS):
        d = x[FIRST + c] - y[FIRST + c]
        if PERIODIC:
            period = parameter(parameters, PARAMETER + c, d.dtype)
            if GRADS:
                d = nearest_image(d, period)
            else:
                d = nearest_size(d, period)
        g = g + (d,)
    s = g[0] * g[0]
    for c in tl.static_range(1, COLUMNS):
        s += g[c] * g[c]
    return s, g


@triton.jit
def factor_distance(x, y, parameters, KIND: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr,
                    PARAMETER: tl.constexpr, GRADS: tl.constexpr):
    """s, g and h of one factor."""
    if KIND == SPHERE:
        s, g = sphere_distance(x, y, parameter(parameters, PARAMETER, x[0].dtype), FIRST, COLUMNS)
        return s, g, g
    elif KIND == KLEIN:
        return klein_distance(x[FIRST], x[FIRST + 1], y[FIRST], y[FIRST + 1],
                              parameter(parameters, PARAMETER, x[0].dtype),
                              parameter(parameters, PARAMETER + 1, x[0].dtype))
    else:
        s, g = flat_distance(x, y, parameters, FIRST, COLUMNS, PARAMETER, KIND == FLAT, GRADS)
        return s, g, g


@triton.jit
def distance(x, y, parameters, FACTORS: tl.constexpr, GRADS: tl.constexpr):
    """s, and the tuples g and h, one tile a coordinate; without GRADS only s means anything."""
    s, g, h = factor_distance(x, y, parameters, FACTORS[0][0], FACTORS[0][1], FACTORS[0][2], FACTORS[0][3], GRADS)
    for q in tl.static_range(1, len(FACTORS)):
        part, g_part, h_part = factor_distance(x, y, parameters, FACTORS[q][0], FACTORS[q][1], FACTORS[q][2],
                                               FACTORS[q][3], GRADS)
        s += part
        g = g + g_part
        h = h + h_part
    return s, g, h
