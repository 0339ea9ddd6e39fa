// A task of the penalty: a chunk of rows against a chunk of columns, tile by tile. At the end of the file stands the
// table of all penalty loops; avx512.cpp, avx2.cpp and portable.cpp each include this file for their instruction set.
#pragma once

#include "cpu/common/chunks.h"
#include "cpu/penalty/kept_entries.h"
#include "cpu/penalty/mirrored_task.h"
#include "cpu/penalty/proximal_task.h"

namespace moduli::MODULI_NAMESPACE {

// This many rows go through a tile of columns before the next tile. The column points and their sums are then fetched
// once for all these rows, and each row is still read and written front to back, which suits the processor's
// prefetcher.
constexpr int64_t ROW_BLOCK = 4;

// Value (without scale), dW and the sums for the points, for row i against columns j0 .. j0 + n.
template <typename T, bool DW, bool GRADS>
inline double tile_row(const PenaltyProblem<T>& p, int64_t i, int64_t j0, int64_t n, Tile<T>& tile,
                       const Traffic<T>& traffic, T* row_parts, T* column_parts) {
  const int64_t packs = padded<T>(n);
  distance_stage<T, GRADS>(p, i, p.column_points + j0, p.column_stride, packs, tile);
  inhibitor_stage<T, GRADS>(packs, tile, traffic);
  traffic.rest(packs);
  const bool plane = GRADS && p.plane;
  T row_sums[2];
  const PlaneSums<T> sums = plane_sums(p, tile, column_parts, row_sums);
  double value = 0;
  for (int64_t b = 0; b < p.blocks; ++b) {
    const int64_t row = b * p.rows + i;
    const int64_t at = row * p.row_stride + j0 * p.inner, out = (row * p.columns + j0) * p.inner;
    const bool direct = p.inner == 1 && p.weight_type == weight_type(T()) && packs == n && !p.accumulate;
    WeightTile<T> io = weight_tile(p, tile, read_weights(p, at, out, n, tile));
    if (DW && direct && !p.stream) io.dw = static_cast<T*>(p.dweight) + out;  // else tile.dw, written later
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
  T* sent = nullptr;  // the gradient in tile.dw is written there while the next row is computed
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
  Traffic<T>{.from = tile.dw, .to = sent, .count = sent_count}.rest(0);
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

// The function multiplies in place, in double, in pieces that stay in the first-level cache.
inline void scale(void* data, WeightType type, int64_t count, double factor) {
  double piece[256];
  for (int64_t at = 0; at < count; at += 256) {
    const int64_t n = count - at < 256 ? count - at : 256;
    load(data, type, at, n, piece);
    for (int64_t j = 0; j < n; ++j) piece[j] *= factor;
    store(data, type, at, n, piece);
  }
}

template <typename T>
constexpr PenaltyLoops<T> PENALTY_LOOPS = {.penalty = run_task<T>, .proximal = proximal<T>, .scale = scale};

template <typename T>
const PenaltyLoops<T>& penalty_loops() {
  return PENALTY_LOOPS<T>;
}
template const PenaltyLoops<float>& penalty_loops<float>();
template const PenaltyLoops<double>& penalty_loops<double>();

}  // namespace moduli::MODULI_NAMESPACE
