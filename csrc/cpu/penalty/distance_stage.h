// First stage of a tile: squared distances s, and g = (1/2) ds/dx where gradients of the points are wanted.
#pragma once

#include "../distance.h"
#include "tile.h"

namespace moduli::MODULI_NAMESPACE {

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
                                        const T* y, int64_t y_stride, const Tile<T>& tile) {
  return {p.row_points + first * p.row_point_stride + i, y + first * y_stride,
          p.row_point_stride, y_stride, tile.g + first * tile.stride, tile.g_column + first * tile.stride,
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

// Row point i against n column points, y[c * y_stride + j].
template <typename T, bool GRADS>
inline void distance_stage(const PenaltyProblem<T>& p, int64_t i, const T* y, int64_t y_stride, int64_t n, Tile<T>& tile) {
  if (p.inhibitor == CONSTANT && !GRADS) {  // nothing depends on s but whether the points are finite: one column tells
    const LineDistance<T, false> line{FlatAxis<T>(T(0)), p.row_points[i], y, nullptr};
    return distance_loop<T, true>(line, n, tile.s);
  }
  const double* parameter = p.factor_parameters;
  int64_t first = 0;
  for (int64_t q = 0; q < p.factor_count; ++q) {
    const int64_t kind = p.factors[2 * q], k = p.factors[2 * q + 1];
    const auto view = factor_view<T, GRADS>(p, first, parameter, i, y, y_stride, tile);
    if (q == 0)
      factor_stage<T, true>(view, kind, k, n, tile);
    else
      factor_stage<T, false>(view, kind, k, n, tile);
    parameter += kind == SPHERE ? 1 : kind == KLEIN ? 2 : k;
    first += k;
  }
}

}  // namespace moduli::MODULI_NAMESPACE
