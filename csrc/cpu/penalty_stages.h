// The stages of a tile: one row point against n column points, n at most a tile. Each stage is one loop over buffers in the
// first-level cache, so that manifolds, inhibitors and powers add instead of multiplying. Loops run over packs; the
// buffers, the points and their padding hold whole packs, and n is a multiple of LANES.
#pragma once

#include "../distance.h"
#include "../inhibitor.h"
#include "penalty.h"

namespace moduli::MODULI_NAMESPACE {

template <typename T>
using V = typename Pack<T>::V;

// Buffers of a tile, `stride` elements apart; of coordinate c at c * stride.
template <typename T>
struct Tile {
  T *s, *f, *slope, *t, *w, *dw, *minus, *plus;
  T *g, *g_column;  // (1/2) ds/dx and, where it is not -g (the Klein bottle's second coordinate), (1/2) ds/dy

  int64_t stride;

  Tile(T* scratch, int64_t k, int64_t width)
      : s(scratch), f(s + buffer_stride(width)), slope(f + buffer_stride(width)), t(slope + buffer_stride(width)),
        w(t + buffer_stride(width)), dw(w + buffer_stride(width)), minus(dw + buffer_stride(width)),
        plus(minus + buffer_stride(width)), g(plus + buffer_stride(width)), g_column(g + k * buffer_stride(width)),
        stride(buffer_stride(width)) {}
};

// --- distance: s and g ------------------------------------------------------------------------------------------

// s of a pack, and g stored on the way: flat factors of one and two coordinates, the Klein bottle.
template <typename T, bool GRADS>
struct LineDistance {
  FlatAxis<T> axis;
  T x;
  const T* y;
  T* g;

  V<T> operator()(int64_t j) const {
    const V<T> d = axis.difference(x, load_pack<V<T>>(y + j));
    if (GRADS) store_pack(g + j, d);
    return d * d;
  }
};

template <typename T, bool GRADS>
struct PlaneDistance {
  FlatAxis<T> a, b;
  T xa, xb;
  const T *ya, *yb;
  T *ga, *gb;

  V<T> operator()(int64_t j) const {
    const V<T> da = a.difference(xa, load_pack<V<T>>(ya + j)), db = b.difference(xb, load_pack<V<T>>(yb + j));
    if (GRADS) {
      store_pack(ga + j, da);
      store_pack(gb + j, db);
    }
    return da * da + db * db;
  }
};

template <typename T, bool GRADS>
struct KleinDistance {
  KleinBottle<T> klein;
  T xa, xb;
  const T *ya, *yb;
  T *g, *g_column;
  int64_t stride;

  V<T> operator()(int64_t j) const {
    V<T> s, ga, gx, gy;
    klein.eval(xa, xb, load_pack<V<T>>(ya + j), load_pack<V<T>>(yb + j), s, ga, gx, gy);
    if (GRADS) {
      store_pack(g + j, ga);
      store_pack(g + stride + j, gx);
      store_pack(g_column + stride + j, gy);
    }
    return s;
  }
};

// By value here and below: members of an object behind a reference would be read again after every store.
template <typename T, bool FIRST, typename Distance>
inline void distance_loop(const Distance distance, int64_t n, T* s) {
#pragma omp simd
  for (int64_t j = 0; j < n; j += Pack<T>::LANES) {
    const V<T> part = distance(j);
    store_pack(s + j, FIRST ? part : load_pack<V<T>>(s + j) + part);
  }
}

template <typename T, bool FIRST, bool GRADS>
inline void sphere(const Sphere<T> ball, const T* x, int64_t x_stride, const T* y, int64_t y_stride, int64_t k,
                   int64_t n, Tile<T>& tile, T* g) {
  T *minus = tile.minus, *plus = tile.plus, *s = tile.s;
  for (int64_t c = 0; c < k; ++c) {
    const T xc = x[c * x_stride];
    const T* yc = y + c * y_stride;
    const bool first = c == 0;
#pragma omp simd
    for (int64_t j = 0; j < n; j += Pack<T>::LANES) {
      const V<T> yj = load_pack<V<T>>(yc + j), d = xc - yj, u = xc + yj;
      store_pack(minus + j, first ? d * d : load_pack<V<T>>(minus + j) + d * d);
      store_pack(plus + j, first ? u * u : load_pack<V<T>>(plus + j) + u * u);
    }
  }
#pragma omp simd
  for (int64_t j = 0; j < n; j += Pack<T>::LANES) {
    V<T> square, factor;
    ball.eval(load_pack<V<T>>(minus + j), load_pack<V<T>>(plus + j), square, factor);
    store_pack(s + j, FIRST ? square : load_pack<V<T>>(s + j) + square);
    store_pack(minus + j, factor);
  }
  if (!GRADS) return;
  for (int64_t c = 0; c < k; ++c) {
    const T xc = x[c * x_stride];
    const T* yc = y + c * y_stride;
#pragma omp simd
    for (int64_t j = 0; j < n; j += Pack<T>::LANES)
      store_pack(g + c * tile.stride + j, load_pack<V<T>>(minus + j) * (xc - load_pack<V<T>>(yc + j)));
  }
}

// Where one factor lies: its row point x[c * rows] and column points y[c * columns + j] (strides of the arrays).
template <typename T, bool GRADS>
struct FactorView {
  const T *x, *y;
  int64_t rows, columns;
  T *g, *g_column;
  int64_t stride;  // of g
  const double* parameter;

  __attribute__((always_inline)) LineDistance<T, GRADS> line(int64_t c) const {
    return {FlatAxis<T>(T(parameter[c])), x[c * rows], y + c * columns, g + c * stride};
  }
  __attribute__((always_inline)) PlaneDistance<T, GRADS> plane(int64_t c) const {
    const LineDistance<T, GRADS> a = line(c), b = line(c + 1);
    return {a.axis, b.axis, a.x, b.x, a.y, b.y, a.g, b.g};
  }
  KleinDistance<T, GRADS> klein() const {
    return {KleinBottle<T>(T(parameter[0]), T(parameter[1])), x[0], x[rows], y, y + columns, g, g_column, stride};
  }
};

template <typename T, bool GRADS>
inline FactorView<T, GRADS> factor_view(const PenaltyProblem<T>& p, int64_t first, const double* parameter, int64_t i,
                                        int64_t j0, const Tile<T>& tile) {
  return {p.row_points + first * p.row_point_stride + i, p.column_points + first * p.column_stride + j0,
          p.row_point_stride, p.column_stride, tile.g + first * tile.stride, tile.g_column + first * tile.stride,
          tile.stride, parameter};
}

template <typename T, bool FIRST, bool GRADS>
inline void factor_stage(const FactorView<T, GRADS>& view, int64_t kind, int64_t k, int64_t n, Tile<T>& tile) {
  if (kind == SPHERE) {
    sphere<T, FIRST, GRADS>(Sphere<T>(T(view.parameter[0])), view.x, view.rows, view.y, view.columns, k, n, tile,
                            view.g);
  } else if (kind == KLEIN) {
    distance_loop<T, FIRST>(view.klein(), n, tile.s);
  } else {
    if (k % 2) distance_loop<T, FIRST>(view.line(0), n, tile.s);
    for (int64_t c = k % 2; c < k; c += 2)
      if (c == 0)
        distance_loop<T, FIRST>(view.plane(0), n, tile.s);
      else
        distance_loop<T, false>(view.plane(c), n, tile.s);
  }
}

template <typename T, bool GRADS>
inline void distance_stage(const PenaltyProblem<T>& p, int64_t i, int64_t j0, int64_t n, Tile<T>& tile) {
  if (p.inhibitor == CONSTANT && !GRADS) {  // nothing depends on s but whether the points are finite: one column tells
    const LineDistance<T, false> line{FlatAxis<T>(T(0)), p.row_points[i], p.column_points + j0, nullptr};
    return distance_loop<T, true>(line, n, tile.s);
  }
  const double* parameter = p.factor_parameters;
  int64_t first = 0;
  for (int64_t q = 0; q < p.factor_count; ++q) {
    const int64_t kind = p.factors[2 * q], k = p.factors[2 * q + 1];
    const auto view = factor_view<T, GRADS>(p, first, parameter, i, j0, tile);
    if (q == 0)
      factor_stage<T, true>(view, kind, k, n, tile);
    else
      factor_stage<T, false>(view, kind, k, n, tile);
    parameter += kind == SPHERE ? 1 : kind == KLEIN ? 2 : k;
    first += k;
  }
}

// --- inhibitor: f and df/ds from s ------------------------------------------------------------------------------

// What crosses to and from memory while the exponentials of a tile are worked out, one line at a time: met in one
// burst, as the weight stage would, memory could not follow. Asked for: the weights of the tile after this (w) and,
// where the gradient stays in the caches, the lines it will fill (dw). Sent off: `count` elements of the gradient of
// the tile before (from), past the caches (to). Null where there is nothing to do.
template <typename T>
struct Traffic {
  const char *w, *dw;
  int64_t bytes;  // a weight
  const T* from;
  T* to;
  int64_t count;

  __attribute__((always_inline)) void at(int64_t j) const {
    if (w) __builtin_prefetch(w + j * bytes, 0, 3);
    if (dw) __builtin_prefetch(dw + j * bytes, 1, 3);
    if (j < count) stream_pack(to + j, load_pack<V<T>>(from + j));
  }
  void rest(int64_t j) const {
    for (; j < count; j += Pack<T>::LANES) stream_pack(to + j, load_pack<V<T>>(from + j));
  }
};

template <typename T, bool GRADS, typename Inhibitor>
inline void inhibitor_loop(const Inhibitor inhibitor, int64_t n, const Tile<T>& tile, const Traffic<T> traffic) {
  const T* s = tile.s;
  T *f = tile.f, *slope = tile.slope;
#pragma omp simd
  for (int64_t j = 0; j < n; j += Pack<T>::LANES) {
    if (Pack<T>::LANES > 1) traffic.at(j);
    V<T> value, change;
    inhibitor.eval(load_pack<V<T>>(s + j), value, change);
    store_pack(f + j, value);
    if (GRADS) store_pack(slope + j, change);
  }
}

template <typename T, bool GRADS>
inline void inhibitor_stage(const PenaltyProblem<T>& p, int64_t n, const Tile<T>& tile, const Traffic<T>& traffic) {
  const double* q = p.inhibitor_parameters;
  switch (p.inhibitor) {
    case DIFFERENCE_OF_GAUSSIANS: return inhibitor_loop<T, GRADS>(DifferenceOfGaussians<T>(q), n, tile, traffic);
    case DIFFUSION:
      if (q[1] == 2) return inhibitor_loop<T, GRADS>(Diffusion<T, 2>(q), n, tile, traffic);
      if (q[1] == 1) return inhibitor_loop<T, GRADS>(Diffusion<T, 1>(q), n, tile, traffic);
      return inhibitor_loop<T, GRADS>(Diffusion<T, 0>(q), n, tile, traffic);
    case SINUSOID: return inhibitor_loop<T, GRADS>(Sinusoid<T>(q), n, tile, traffic);
    case RICKER: return inhibitor_loop<T, GRADS>(RickerWavelet<T>(q), n, tile, traffic);
    case CONSTANT: return inhibitor_loop<T, GRADS>(Constant<T>(q), n, tile, traffic);
    default: return inhibitor_loop<T, GRADS>(Tabulated<T>(q, p.table, p.table_samples), n, tile, traffic);
  }
}

// --- weight and points: value, dW, t = df/ds |w|^l and the sums of t * g ----------------------------------------

// What the weights of a tile meet: coefficients in, gradients out.
template <typename T>
struct WeightTile {
  const T *w, *f, *slope;
  T *dw, *t;
  T power, scale;
};

template <typename T, int POWER>  // POWER 1, 2, or 0 for any other l > 1
struct Magnitude {
  V<T> low, high;  // |w|^(l-1) and |w|^l; low unused for l = 1

  Magnitude(V<T> w, T power) {
    const V<T> a = absolute(w);
    low = POWER == 2 ? a : POWER == 1 ? V<T>{} : power_positive(a, power - 1);
    high = POWER == 1 ? a : a * low;
  }
};

// Of a plane of two mirrored coordinates: g in; sums of t * g out, added to the columns' and one a row.
template <typename T>
struct PlaneSums {
  const T *ga, *gb;
  T *column_a, *column_b, *row;
};

// PLANE: sums.row and the columns' sums on the way, t is then not stored. ADD: t of several gate blocks is summed.
// Returns sum f |w|^l.
template <typename T, int POWER, bool DW, bool GRADS, bool PLANE, bool ADD>
inline T weight_loop(const WeightTile<T> io, int64_t n, const PlaneSums<T> sums) {
  V<T> sum{}, sum_a{}, sum_b{};
  const T *w = io.w, *f = io.f, *slope = io.slope;
  T *dw = io.dw, *t = io.t;
  const T power = io.power, scale = io.scale;
  for (int64_t j = 0; j < n; j += Pack<T>::LANES) {
    const V<T> wj = load_pack<V<T>>(w + j), fj = load_pack<V<T>>(f + j);
    const Magnitude<T, POWER> m(wj, power);
    sum += fj * m.high;
    if (DW) store_pack(dw + j, signed_by(POWER == 1 ? fj * scale : fj * scale * (power * m.low), wj));
    if (!GRADS) continue;
    const V<T> tj = load_pack<V<T>>(slope + j) * m.high;
    if (PLANE) {
      const V<T> a = tj * load_pack<V<T>>(sums.ga + j), b = tj * load_pack<V<T>>(sums.gb + j);
      sum_a += a;
      sum_b += b;
      store_pack(sums.column_a + j, load_pack<V<T>>(sums.column_a + j) - a);
      store_pack(sums.column_b + j, load_pack<V<T>>(sums.column_b + j) - b);
    } else {
      store_pack(t + j, ADD ? load_pack<V<T>>(t + j) + tj : tj);
    }
  }
  if (PLANE) {
    sums.row[0] = sum_lanes(sum_a);
    sums.row[1] = sum_lanes(sum_b);
  }
  return sum_lanes(sum);
}

// Sums of t * g over a row (returned) and into the columns, of one coordinate.
template <typename T, bool MIRRORED>
inline T points_loop(const T* t, const T* g, const T* g_column, T* column_sums, int64_t n) {
  V<T> sum{};
  for (int64_t j = 0; j < n; j += Pack<T>::LANES) {
    const V<T> tj = load_pack<V<T>>(t + j), part = tj * load_pack<V<T>>(g + j);
    sum += part;
    const V<T> sums = load_pack<V<T>>(column_sums + j);
    store_pack(column_sums + j, MIRRORED ? sums - part : sums + tj * load_pack<V<T>>(g_column + j));
  }
  return sum_lanes(sum);
}

}  // namespace moduli::MODULI_NAMESPACE
