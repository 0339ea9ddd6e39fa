// Third stage of a tile: value, dW, t = df/ds |w|^l and the sums of t * g.
#pragma once

#include "cpu/penalty/tile.h"

namespace moduli::MODULI_NAMESPACE {

// What a row of weights meets: coefficients come in, gradients go out.
template <typename T>
struct WeightTile {
  const T* w;
  T* mirrored;  // weights of the entries across the diagonal, replaced by their gradients; or null
  const T *f, *slope;
  T *dw, *t;
  T power, scale;
};

// What weights w meet in a tile, with its gradients in its buffers
template <typename T>
inline WeightTile<T> weight_tile(const PenaltyProblem<T>& p, const Tile<T>& tile, const T* w) {
  return {.w = w,
          .mirrored = nullptr,
          .f = tile.f,
          .slope = tile.slope,
          .dw = tile.dw,
          .t = tile.t,
          .power = T(p.power),
          .scale = T(p.scale)};
}

// |w|^(l-1) and |w|^l of a pack. POWER is l if l is 1 or 2, or 0 for any other l > 1.
template <typename T, int POWER>
struct Magnitude {
  V<T> low, high;  // low is unused for l = 1

  Magnitude(V<T> w, T power) {
    const V<T> a = absolute(w);
    low = POWER == 2 ? a : POWER == 1 ? V<T>{} : power_positive(a, power - 1);
    high = POWER == 1 ? a : a * low;
  }
  V<T> gradient(V<T> f, T power, V<T> w) const { return signed_by(POWER == 1 ? f : f * (power * low), w); }
};

// The sums of t * g for the two coordinates a and b of a plane (PenaltyProblem::plane).
template <typename T>
struct PlaneSums {
  const T *ga, *gb;
  T *column_a, *column_b;  // the sums of the columns, which are added to
  T* row;                  // (2): the sums of the row
};

template <typename T>
inline PlaneSums<T> plane_sums(const PenaltyProblem<T>& p, const Tile<T>& tile, T* column_parts, T* row) {
  return {.ga = tile.g,
          .gb = tile.g + tile.stride,
          .column_a = column_parts,
          .column_b = column_parts + p.column_stride,
          .row = row};
}

// The function returns the sum of f |w|^l over n columns, and computes dW if DW, and t if GRADS.
//   PLANE     sums.row and the sums of the columns are computed on the way, and t isn't stored
//   ADD       t is added to what it holds, since several gate blocks share a row point
//   MIRRORED  each coefficient belongs to two weights
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

template <typename T, int POWER, bool DW, bool GRADS, bool MIRRORED>
inline T weight_stage(const WeightTile<T>& io, int64_t n, bool plane, bool add, const PlaneSums<T>& sums) {
  if constexpr (GRADS) {
    if (plane) return weight_loop<T, POWER, DW, true, true, false, MIRRORED>(io, n, sums);
    if constexpr (!MIRRORED)
      if (add) return weight_loop<T, POWER, DW, true, false, true, false>(io, n, sums);
  }
  return weight_loop<T, POWER, DW, GRADS, false, false, MIRRORED>(io, n, sums);
}

template <typename T, bool DW, bool GRADS, bool MIRRORED>
inline T weight_stage(const WeightTile<T>& io, int64_t n, bool plane, bool add, const PlaneSums<T>& sums) {
  return io.power == 1   ? weight_stage<T, 1, DW, GRADS, MIRRORED>(io, n, plane, add, sums)
         : io.power == 2 ? weight_stage<T, 2, DW, GRADS, MIRRORED>(io, n, plane, add, sums)
                         : weight_stage<T, 0, DW, GRADS, MIRRORED>(io, n, plane, add, sums);
}

// The sums of t * g over a row (returned) and into its columns, for one coordinate.
template <typename T, bool OPPOSITE>
inline T points_loop(const T* t, const T* g, const T* g_column, T* column_sums, int64_t n) {
  V<T> sum{};
  for (int64_t j = 0; j < n; j += Pack<T>::LANES) {
    const V<T> tj = load_pack<V<T>>(t + j), part = tj * load_pack<V<T>>(g + j);
    sum += part;
    const V<T> sums = load_pack<V<T>>(column_sums + j);
    store_pack(column_sums + j, OPPOSITE ? sums - part : sums + tj * load_pack<V<T>>(g_column + j));
  }
  return sum_lanes(sum);
}

}  // namespace moduli::MODULI_NAMESPACE
