// Rows of which few entries are kept, by a mask or because the matrix is compressed. Only these entries are gathered
// into a tile, together with the points of their columns.
#pragma once

#include <cstring>

#include "cpu/common/kept_bits.h"
#include "cpu/penalty/tile_memory.h"

namespace moduli::MODULI_NAMESPACE {

// The function writes the columns of kept entries from column `from` on, at most `most` (MASK_STEP or more), and
// returns their number. `from` moves behind the last entry that was read. The weights of the entries, in `row`, are
// asked for.
inline int64_t kept_columns(const uint8_t* mask, int64_t& from, int64_t end, int64_t most, int64_t* columns,
                            const char* row, int64_t weight_size) {
  int64_t count = 0;
  for (; from < end && count + MASK_STEP <= most; from += MASK_STEP)
    for (uint64_t bits = kept_bits(mask + from, end - from); bits; bits &= bits - 1) {
      columns[count] = from + __builtin_ctzll(bits);
      __builtin_prefetch(row + columns[count++] * weight_size);
    }
  return count;
}

// The function returns true if it is faster to gather the entries of row i, columns begin .. end, in all blocks than to
// go through all of them.
template <typename T>
inline bool few_kept(const PenaltyProblem<T>& p, int64_t i, int64_t begin, int64_t end) {
  constexpr int64_t WORTH_IT = 4;  // a gathered entry costs about as much as this many in a row
  if (p.crow) return true;
  if (!p.mask || p.inner > 1) return false;
  int64_t kept = 0;
  for (int64_t b = 0; b < p.blocks; ++b) {
    const uint8_t* mask = p.mask + (b * p.rows + i) * p.columns;
    for (int64_t j = begin; j < end; j += MASK_STEP) kept += __builtin_popcountll(kept_bits(mask + j, end - j));
  }
  return kept * WORTH_IT < (end - begin) * p.blocks;
}

// Kept entries of a row, at most a tile of them.
template <typename T>
struct KeptPiece {
  const int64_t* columns;  // (count)
  int64_t count;
  int64_t at;  // where stored entries begin in their values, or where the row begins in the weight
  T* y;        // points of the columns, once gathered

  // Where entry l of the piece is in the weight
  int64_t place(const PenaltyProblem<T>& p, int64_t l) const { return p.crow ? at + l : at + columns[l]; }

  // The method writes gradients dw (count). `row` is where the row begins in a dense gradient.
  void write(const PenaltyProblem<T>& p, int64_t row, const T* dw) const {
    if (p.crow) return write_gradient(p, at, count, dw);
    if (p.weight_type != weight_type(T())) {
      for (int64_t l = 0; l < count; ++l) write_gradient(p, row + columns[l], 1, dw + l);
      return;
    }
    T* to = static_cast<T*>(p.dweight) + row;
    for (int64_t l = 0; l < count; ++l) to[columns[l]] = p.accumulate ? to[columns[l]] + dw[l] : dw[l];
  }

  // The method gathers weights into tile.w and points into y, and pads them to whole packs.
  void gather(const PenaltyProblem<T>& p, Tile<T>& tile) const {
    if (p.crow)
      load(p.weight, p.weight_type, at, count, tile.w);
    else if (p.weight_type == weight_type(T()))
      for (int64_t l = 0; l < count; ++l) tile.w[l] = static_cast<const T*>(p.weight)[at + columns[l]];
    else
      for (int64_t l = 0; l < count; ++l) load(p.weight, p.weight_type, at + columns[l], 1, tile.w + l);
    for (int64_t l = count; l < padded<T>(count); ++l) tile.w[l] = 0;
    for (int64_t c = 0; c < p.coordinates; ++c) {
      const T* points = p.column_points + c * p.column_stride;
      T* to = y + c * tile.stride;
      for (int64_t l = 0; l < count; ++l) to[l] = points[columns[l]];
      for (int64_t l = count; l < padded<T>(count); ++l) to[l] = 0;
    }
  }
};

// The function calls piece(KeptPiece) for the kept entries of row i of block b, columns begin .. end.
template <typename T, typename Function>
inline void each_kept_piece(const PenaltyProblem<T>& p, int64_t b, int64_t i, int64_t begin, int64_t end, T* scratch,
                            const Function& piece) {
  const int64_t row = b * p.rows + i;
  T* y = scratch;
  if (p.crow) {
    for (int64_t at = p.crow[row]; at < p.crow[row + 1]; at += p.tile) {
      const int64_t left = p.crow[row + 1] - at;
      piece(KeptPiece<T>{.columns = p.col + at, .count = left < p.tile ? left : p.tile, .at = at, .y = y});
    }
    return;
  }
  const char* weights = static_cast<const char*>(p.weight) + row * p.row_stride * p.weight_size;
  auto columns = reinterpret_cast<int64_t*>(scratch + p.coordinates * buffer_stride(p.tile));
  for (int64_t from = begin; from < end;) {
    const int64_t count = kept_columns(p.mask + row * p.columns, from, end, p.tile, columns, weights, p.weight_size);
    if (count) piece(KeptPiece<T>{.columns = columns, .count = count, .at = row * p.row_stride, .y = y});
  }
}

// The sums of t * g over a piece (returned) and into its columns, for one coordinate.
template <typename T, bool OPPOSITE>
inline T kept_points(const T* t, const T* g, const T* g_column, const int64_t* columns, int64_t n, T* column_sums) {
  T sum = 0;
  for (int64_t l = 0; l < n; ++l) {
    const T part = t[l] * g[l];
    sum += part;
    column_sums[columns[l]] += OPPOSITE ? -part : t[l] * g_column[l];
  }
  return sum;
}

// Value (without scale), dW and the sums for the points, for the kept entries of row i, columns begin .. end.
template <typename T, bool DW, bool GRADS>
inline double kept_row(const PenaltyProblem<T>& p, int64_t i, int64_t begin, int64_t end, Tile<T>& tile, T* scratch,
                       T* row_parts, T* column_parts) {
  double value = 0;
  for (int64_t b = 0; b < p.blocks; ++b) {
    const int64_t out = (b * p.rows + i) * p.columns;
    if (DW && !p.crow && !p.accumulate)
      std::memset(static_cast<char*>(p.dweight) + (out + begin) * p.weight_size, 0, (end - begin) * p.weight_size);
    each_kept_piece(p, b, i, begin, end, scratch, [&](const KeptPiece<T>& piece) {
      const int64_t n = piece.count, packs = padded<T>(n);
      piece.gather(p, tile);
      distance_stage<T, GRADS>(p, i, piece.y, tile.stride, packs, tile);
      inhibitor_stage<T, GRADS>(packs, tile, Traffic<T>{});
      const WeightTile<T> io = weight_tile(p, tile, tile.w);
      value += weight_stage<T, DW, GRADS, false>(io, packs, false, false, {});
      if (DW) piece.write(p, out, tile.dw);
      for (int64_t c = 0; GRADS && c < p.coordinates; ++c) {
        const T *g = tile.g + c * tile.stride, *g_column = tile.g_column + c * tile.stride;
        T* sums = column_parts + c * p.column_stride;
        row_parts[c * p.rows + i] += p.opposite[c] ? kept_points<T, true>(tile.t, g, g_column, piece.columns, n, sums)
                                                   : kept_points<T, false>(tile.t, g, g_column, piece.columns, n, sums);
      }
    });
  }
  return value;
}

}  // namespace moduli::MODULI_NAMESPACE
