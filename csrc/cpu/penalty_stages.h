// The stages of a tile: one row point against up to TILE column points. Each stage is one vectorizable loop over
// buffers in the first-level cache, so that manifolds, inhibitors and powers add instead of multiplying.
#pragma once

#include "../distance.h"
#include "../inhibitor.h"
#include "penalty.h"

namespace moduli::MODULI_NAMESPACE {

// Buffers of a tile, all [TILE]; per coordinate c at c * TILE.
template <typename T>
struct Tile {
  T *s, *f, *slope, *t, *w, *dw, *minus, *plus;
  T *g, *g_column;  // (1/2) ds/dx and, where it is not -g (the Klein bottle's second coordinate), (1/2) ds/dy
  T* column_sums;   // running sums of t * (1/2) ds/dy over the rows of a chunk

  Tile(T* scratch, int64_t k)
      : s(scratch), f(s + TILE), slope(f + TILE), t(slope + TILE), w(t + TILE), dw(w + TILE), minus(dw + TILE),
        plus(minus + TILE), g(plus + TILE), g_column(g + k * TILE), column_sums(g_column + k * TILE) {}
};

// --- distance: s and g ------------------------------------------------------------------------------------------

template <typename T, bool FIRST, bool GRADS>
inline void flat_axis(const FlatAxis<T>& axis, T x, const T* y, int64_t n, T* s, T* g) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T d = axis.difference(x, y[j]);
    s[j] = FIRST ? d * d : s[j] + d * d;
    if (GRADS) g[j] = d;
  }
}

// Two axes at once: the common plane, torus and their products save a pass over s.
template <typename T, bool FIRST, bool GRADS>
inline void flat_plane(const FlatAxis<T>& a, const FlatAxis<T>& b, T xa, T xb, const T* ya, const T* yb, int64_t n,
                       T* s, T* ga, T* gb) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T da = a.difference(xa, ya[j]), db = b.difference(xb, yb[j]);
    const T square = da * da + db * db;
    s[j] = FIRST ? square : s[j] + square;
    if (GRADS) {
      ga[j] = da;
      gb[j] = db;
    }
  }
}

template <typename T, bool FIRST, bool GRADS>
inline void klein_bottle(const KleinBottle<T>& klein, T xa, T xb, const T* ya, const T* yb, int64_t n, T* s, T* g,
                         T* g_column) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    T square, ga, gx, gy;
    klein.eval(xa, xb, ya[j], yb[j], square, ga, gx, gy);
    s[j] = FIRST ? square : s[j] + square;
    if (GRADS) {
      g[j] = ga;
      g[TILE + j] = gx;
      g_column[TILE + j] = gy;
    }
  }
}

template <typename T, bool FIRST, bool GRADS>
inline void sphere(const Sphere<T>& ball, const T* x, int64_t x_stride, const T* y, int64_t y_stride, int64_t k,
                   int64_t n, Tile<T>& tile, T* g) {
  T *minus = tile.minus, *plus = tile.plus, *s = tile.s;
  for (int64_t c = 0; c < k; ++c) {
    const T xc = x[c * x_stride];
    const T* yc = y + c * y_stride;
    const bool first = c == 0;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const T d = xc - yc[j], u = xc + yc[j];
      minus[j] = first ? d * d : minus[j] + d * d;
      plus[j] = first ? u * u : plus[j] + u * u;
    }
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    T square, factor;
    ball.eval(minus[j], plus[j], square, factor);
    s[j] = FIRST ? square : s[j] + square;
    minus[j] = factor;
  }
  if (!GRADS) return;
  for (int64_t c = 0; c < k; ++c) {
    const T xc = x[c * x_stride];
    const T* yc = y + c * y_stride;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) g[c * TILE + j] = minus[j] * (xc - yc[j]);
  }
}

template <typename T, bool FIRST, bool GRADS>
inline void factor_stage(const PenaltyProblem<T>& p, int64_t kind, int64_t k, int64_t first, const double* parameter,
                         int64_t i, int64_t j0, int64_t n, Tile<T>& tile) {
  const T* x = p.row_points + first * p.rows + i;
  const T* y = p.column_points + first * p.columns + j0;
  T* g = tile.g + first * TILE;
  if (kind == SPHERE) {
    sphere<T, FIRST, GRADS>(Sphere<T>(T(parameter[0])), x, p.rows, y, p.columns, k, n, tile, g);
  } else if (kind == KLEIN) {
    klein_bottle<T, FIRST, GRADS>(KleinBottle<T>(T(parameter[0]), T(parameter[1])), x[0], x[p.rows], y,
                                  y + p.columns, n, tile.s, g, tile.g_column + first * TILE);
  } else {
    int64_t c = 0;
    if (k % 2) {
      flat_axis<T, FIRST, GRADS>(FlatAxis<T>(T(parameter[0])), x[0], y, n, tile.s, g);
      c = 1;
    }
    for (; c < k; c += 2) {
      const FlatAxis<T> a{T(parameter[c])}, b{T(parameter[c + 1])};
      const T *ya = y + c * p.columns, *yb = ya + p.columns;
      const T xa = x[c * p.rows], xb = x[(c + 1) * p.rows];
      if (c == 0)
        flat_plane<T, FIRST, GRADS>(a, b, xa, xb, ya, yb, n, tile.s, g, g + TILE);
      else
        flat_plane<T, false, GRADS>(a, b, xa, xb, ya, yb, n, tile.s, g + c * TILE, g + (c + 1) * TILE);
    }
  }
}

template <typename T, bool GRADS>
inline void distance_stage(const PenaltyProblem<T>& p, int64_t i, int64_t j0, int64_t n, Tile<T>& tile) {
  const double* parameter = p.factor_parameters;
  int64_t coordinate = 0;
  for (int64_t q = 0; q < p.factor_count; ++q) {
    const int64_t kind = p.factors[2 * q], k = p.factors[2 * q + 1];
    if (q == 0)
      factor_stage<T, true, GRADS>(p, kind, k, coordinate, parameter, i, j0, n, tile);
    else
      factor_stage<T, false, GRADS>(p, kind, k, coordinate, parameter, i, j0, n, tile);
    parameter += kind == SPHERE ? 1 : kind == KLEIN ? 2 : k;
    coordinate += k;
  }
}

// --- inhibitor: f and df/ds from s ------------------------------------------------------------------------------

template <typename T, bool GRADS, typename Inhibitor>
inline void inhibitor_loop(const Inhibitor& inhibitor, int64_t n, Tile<T>& tile) {
  const T* s = tile.s;
  T *f = tile.f, *slope = tile.slope;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    T value, change;
    inhibitor.eval(s[j], value, change);
    f[j] = value;
    if (GRADS) slope[j] = change;
  }
}

template <typename T, bool GRADS>
inline void inhibitor_stage(const PenaltyProblem<T>& p, int64_t n, Tile<T>& tile) {
  const double* q = p.inhibitor_parameters;
  switch (p.inhibitor) {
    case DIFFERENCE_OF_GAUSSIANS: return inhibitor_loop<T, GRADS>(DifferenceOfGaussians<T>(q), n, tile);
    case DIFFUSION:
      if (q[1] == 2) return inhibitor_loop<T, GRADS>(Diffusion<T, 2>(q), n, tile);
      if (q[1] == 1) return inhibitor_loop<T, GRADS>(Diffusion<T, 1>(q), n, tile);
      return inhibitor_loop<T, GRADS>(Diffusion<T, 0>(q), n, tile);
    case SINUSOID: return inhibitor_loop<T, GRADS>(Sinusoid<T>(q), n, tile);
    case RICKER: return inhibitor_loop<T, GRADS>(RickerWavelet<T>(q), n, tile);
    case CONSTANT: return inhibitor_loop<T, GRADS>(Constant<T>(q), n, tile);
    default: return inhibitor_loop<T, GRADS>(Tabulated<T>(q, p.table, p.table_samples), n, tile);
  }
}

// --- weight: value, dW and t = df/ds |w|^l ----------------------------------------------------------------------

// POWER 1, 2, or 0 for any other l > 1. w and dw may be the weight and its gradient themselves. ADD: t of several
// gate blocks is summed. `fscale` = scale. Returns sum f |w|^l.
template <typename T, int POWER, bool DW, bool GRADS, bool ADD>
inline T weight_loop(const T* w, T* dw, const T* f, const T* slope, T* t, int64_t n, T power, T scale) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const T a = std::fabs(w[j]);
    const T low = POWER == 1 ? T(1) : POWER == 2 ? a : power_positive(a, power - 1);  // |w|^(l-1)
    const T high = a * low;
    sum += f[j] * high;
    if (DW) {
      const T along = POWER == 1 ? f[j] * scale : f[j] * scale * (power * low);
      dw[j] = w[j] > 0 ? along : (w[j] < 0 ? -along : T(0));
    }
    if (GRADS) t[j] = ADD ? t[j] + slope[j] * high : slope[j] * high;
  }
  return sum;
}

template <typename T, bool DW, bool GRADS, bool ADD>
inline T weight_stage(const PenaltyProblem<T>& p, const T* w, T* dw, const T* f, const T* slope, T* t, int64_t n) {
  const T power = T(p.power), scale = T(p.scale);
  if (p.power == 1) return weight_loop<T, 1, DW, GRADS, ADD>(w, dw, f, slope, t, n, power, scale);
  if (p.power == 2) return weight_loop<T, 2, DW, GRADS, ADD>(w, dw, f, slope, t, n, power, scale);
  return weight_loop<T, 0, DW, GRADS, ADD>(w, dw, f, slope, t, n, power, scale);
}

// --- points: row and column sums of t * g -----------------------------------------------------------------------

template <typename T, bool MIRRORED>
inline T points_loop(const T* t, const T* g, const T* g_column, T* column_sums, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const T part = t[j] * g[j];
    sum += part;
    column_sums[j] = MIRRORED ? column_sums[j] - part : column_sums[j] + t[j] * g_column[j];
  }
  return sum;
}

}  // namespace moduli::MODULI_NAMESPACE
