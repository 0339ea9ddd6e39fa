// First stage of a tile: squared distances s, and g = (1/2) ds/dx if gradients of the points are wanted.
#pragma once

#include "cpu/penalty/tile.h"
#include "manifolds.h"

namespace moduli::MODULI_NAMESPACE {

// One factor of a row point, the column points, and where g goes. Coordinate c of the row point is x[c * x_stride], of
// column point j it is y[c * y_stride + j].
template <typename T>
struct FactorView {
  const T *x, *y;
  int64_t x_stride, y_stride;
  T *g, *g_column;
  int64_t g_stride;
};

// The structs below compute s for the pack of columns at j, and store g on the way.

// One column of Form::COLUMN_BY_COLUMN
template <typename Axis, typename T, bool GRADS>
struct LineDistance {
  Axis axis;
  T x;
  const T* y;
  T* g;

  V<T> operator()(int64_t j) const {
    const V<T> d = axis.difference(x, load_pack<V<T>>(y + j));
    if (GRADS) store_pack(g + j, d);
    return d * d;
  }
};

// Two columns of Form::COLUMN_BY_COLUMN
template <typename Axis, typename T, bool GRADS>
struct PlaneDistance {
  Axis a, b;
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

// Form::ALL_COLUMNS
template <typename Manifold, typename T, bool GRADS>
struct JointDistance {
  static constexpr int64_t COLUMNS = Manifold::COLUMNS;
  Manifold manifold;
  T x[COLUMNS];
  const T* y;
  int64_t y_stride;
  T *g, *g_column;
  int64_t g_stride;

  V<T> operator()(int64_t j) const {
    V<T> s, yj[COLUMNS], gj[COLUMNS], gj_column[COLUMNS];
    for (int64_t c = 0; c < COLUMNS; ++c) yj[c] = load_pack<V<T>>(y + c * y_stride + j);
    manifold.eval(x, yj, s, gj, gj_column);
    for (int64_t c = 0; GRADS && c < COLUMNS; ++c) {
      store_pack(g + c * g_stride + j, gj[c]);
      if (!Manifold::opposite(c)) store_pack(g_column + c * g_stride + j, gj_column[c]);
    }
    return s;
  }
};

// s (+)= distance, for n columns; the first factor writes s, later ones add to it. The struct is passed by value here
// and below, since members of an object behind a reference would be read again after every store.
template <typename T, bool FIRST, typename Distance>
inline void distance_loop(const Distance distance, int64_t n, T* s) {
#pragma omp simd
  for (int64_t j = 0; j < n; j += Pack<T>::LANES) {
    const V<T> part = distance(j);
    store_pack(s + j, FIRST ? part : load_pack<V<T>>(s + j) + part);
  }
}

// Form::COLUMN_BY_COLUMN, two columns at a time
template <typename T, bool FIRST, bool GRADS, typename Manifold>
__attribute__((always_inline)) inline void axes_loops(const Manifold& manifold, const FactorView<T>& view, int64_t columns,
                                                      int64_t n, Tile<T>& tile) {
  using Axis = decltype(manifold.axis(0));
  const auto line = [&](int64_t c) __attribute__((always_inline)) {
    return LineDistance<Axis, T, GRADS>{.axis = manifold.axis(c),
                                        .x = view.x[c * view.x_stride],
                                        .y = view.y + c * view.y_stride,
                                        .g = view.g + c * view.g_stride};
  };
  const auto plane = [&](int64_t c) __attribute__((always_inline)) {
    const auto a = line(c), b = line(c + 1);
    return PlaneDistance<Axis, T, GRADS>{
        .a = a.axis, .b = b.axis, .xa = a.x, .xb = b.x, .ya = a.y, .yb = b.y, .ga = a.g, .gb = b.g};
  };
  if (columns % 2) distance_loop<T, FIRST>(line(0), n, tile.s);
  for (int64_t c = columns % 2; c < columns; c += 2)
    if (c == 0)
      distance_loop<T, FIRST>(plane(0), n, tile.s);
    else
      distance_loop<T, false>(plane(c), n, tile.s);
}

// Form::CHORDS: sums over columns, then s, then g.
template <typename T, bool FIRST, bool GRADS, typename Manifold>
inline void chords_loops(const Manifold manifold, const FactorView<T> view, int64_t columns, int64_t n, Tile<T>& tile) {
  // Packs skip the factor if g isn't wanted. For scalars eval() is mostly one call of libm, and skipping saves nothing.
  constexpr bool WITH_FACTOR = GRADS || Pack<T>::LANES == 1;
  T *minus = tile.minus, *plus = tile.plus, *s = tile.s;
  for (int64_t c = 0; c < columns; ++c) {
    const T xc = view.x[c * view.x_stride];
    const T* yc = view.y + c * view.y_stride;
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
    if constexpr (WITH_FACTOR)
      manifold.eval(load_pack<V<T>>(minus + j), load_pack<V<T>>(plus + j), square, factor);
    else
      square = manifold.square(load_pack<V<T>>(minus + j), load_pack<V<T>>(plus + j));
    store_pack(s + j, FIRST ? square : load_pack<V<T>>(s + j) + square);
    if (WITH_FACTOR) store_pack(minus + j, factor);
  }
  if (!GRADS) return;
  for (int64_t c = 0; c < columns; ++c) {
    const T xc = view.x[c * view.x_stride];
    const T* yc = view.y + c * view.y_stride;
    T* gc = view.g + c * view.g_stride;
#pragma omp simd
    for (int64_t j = 0; j < n; j += Pack<T>::LANES)
      store_pack(gc + j, load_pack<V<T>>(minus + j) * (xc - load_pack<V<T>>(yc + j)));
  }
}

template <typename T, bool FIRST, bool GRADS>
inline void factor_stage(const Factor& factor, const FactorView<T>& view, int64_t n, Tile<T>& tile) {
  with_manifold<T>(factor.code, [&](auto type) __attribute__((always_inline)) {
    using Manifold = typename decltype(type)::Member;
    const Manifold manifold(factor.parameters);
    if constexpr (Manifold::FORM == Form::COLUMN_BY_COLUMN) {
      axes_loops<T, FIRST, GRADS>(manifold, view, factor.columns, n, tile);
    } else if constexpr (Manifold::FORM == Form::CHORDS) {
      chords_loops<T, FIRST, GRADS>(manifold, view, factor.columns, n, tile);
    } else {
      JointDistance<Manifold, T, GRADS> distance{.manifold = manifold,
                                                 .x = {},
                                                 .y = view.y,
                                                 .y_stride = view.y_stride,
                                                 .g = view.g,
                                                 .g_column = view.g_column,
                                                 .g_stride = view.g_stride};
      for (int64_t c = 0; c < Manifold::COLUMNS; ++c) distance.x[c] = view.x[c * view.x_stride];
      distance_loop<T, FIRST>(distance, n, tile.s);
    }
  });
}

// A constant inhibitor reads nothing from s but whether it is NaN, and a point that isn't finite is NaN in all columns,
// so that the first column is enough.
template <typename T>
struct AnyDistance {
  T x;
  const T* y;

  V<T> operator()(int64_t j) const {
    const V<T> d = x - load_pack<V<T>>(y + j);
    return d * d;
  }
};

// s, and g if GRADS, of row point i against n column points. Coordinate c of column point j is y[c * y_stride + j].
template <typename T, bool GRADS>
inline void distance_stage(const PenaltyProblem<T>& p, int64_t i, const T* y, int64_t y_stride, int64_t n, Tile<T>& tile) {
  if (p.constant_inhibitor && !GRADS)
    return distance_loop<T, true>(AnyDistance<T>{.x = p.row_points[i], .y = y}, n, tile.s);
  for (int64_t q = 0; q < p.factor_count; ++q) {
    const Factor& factor = p.factors[q];
    const int64_t first = factor.first;
    const FactorView<T> view{.x = p.row_points + first * p.row_point_stride + i,
                             .y = y + first * y_stride,
                             .x_stride = p.row_point_stride,
                             .y_stride = y_stride,
                             .g = tile.g + first * tile.stride,
                             .g_column = tile.g_column + first * tile.stride,
                             .g_stride = tile.stride};
    if (q == 0)
      factor_stage<T, true, GRADS>(factor, view, n, tile);
    else
      factor_stage<T, false, GRADS>(factor, view, n, tile);
  }
}

}  // namespace moduli::MODULI_NAMESPACE
