"""Functions of entries of W that several kernels share: loads of points and weights, |w|^l and its slope, sums."""
from __future__ import annotations

import triton
import triton.language as tl

from ..math import power_positive, signed_by


@triton.jit
def load_points(points, index, COORDINATES: tl.constexpr):
    """The coordinates of the points (n, COORDINATES) numbered `index`: a tuple of tiles like it."""
    loaded = ()
    for c in tl.static_range(COORDINATES):
        loaded = loaded + (tl.load(points + index * COORDINATES + c),)
    return loaded


@triton.jit
def load_weights(pointers, kept, MASKED: tl.constexpr):
    """Weights, 0 where MASKED and not kept. No program reads them again, so they needn't stay in a cache."""
    if MASKED:
        return tl.load(pointers, mask=kept, other=0.0, eviction_policy="evict_first")
    else:
        return tl.load(pointers, eviction_policy="evict_first")


@triton.jit
def magnitude(a, exponent, POWER: tl.constexpr):
    """Returns |w|^l and d|w|^l / d|w| from a = |w|. POWER: l if it is 1 or 2, else 0, and the exponent is l."""
    if POWER == 1:
        return a, 1.0
    elif POWER == 2:
        return a * a, 2 * a
    else:
        low = power_positive(a, exponent - 1)
        return a * low, exponent * low


@triton.jit
def weight_gradient(f, w, a, exponent, POWER: tl.constexpr):
    """Returns f d|w|^l / dw, which is taken as 0 at w = 0 for l = 1; a = |w|."""
    if POWER == 1:
        return signed_by(f, w)
    elif POWER == 2:
        return f * (2 * w)
    else:
        _, slope = magnitude(a, exponent, POWER)
        return signed_by(f * slope, w)


@triton.jit
def store_gradients(to, gradients, inside, ACCUMULATE: tl.constexpr, EVEN: tl.constexpr):
    """Stores gradients at `to`; with ACCUMULATE adds them to those that stand there. EVEN: all are inside."""
    if ACCUMULATE:
        if EVEN:
            gradients += load_weights(to, inside, False).to(gradients.dtype)
        else:
            gradients += tl.load(to, mask=inside, other=0.0).to(gradients.dtype)
    rounded = gradients.to(to.dtype.element_ty)
    if EVEN:
        tl.store(to, rounded, eviction_policy="evict_first")
    else:
        tl.store(to, rounded, mask=inside, eviction_policy="evict_first")


@triton.jit
def kernel_norms(weights, mask, mask_at, inside, INNER: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr):
    """Returns the L2 norm of the kept weights of each convolution kernel of INNER elements, and whether one is kept."""
    squares = tl.zeros(inside.shape, DTYPE)
    kept = inside & (mask_at < 0)
    for q in range(INNER):
        here = inside
        if HAS_MASK:
            here = here & (tl.load(mask + mask_at + q, mask=inside, other=0) != 0)
        w = tl.load(weights + q, mask=here, other=0.0).to(DTYPE)
        squares += w * w
        kept = kept | here
    return tl.sqrt(squares), kept


@triton.jit
def compensated_add(total, rest, part):
    """Kahan's sum: returns total + part, and what rounding added, which the next call takes off as `rest`."""
    part = part - rest
    added = total + part
    return added, (added - total) - part
