// A task of the penalty: a chunk of rows against a chunk of columns, tile by tile. See penalty.h and
// penalty_stages.h. Included once per instruction set.
#pragma once

#include <type_traits>

#include "convert.h"
#include "penalty_stages.h"

namespace moduli::MODULI_NAMESPACE {

// Rows that go through a tile of columns before the next: the column points and sums are then fetched once for all of
// them, and each row is still read and written front to back, as the processor's prefetcher wants it.
constexpr int64_t ROW_BLOCK = 4;

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

template <typename T>
inline void points_row(const PenaltyProblem<T>& p, int64_t i, int64_t n, const Tile<T>& tile, T* row_parts,
                       T* column_parts) {
  int64_t c = 0;
  for (int64_t q = 0; q < p.factor_count; ++q) {
    const int64_t kind = p.factors[2 * q], end = c + p.factors[2 * q + 1];
    const int64_t unmirrored = kind == KLEIN ? c + 1 : -1;
    for (; c < end; ++c) {
      const T *g = tile.g + c * tile.stride, *g_column = tile.g_column + c * tile.stride;
      T* sums = column_parts + c * p.column_stride;
      row_parts[c * p.rows + i] += c == unmirrored ? points_loop<T, false>(tile.t, g, g_column, sums, n)
                                                   : points_loop<T, true>(tile.t, g, g_column, sums, n);
    }
  }
}

template <typename T, int POWER, bool DW, bool GRADS>
inline T weight_stage(const WeightTile<T>& io, int64_t n, bool plane, bool add, const PlaneSums<T>& sums) {
  if constexpr (GRADS) {
    if (plane) return weight_loop<T, POWER, DW, true, true, false>(io, n, sums);
    if (add) return weight_loop<T, POWER, DW, true, false, true>(io, n, sums);
  }
  return weight_loop<T, POWER, DW, GRADS, false, false>(io, n, sums);
}

// Value (without scale), dW and the sums for the points of row i against columns j0 .. j0 + n.
template <typename T, bool DW, bool GRADS>
inline double tile_row(const PenaltyProblem<T>& p, int64_t i, int64_t j0, int64_t n, Tile<T>& tile,
                       const Traffic<T>& traffic, T* row_parts, T* column_parts) {
  const int64_t packs = padded<T>(n);
  distance_stage<T, GRADS>(p, i, j0, packs, tile);
  inhibitor_stage<T, GRADS>(p, packs, tile, traffic);
  traffic.rest(packs);
  const bool plane = GRADS && p.blocks == 1 && p.factor_count == 1 && p.factors[0] == FLAT && p.factors[1] == 2;
  T row_sums[2];
  const PlaneSums<T> sums{tile.g, tile.g + tile.stride, column_parts, column_parts + p.column_stride, row_sums};
  double value = 0;
  for (int64_t b = 0; b < p.blocks; ++b) {
    const int64_t row = b * p.rows + i;
    const int64_t at = row * p.row_stride + j0 * p.inner, out = (row * p.columns + j0) * p.inner;
    const bool direct = p.inner == 1 && p.weight_type == weight_type(T()) && packs == n;
    WeightTile<T> io{read_weights(p, at, out, n, tile), tile.f, tile.slope, tile.dw, tile.t, T(p.power), T(p.scale)};
    if (DW && direct && !p.stream) io.dw = static_cast<T*>(p.dweight) + out;  // else tile.dw, sent off later
    if (p.mask) {
      mask_coefficients(p, out, n, tile);
      io.f = tile.minus;
      io.slope = tile.plus;
    }
    value += p.power == 1   ? weight_stage<T, 1, DW, GRADS>(io, packs, plane, b > 0, sums)
             : p.power == 2 ? weight_stage<T, 2, DW, GRADS>(io, packs, plane, b > 0, sums)
                            : weight_stage<T, 0, DW, GRADS>(io, packs, plane, b > 0, sums);
    if (DW && !direct) {
      if (p.inner == 1)
        store(p.dweight, p.weight_type, out, n, tile.dw);
      else
        write_kernels(p, at, out, n, tile);
    }
  }
  if (plane) {
    row_parts[i] += row_sums[0];
    row_parts[p.rows + i] += row_sums[1];
  } else if (GRADS) {
    points_row(p, i, packs, tile, row_parts, column_parts);
  }
  return value;
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

template <typename T, bool DW, bool GRADS>
inline void run(const PenaltyProblem<T>& p, int64_t task, T* scratch) {
  const int64_t row_chunk = task / p.grid.column_chunks, column_chunk = task % p.grid.column_chunks;
  const int64_t i0 = chunk_begin(row_chunk, p.grid.row_chunks, p.rows, 1);
  const int64_t i1 = chunk_begin(row_chunk + 1, p.grid.row_chunks, p.rows, 1);
  const int64_t begin = chunk_begin(column_chunk, p.grid.column_chunks, p.columns, p.tile);
  const int64_t end = chunk_begin(column_chunk + 1, p.grid.column_chunks, p.columns, p.tile);
  Tile<T> tile(scratch, p.coordinates, p.tile);
  T* row_parts = GRADS ? p.row_parts + column_chunk * p.coordinates * p.rows : nullptr;
  T* column_parts = GRADS ? p.column_parts + row_chunk * p.coordinates * p.column_stride : nullptr;
  for (int64_t c = 0; GRADS && c < p.coordinates; ++c) {
    for (int64_t i = i0; i < i1; ++i) row_parts[c * p.rows + i] = 0;
    for (int64_t j = begin; j < begin + padded<T>(end - begin); ++j) column_parts[c * p.column_stride + j] = 0;
  }
  double value = 0;
  T* sent = nullptr;
  int64_t sent_count = 0;
  for (int64_t i = i0; i < i1; i += ROW_BLOCK) {
    const int64_t block_end = i + ROW_BLOCK < i1 ? i + ROW_BLOCK : i1;
    for (int64_t j0 = begin; j0 < end; j0 += p.tile) {
      const int64_t n = end - j0 < p.tile ? end - j0 : p.tile;
      for (int64_t row = i; row < block_end; ++row) {
        const bool down = row + 1 < block_end, right = j0 + p.tile < end;
        Traffic<T> traffic = down    ? traffic_before(p, row + 1, j0)
                             : right ? traffic_before(p, i, j0 + p.tile)
                                     : traffic_before(p, block_end < i1 ? block_end : i, begin);
        traffic.from = tile.dw;
        traffic.to = sent;
        traffic.count = sent_count;
        value += tile_row<T, DW, GRADS>(p, row, j0, n, tile, traffic, row_parts, column_parts + j0);
        if (p.stream) {
          sent = static_cast<T*>(p.dweight) + row * p.columns + j0;
          sent_count = n;
        }
      }
    }
  }
  Traffic<T>{nullptr, nullptr, 0, tile.dw, sent, sent_count}.rest(0);
  if (p.stream) stream_fence();
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
