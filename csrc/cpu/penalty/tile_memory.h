// How a tile meets memory: weights are read, gradients are written, and the sums of the points are added up. All tasks
// use this: loops.h, mirrored_task.h, kept_entries.h and proximal_task.h.
#pragma once

#include "cpu/penalty/distance_stage.h"
#include "cpu/penalty/inhibitor_stage.h"
#include "cpu/penalty/weight_stage.h"
#include "cpu/penalty/weight_types.h"

namespace moduli::MODULI_NAMESPACE {

// The function returns n weights of a row. `at` is the first one in the weight, `mask_at` in the mask. They are those
// in memory if these can be used in place. Otherwise they are copied to tile.w: converted, 0 where masked, the norms of
// kernels in the place of kernels, padded with 0 to whole packs.
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

// The function copies f to tile.minus and the slope to tile.plus, and puts 0 where every entry of a kernel is masked,
// so that a masked entry costs nothing, even if its points aren't finite.
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

// The function writes, or adds, n gradients to the weight's gradient from element `out` on.
template <typename T>
inline void write_gradient(const PenaltyProblem<T>& p, int64_t out, int64_t n, const T* from) {
  if (!p.accumulate) return store(p.dweight, p.weight_type, out, n, from);
  if (p.weight_type != weight_type(T())) return add(p.dweight, p.weight_type, out, n, from);
  T* to = static_cast<T*>(p.dweight) + out;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] += from[j];
}

// The function writes dW of kernels, which is that of their norms (tile.dw) times w / |w|, and 0 where masked.
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

// The sums of the points of row i, over n columns, are added to parts: coordinate c of the row to
// row_parts[c * row_part_stride + i], that of column j of the tile to column_parts[c * p.column_stride + j].
template <typename T>
inline void points_row(const PenaltyProblem<T>& p, int64_t i, int64_t n, const Tile<T>& tile, T* row_parts,
                       int64_t row_part_stride, T* column_parts) {
  for (int64_t c = 0; c < p.coordinates; ++c) {
    const T *g = tile.g + c * tile.stride, *g_column = tile.g_column + c * tile.stride;
    T* sums = column_parts + c * p.column_stride;
    row_parts[c * row_part_stride + i] += p.opposite[c] ? points_loop<T, true>(tile.t, g, g_column, sums, n)
                                                        : points_loop<T, false>(tile.t, g, g_column, sums, n);
  }
}

// The lines that the tile of row i and columns from j0 on will read and fill.
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
