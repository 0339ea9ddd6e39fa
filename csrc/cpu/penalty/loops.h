// A task of the penalty: a chunk of rows against a chunk of columns, tile by tile; and the entry points of an instruction
// set, which includes this file once. See penalty.h.
#pragma once

#include "penalty_kept.h"
#include "penalty_mirrored.h"
#include "proximal.h"

namespace moduli::MODULI_NAMESPACE {

// Rows that go through a tile of columns before the next: the column points and sums are then fetched once for all of
// them, and each row is still read and written front to back, as the processor's prefetcher wants it.
constexpr int64_t ROW_BLOCK = 4;

// Value (without scale), dW and the sums for the points of row i against columns j0 .. j0 + n.
template <typename T, bool DW, bool GRADS>
inline double tile_row(const PenaltyProblem<T>& p, int64_t i, int64_t j0, int64_t n, Tile<T>& tile,
                       const Traffic<T>& traffic, T* row_parts, T* column_parts) {
  const int64_t packs = padded<T>(n);
  distance_stage<T, GRADS>(p, i, p.column_points + j0, p.column_stride, packs, tile);
  inhibitor_stage<T, GRADS>(p, packs, tile, traffic);
  traffic.rest(packs);
  const bool plane = GRADS && is_plane(p);
  T row_sums[2];
  const PlaneSums<T> sums{tile.g, tile.g + tile.stride, column_parts, column_parts + p.column_stride, row_sums};
  double value = 0;
  for (int64_t b = 0; b < p.blocks; ++b) {
    const int64_t row = b * p.rows + i;
    const int64_t at = row * p.row_stride + j0 * p.inner, out = (row * p.columns + j0) * p.inner;
    const bool direct = p.inner == 1 && p.weight_type == weight_type(T()) && packs == n && !p.accumulate;
    WeightTile<T> io{read_weights(p, at, out, n, tile), nullptr, tile.f, tile.slope, tile.dw, tile.t, T(p.power), T(p.scale)};
    if (DW && direct && !p.stream) io.dw = static_cast<T*>(p.dweight) + out;  // else tile.dw, sent off later
    if (p.mask) {
      mask_coefficients(p, out, n, tile);
      io.f = tile.minus;
      io.slope = tile.plus;
    }
    value += weight_stage<T, DW, GRADS, false>(io, packs, plane, b > 0, sums);
    if (DW && !direct) {
      if (p.inner == 1)
        write_gradient(p, out, n, tile.dw);
      else
        write_kernels(p, at, out, n, tile);
    }
  }
  if (plane) {
    row_parts[i] += row_sums[0];
    row_parts[p.rows + i] += row_sums[1];
  } else if (GRADS) {
    points_row(p, i, packs, tile, row_parts, p.rows, column_parts);
  }
  return value;
}

template <typename T, bool DW, bool GRADS>
inline void run(const PenaltyProblem<T>& p, int64_t task, T* scratch) {
  if (p.mirrored) return run_mirrored<T, DW, GRADS>(p, task, scratch);
  const int64_t row_chunk = task / p.grid.column_chunks, column_chunk = task % p.grid.column_chunks;
  const int64_t i0 = chunk_begin(row_chunk, p.grid.row_chunks, p.rows, 1);
  const int64_t i1 = chunk_begin(row_chunk + 1, p.grid.row_chunks, p.rows, 1);
  const int64_t begin = chunk_begin(column_chunk, p.grid.column_chunks, p.columns, p.tile);
  const int64_t end = chunk_begin(column_chunk + 1, p.grid.column_chunks, p.columns, p.tile);
  Tile<T> tile(scratch, p);
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
    bool few[ROW_BLOCK] = {};
    for (int64_t row = i; row < block_end; ++row) {
      few[row - i] = few_kept(p, row, begin, end);
      if (few[row - i])
        value += kept_row<T, DW, GRADS>(p, row, begin, end, tile, scratch + tile_size(p.coordinates, p.tile), row_parts,
                                        column_parts);
    }
    for (int64_t j0 = begin; j0 < end; j0 += p.tile) {
      const int64_t n = end - j0 < p.tile ? end - j0 : p.tile;
      for (int64_t row = i; row < block_end; ++row) {
        if (few[row - i]) continue;
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
  Traffic<T>{nullptr, nullptr, 0, {}, {}, tile.dw, sent, sent_count}.rest(0);
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
void proximal_task_f32(const PenaltyProblem<float>& p, int64_t task, float* scratch) { proximal(p, task, scratch); }
void proximal_task_f64(const PenaltyProblem<double>& p, int64_t task, double* scratch) { proximal(p, task, scratch); }

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
