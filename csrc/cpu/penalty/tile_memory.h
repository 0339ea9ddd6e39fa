// A tile between memory and its stages: weights in, gradients out, sums of the points. Shared by the
// tasks: rectangular (penalty_loops.h), mirrored (penalty_mirrored.h), of few kept entries (penalty_kept.h).
#pragma once

#include "convert.h"
#include "stage_distance.h"
#include "stage_inhibitor.h"
#include "stage_weight.h"

namespace moduli::MODULI_NAMESPACE {

template <typename T>
constexpr int64_t padded(int64_t n) {
  return (n + Pack<T>::LANES - 1) / Pack<T>::LANES * Pack<T>::LANES;
}

constexpr WeightType weight_type(float) { return WeightType::FLOAT32; }
constexpr WeightType weight_type(double) { return WeightType::FLOAT64; }

// The weights of (block b, row i, columns j0 .. j0+n) as they are, or gathered into tile.w: converted, masked entries
// 0, kernels reduced to their norm, padded with 0 to whole packs.
template <typename T>
inline const T* read_weights(const PenaltyProblem<T>& p, int64_t at, int64_t mask_at, int64_t n, Tile<T>& tile) {
  const int64_t q = p.inner;
  if (q == 1) {
    if (p.weight_type == weight_type(T()) && !p.mask && n % Pack<T>::LANES == 0)
      return static_cast<const T*>(p.weight) + at;
    load(p.weight, p.weight_type, at, n, tile.w);
    if (p.mask)
      for (int64_t j = 0; j < n; ++j) tile.w[j] = p.mask[mask_at + j] ? tile.w[j] : T(0);
  } else {
    for (int64_t j = 0; j < n; ++j) {
      T squares = 0;
      for (int64_t l = 0; l < q; ++l) {
        T w = 0;
        load(p.weight, p.weight_type, at + j * q + l, 1, &w);
        squares += p.mask && !p.mask[mask_at + j * q + l] ? T(0) : w * w;
      }
      tile.w[j] = std::sqrt(squares);
    }
  }
  for (int64_t j = n; j < padded<T>(n); ++j) tile.w[j] = 0;
  return tile.w;
}

// f with 0 where every entry of a kernel is masked (in tile.minus), so that a masked entry costs nothing, also where
// its points are not finite.
template <typename T>
inline void mask_coefficients(const PenaltyProblem<T>& p, int64_t mask_at, int64_t n, Tile<T>& tile) {
  for (int64_t j = 0; j < n; ++j) {
    uint8_t kept = 0;
    for (int64_t l = 0; l < p.inner; ++l) kept |= p.mask[mask_at + j * p.inner + l];
    tile.minus[j] = kept ? tile.f[j] : T(0);
    tile.plus[j] = kept ? tile.slope[j] : T(0);
  }
  for (int64_t j = n; j < padded<T>(n); ++j) tile.minus[j] = tile.plus[j] = 0;
}

template <typename T>
inline void write_gradient(const PenaltyProblem<T>& p, int64_t out, int64_t n, const T* from) {
  if (!p.accumulate) return store(p.dweight, p.weight_type, out, n, from);
  if (p.weight_type != weight_type(T())) return add(p.dweight, p.weight_type, out, n, from);
  T* to = static_cast<T*>(p.dweight) + out;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] += from[j];
}

// dW of the kernels from that of their norms: dw * w / |w|, 0 where masked.
template <typename T>
inline void write_kernels(const PenaltyProblem<T>& p, int64_t at, int64_t out, int64_t n, const Tile<T>& tile) {
  for (int64_t j = 0; j < n; ++j) {
    const T per_norm = tile.w[j] == 0 ? T(0) : tile.dw[j] / tile.w[j];
    for (int64_t l = 0; l < p.inner; ++l) {
      T w = 0;
      load(p.weight, p.weight_type, at + j * p.inner + l, 1, &w);
      const T dw = p.mask && !p.mask[out + j * p.inner + l] ? T(0) : per_norm * w;
      write_gradient(p, out + j * p.inner + l, 1, &dw);
    }
  }
}

template <typename T>
inline void points_row(const PenaltyProblem<T>& p, int64_t i, int64_t n, const Tile<T>& tile, T* row_parts,
                       int64_t row_part_stride, T* column_parts) {
  int64_t c = 0;
  for (int64_t q = 0; q < p.factor_count; ++q) {
    const int64_t kind = p.factors[2 * q], end = c + p.factors[2 * q + 1];
    const int64_t unmirrored = kind == KLEIN ? c + 1 : -1;
    for (; c < end; ++c) {
      const T *g = tile.g + c * tile.stride, *g_column = tile.g_column + c * tile.stride;
      T* sums = column_parts + c * p.column_stride;
      row_parts[c * row_part_stride + i] += c == unmirrored ? points_loop<T, false>(tile.t, g, g_column, sums, n)
                                                   : points_loop<T, true>(tile.t, g, g_column, sums, n);
    }
  }
}

// Two flat coordinates and no gate blocks: the sums of the points need no loop of their own.
template <typename T>
inline bool is_plane(const PenaltyProblem<T>& p) {
  return p.blocks == 1 && p.factor_count == 1 && p.factors[0] == FLAT && p.factors[1] == 2;
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

// What tile (i, j0) wants asked for in advance.
template <typename T>
inline Traffic<T> traffic_before(const PenaltyProblem<T>& p, int64_t i, int64_t j0) {
  Traffic<T> traffic{};
  if (p.inner > 1) return traffic;
  traffic.bytes = p.weight_size;
  traffic.w = static_cast<const char*>(p.weight) + (i * p.row_stride + j0) * p.weight_size;
  if (p.dweight && !p.stream) traffic.dw = static_cast<const char*>(p.dweight) + (i * p.columns + j0) * p.weight_size;
  return traffic;
}

}  // namespace moduli::MODULI_NAMESPACE
