// Third stage of a tile: value, dW, t = df/ds |w|^l and the sums of t * g.
#pragma once

#include "tile.h"

namespace moduli::MODULI_NAMESPACE {

// What the weights of a tile meet: coefficients in, gradients out.
template <typename T>
struct WeightTile {
  const T* w;
  T* mirrored;  // weights of the entries across the diagonal in, their gradients out; or null
  const T *f, *slope;
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
  V<T> gradient(V<T> f, T power, V<T> w) const { return signed_by(POWER == 1 ? f : f * (power * low), w); }
};

// Of a plane of two mirrored coordinates: g in; sums of t * g out, added to the columns' and one a row.
template <typename T>
struct PlaneSums {
  const T *ga, *gb;
  T *column_a, *column_b, *row;
};

// MIRRORED: each coefficient is that of two weights. PLANE: sums.row and the columns' sums on the way, t is then not stored. ADD: t of several gate blocks is summed.
// Returns sum f |w|^l.
template <typename T, int POWER, bool DW, bool GRADS, bool PLANE, bool ADD, bool MIRRORED>
inline T weight_loop(const WeightTile<T> io, int64_t n, const PlaneSums<T> sums) {
  V<T> sum{}, sum_a{}, sum_b{};
  const T *w = io.w, *f = io.f, *slope = io.slope;
  T *dw = io.dw, *t = io.t, *mirrored = io.mirrored;
  const T power = io.power, scale = io.scale;
  for (int64_t j = 0; j < n; j += Pack<T>::LANES) {
    const V<T> wj = load_pack<V<T>>(w + j), fj = load_pack<V<T>>(f + j);
    const Magnitude<T, POWER> m(wj, power);
    V<T> all = m.high;
    if (DW) store_pack(dw + j, m.gradient(fj * scale, power, wj));
    if (MIRRORED) {
      const V<T> uj = load_pack<V<T>>(mirrored + j);
      const Magnitude<T, POWER> other(uj, power);
      all += other.high;
      if (DW) store_pack(mirrored + j, other.gradient(fj * scale, power, uj));
    }
    sum += fj * all;
    if (!GRADS) continue;
    const V<T> tj = load_pack<V<T>>(slope + j) * all;
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
