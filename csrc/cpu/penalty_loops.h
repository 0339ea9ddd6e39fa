// A task of the penalty: a chunk of rows against a chunk of columns, tile by tile. See penalty.h and
// penalty_stages.h. Included once per instruction set.
#pragma once

#include "convert.h"
#include "penalty_stages.h"

namespace moduli::MODULI_NAMESPACE {

constexpr WeightType weight_type(float) { return WeightType::FLOAT32; }
constexpr WeightType weight_type(double) { return WeightType::FLOAT64; }

// The weights of (block b, row i, columns j0 .. j0+n) as they are, or gathered into tile.w: converted, masked
// entries 0, kernels reduced to their norm.
template <typename T>
inline const T* read_weights(const PenaltyProblem<T>& p, int64_t at, int64_t mask_at, int64_t n, Tile<T>& tile) {
  const int64_t q = p.inner;
  if (q == 1) {
    if (p.weight_type == weight_type(T()) && !p.mask) return static_cast<const T*>(p.weight) + at;
    load(p.weight, p.weight_type, at, n, tile.w);
    if (p.mask)
      for (int64_t j = 0; j < n; ++j) tile.w[j] = p.mask[mask_at + j] ? tile.w[j] : T(0);
    return tile.w;
  }
  for (int64_t j = 0; j < n; ++j) {
    T squares = 0;
    for (int64_t l = 0; l < q; ++l) {
      T w = 0;
      load(p.weight, p.weight_type, at + j * q + l, 1, &w);
      squares += p.mask && !p.mask[mask_at + j * q + l] ? T(0) : w * w;
    }
    tile.w[j] = std::sqrt(squares);
  }
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
      store(p.dweight, p.weight_type, out + j * p.inner + l, 1, &dw);
    }
  }
}

template <typename T, bool DW, bool GRADS>
inline double tile_row(const PenaltyProblem<T>& p, int64_t i, int64_t j0, int64_t n, Tile<T>& tile) {
  distance_stage<T, GRADS>(p, i, j0, n, tile);
  inhibitor_stage<T, GRADS>(p, n, tile);
  double value = 0;
  for (int64_t b = 0; b < p.blocks; ++b) {
    const int64_t row = b * p.rows + i;
    const int64_t at = row * p.row_stride + j0 * p.inner, out = (row * p.columns + j0) * p.inner;
    const T* w = read_weights(p, at, out, n, tile);
    const bool direct = p.inner == 1 && p.weight_type == weight_type(T());
    T* dw = DW && direct ? static_cast<T*>(p.dweight) + out : tile.dw;
    const T *f = tile.f, *slope = tile.slope;
    if (p.mask) {
      mask_coefficients(p, out, n, tile);
      f = tile.minus;
      slope = tile.plus;
    }
    value += b == 0 ? weight_stage<T, DW, GRADS, false>(p, w, dw, f, slope, tile.t, n)
                    : weight_stage<T, DW, GRADS, true>(p, w, dw, f, slope, tile.t, n);
    if (DW && !direct) {
      if (p.inner == 1)
        store(p.dweight, p.weight_type, out, n, tile.dw);
      else
        write_kernels(p, at, out, n, tile);
    }
  }
  return value;
}

template <typename T>
inline void points_row(const PenaltyProblem<T>& p, int64_t i, int64_t n, Tile<T>& tile, T* row_parts) {
  int64_t c = 0;
  for (int64_t q = 0; q < p.factor_count; ++q) {
    const int64_t kind = p.factors[2 * q], end = c + p.factors[2 * q + 1];
    const int64_t unmirrored = kind == KLEIN ? c + 1 : -1;
    for (; c < end; ++c) {
      const T *g = tile.g + c * TILE, *g_column = tile.g_column + c * TILE;
      T* sums = tile.column_sums + c * TILE;
      row_parts[c * p.rows + i] += c == unmirrored ? points_loop<T, false>(tile.t, g, g_column, sums, n)
                                                   : points_loop<T, true>(tile.t, g, g_column, sums, n);
    }
  }
}

template <typename T, bool DW, bool GRADS>
inline void run(const PenaltyProblem<T>& p, int64_t task, T* scratch) {
  const int64_t row_chunk = task / p.grid.column_chunks, column_chunk = task % p.grid.column_chunks;
  const int64_t i0 = chunk_begin(row_chunk, p.grid.row_chunks, p.rows, 1);
  const int64_t i1 = chunk_begin(row_chunk + 1, p.grid.row_chunks, p.rows, 1);
  const int64_t begin = chunk_begin(column_chunk, p.grid.column_chunks, p.columns, TILE);
  const int64_t end = chunk_begin(column_chunk + 1, p.grid.column_chunks, p.columns, TILE);
  Tile<T> tile(scratch, p.coordinates);
  T* row_parts = GRADS ? p.row_parts + column_chunk * p.coordinates * p.rows : nullptr;
  T* column_parts = GRADS ? p.column_parts + row_chunk * p.coordinates * p.columns : nullptr;
  if (GRADS)
    for (int64_t c = 0; c < p.coordinates; ++c)
      for (int64_t i = i0; i < i1; ++i) row_parts[c * p.rows + i] = 0;
  double value = 0;
  for (int64_t j0 = begin; j0 < end; j0 += TILE) {
    const int64_t n = end - j0 < TILE ? end - j0 : TILE;
    if (GRADS)
      for (int64_t j = 0; j < p.coordinates * TILE; ++j) tile.column_sums[j] = 0;
    for (int64_t i = i0; i < i1; ++i) {
      value += tile_row<T, DW, GRADS>(p, i, j0, n, tile);
      if (GRADS) points_row(p, i, n, tile, row_parts);
    }
    if (GRADS)
      for (int64_t c = 0; c < p.coordinates; ++c)
        for (int64_t j = 0; j < n; ++j) column_parts[c * p.columns + j0 + j] = tile.column_sums[c * TILE + j];
  }
  p.value_parts[task] = value;
}

template <typename T>
inline void run_task(const PenaltyProblem<T>& p, int64_t task, T* scratch) {
  if (p.dweight)
    p.need_points ? run<T, true, true>(p, task, scratch) : run<T, true, false>(p, task, scratch);
  else
    p.need_points ? run<T, false, true>(p, task, scratch) : run<T, false, false>(p, task, scratch);
}

void run_task_f32(const PenaltyProblem<float>& p, int64_t task, float* scratch) { run_task(p, task, scratch); }
void run_task_f64(const PenaltyProblem<double>& p, int64_t task, double* scratch) { run_task(p, task, scratch); }

// In place, through the compute type, in pieces that stay in the first-level cache.
void scale(void* data, WeightType type, int64_t count, double factor) {
  double piece[256];
  for (int64_t at = 0; at < count; at += 256) {
    const int64_t n = count - at < 256 ? count - at : 256;
    load(data, type, at, n, piece);
    for (int64_t j = 0; j < n; ++j) piece[j] *= factor;
    store(data, type, at, n, piece);
  }
}

}  // namespace moduli::MODULI_NAMESPACE
