// A task of the proximal step: w becomes sign(w) max(|w| - scale f, 0) in place, where p.dweight is the weight's own
// memory; a kernel w becomes w max(1 - scale f / |w|, 0). Masked entries are left alone. NaN stays NaN.
#pragma once

#include "cpu/common/chunks.h"
#include "cpu/penalty/kept_entries.h"

namespace moduli::MODULI_NAMESPACE {

// max(a - threshold, 0) for a >= 0. If the threshold is negative, 0 stays 0.
template <typename T>
inline T shrunk(T a, T threshold) {
  const T left = a - threshold;
  return a == 0 && threshold == threshold ? T(0) : left <= 0 ? T(0) : left;
}

// The function puts the weights tile.w after the step into tile.dw.
template <typename T>
inline void shrink(const PenaltyProblem<T>& p, int64_t n, Tile<T>& tile) {
  const T scale = T(p.scale);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) tile.dw[j] = std::copysign(shrunk(std::fabs(tile.w[j]), scale * tile.f[j]), tile.w[j]);
}

// The same for n kernels, in memory. tile.w holds their norms; `at` is the first one in the weight, `mask_at` in the
// mask.
template <typename T>
inline void shrink_kernels(const PenaltyProblem<T>& p, int64_t at, int64_t mask_at, int64_t n, const Tile<T>& tile) {
  for (int64_t j = 0; j < n; ++j) {
    const T norm = tile.w[j], factor = norm == 0 ? T(0) : shrunk(norm, T(p.scale) * tile.f[j]) / norm;
    for (int64_t l = 0; l < p.inner; ++l) {
      if (p.mask && !p.mask[mask_at + j * p.inner + l]) continue;
      T w = 0;
      load(p.weight, p.weight_type, at + j * p.inner + l, 1, &w);
      w *= factor;
      store(p.dweight, p.weight_type, at + j * p.inner + l, 1, &w);
    }
  }
}

// The step of row i, columns j0 .. j0 + n, in all blocks
template <typename T>
inline void proximal_tile(const PenaltyProblem<T>& p, int64_t i, int64_t j0, int64_t n, Tile<T>& tile) {
  distance_stage<T, false>(p, i, p.column_points + j0, p.column_stride, padded<T>(n), tile);
  inhibitor_stage<T, false>(padded<T>(n), tile, Traffic<T>{});
  for (int64_t b = 0; b < p.blocks; ++b) {
    const int64_t row = b * p.rows + i, at = row * p.row_stride + j0 * p.inner, mask_at = (row * p.columns + j0) * p.inner;
    const T* w = read_weights(p, at, mask_at, n, tile);
    if (p.inner > 1) {
      shrink_kernels(p, at, mask_at, n, tile);
      continue;
    }
    if (w != tile.w) load(p.weight, p.weight_type, at, n, tile.w);
    shrink(p, n, tile);
    if (!p.mask) {
      store(p.dweight, p.weight_type, at, n, tile.dw);
      continue;
    }
    for (int64_t j = 0; j < n; ++j)
      if (p.mask[mask_at + j]) store(p.dweight, p.weight_type, at + j, 1, tile.dw + j);
  }
}

template <typename T>
inline void proximal(const PenaltyProblem<T>& p, int64_t task, T* scratch) {
  Tile<T> tile(scratch, p);
  T* gathered = scratch + tile_size(p.coordinates, p.tile);
  const int64_t end = chunk_begin(task + 1, p.grid.row_chunks, p.rows, 1);
  for (int64_t i = chunk_begin(task, p.grid.row_chunks, p.rows, 1); i < end; ++i) {
    if (!few_kept(p, i, 0, p.columns)) {
      for (int64_t j0 = 0; j0 < p.columns; j0 += p.tile)
        proximal_tile(p, i, j0, p.columns - j0 < p.tile ? p.columns - j0 : p.tile, tile);
      continue;
    }
    for (int64_t b = 0; b < p.blocks; ++b)
      each_kept_piece(p, b, i, 0, p.columns, gathered, [&](const KeptPiece<T>& piece) {
        piece.gather(p, tile);
        distance_stage<T, false>(p, i, piece.y, tile.stride, padded<T>(piece.count), tile);
        inhibitor_stage<T, false>(padded<T>(piece.count), tile, Traffic<T>{});
        shrink(p, piece.count, tile);
        for (int64_t l = 0; l < piece.count; ++l) store(p.dweight, p.weight_type, piece.place(p, l), 1, tile.dw + l);
      });
  }
}

}  // namespace moduli::MODULI_NAMESPACE
