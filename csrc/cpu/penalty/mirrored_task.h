// A task of a mirrored problem, where rows and columns share their points: a band of rows against the columns from the
// diagonal on. The distance of (i, j) is that of (j, i), therefore s and f are computed once for both entries of a
// pair. The entries below the diagonal come and go through squares that are transposed in registers, a few a row, so
// that memory and arithmetic overlap: while one group of SQUARE rows is computed, the mirrored weights of the group
// after it are transposed, which were asked for some rows ahead, and the mirrored gradients of the group before it are
// written.
#pragma once

#include "cpu/common/chunks.h"
#include "cpu/common/transpose.h"
#include "cpu/penalty/tile_memory.h"

namespace moduli::MODULI_NAMESPACE {

// A mirrored square is asked for this many rows before it is transposed.
constexpr int64_t ASK_AHEAD = 2;

// The first row of a band. Bands have equal numbers of entries from the diagonal on, and whole squares.
inline int64_t band_begin(int64_t band, int64_t bands, int64_t size) {
  const double rows = double(size) * (1 - std::sqrt(1 - double(band) / double(bands)));
  const int64_t begin = band == bands ? size : static_cast<int64_t>(rows / SQUARE + 0.5) * SQUARE;
  return begin < size ? begin : size;
}

// Rows i .. i + SQUARE, or up to the last row, against columns j .. j + columns. A group without columns is empty. If j
// is i, the first square is on the diagonal, and there every entry counts for itself alone.
struct Group {
  int64_t i, j, columns;

  int64_t squares() const { return (columns + SQUARE - 1) / SQUARE; }
};

// The groups of rows begin .. end in their order: down the rows of one tile of columns, then those of the next tile.
// Tiles have equal widths, whole squares, and begin at the diagonal.
struct GroupWalk {
  int64_t begin, end, size, width;
  int64_t tile = 0, i = begin;

  int64_t tiles() const { return (size - begin + width - 1) / width; }
  int64_t tile_begin(int64_t t) const { return begin + chunk_begin(t, tiles(), size - begin, SQUARE); }

  Group next() {
    if (begin >= end || tile == tiles()) return {};
    const int64_t columns_end = tile_begin(tile + 1);
    const int64_t row = i, column = i > tile_begin(tile) ? i : tile_begin(tile);
    i += SQUARE;
    if (i >= end || i >= columns_end) {
      ++tile;
      i = begin;
    }
    return {.i = row, .j = column, .columns = columns_end - column};
  }
};

// Squares on their way between memory and a buffer `turned` (SQUARE, stride), where turned[i][j] = W[group.j +
// j][group.i + i], and the same for dW on the way back. On the diagonal the mirrored weights are 0 and no gradient is
// written.
template <typename T>
struct Mirror {
  const PenaltyProblem<T>& p;
  int64_t stride;

  int64_t count(int64_t first) const { return p.rows - first < SQUARE ? p.rows - first : SQUARE; }
  bool whole(int64_t i, int64_t j) const {
    return p.weight_type == weight_type(T()) && count(i) == SQUARE && count(j) == SQUARE;
  }

  void fetch(const Group& g, int64_t q, T* turned) const {
    const int64_t i = g.i, j = g.j + q * SQUARE;
    T* to = turned + q * SQUARE;
    if (j != i && whole(i, j))
      return transpose_square<false>(static_cast<const T*>(p.weight) + j * p.row_stride + i, p.row_stride, to, stride);
    T piece[SQUARE * SQUARE] = {};
    for (int64_t l = 0; j != i && l < count(j); ++l)
      load(p.weight, p.weight_type, (j + l) * p.row_stride + i, count(i), piece + l * SQUARE);
    transpose_square<false>(piece, SQUARE, to, stride);
  }

  void send(const Group& g, int64_t q, const T* turned) const {
    const int64_t i = g.i, j = g.j + q * SQUARE;
    if (j == i) return;
    const T* from = turned + q * SQUARE;
    if (whole(i, j) && !p.accumulate) {
      T* to = static_cast<T*>(p.dweight) + j * p.columns + i;
      return p.stream ? transpose_square<true>(from, stride, to, p.columns)
                      : transpose_square<false>(from, stride, to, p.columns);
    }
    T piece[SQUARE * SQUARE];
    transpose_square<false>(from, stride, piece, SQUARE);
    for (int64_t l = 0; l < count(j); ++l)
      write_gradient(p, (j + l) * p.columns + i, count(i), piece + l * SQUARE);
  }

  // A square's worth of lines of `matrix`, a line a row, from `line` on in group `first` or, past its end, in `second`.
  Lines lines(const void* matrix, int64_t row_stride, const Group& first, const Group& second, int64_t line) const {
    const bool in_first = line < first.columns;
    const Group& g = in_first ? first : second;
    const int64_t from = in_first ? line : line - first.columns, row = row_stride * p.weight_size;
    return {static_cast<const char*>(matrix) + g.i * p.weight_size + (g.j + from) * row, row, g.columns - from};
  }
};

// Value (without scale), dW and the sums for the points, for row i against columns j .. j + n and their mirrored
// entries. `turned` holds the mirrored weights, which are replaced by their gradients.
template <typename T, bool DW, bool GRADS>
inline double mirrored_row(const PenaltyProblem<T>& p, int64_t i, int64_t j, int64_t n, Tile<T>& tile, T* turned,
                           const Traffic<T>& traffic, T* parts) {
  const int64_t packs = padded<T>(n);
  distance_stage<T, GRADS>(p, i, p.column_points + j, p.column_stride, packs, tile);
  inhibitor_stage<T, GRADS>(packs, tile, traffic);
  traffic.rest(packs);
  const bool plane = GRADS && p.plane;
  T* column_parts = parts + j;
  T row_sums[2];
  const PlaneSums<T> sums = plane_sums(p, tile, column_parts, row_sums);
  const int64_t at = i * p.row_stride + j, out = i * p.columns + j;
  const bool direct = p.weight_type == weight_type(T()) && packs == n && !p.accumulate;
  WeightTile<T> io = weight_tile(p, tile, read_weights(p, at, out, n, tile));
  io.mirrored = turned;
  if (DW && direct && !p.stream) io.dw = static_cast<T*>(p.dweight) + out;  // otherwise tile.dw, which is written later
  const double value = weight_stage<T, DW, GRADS, true>(io, packs, plane, false, sums);
  if (DW && !direct) write_gradient(p, out, n, tile.dw);
  if (plane) {
    parts[i] += row_sums[0];
    parts[p.column_stride + i] += row_sums[1];
  } else if (GRADS) {
    points_row(p, i, packs, tile, parts, p.column_stride, column_parts);
  }
  return value;
}

template <typename T, bool DW, bool GRADS>
inline void run_mirrored(const PenaltyProblem<T>& p, int64_t task, T* scratch) {
  GroupWalk walk{band_begin(task, p.grid.row_chunks, p.rows), band_begin(task + 1, p.grid.row_chunks, p.rows), p.rows,
                 p.tile};
  Tile<T> tile(scratch, p);
  const Mirror<T> mirror{p, tile.stride};
  T* turned = scratch + tile_size(p.coordinates, p.tile);
  T* turning = turned + SQUARE * tile.stride;  // gradients of the group before, replaced by weights of the group after
  T* parts = GRADS ? p.column_parts + task * p.coordinates * p.column_stride : nullptr;
  for (int64_t at = 0; GRADS && at < p.coordinates * p.column_stride; ++at) parts[at] = 0;
  double value = 0;
  T* sent_row = nullptr;  // the gradient in tile.dw is written there while the next row is computed
  int64_t sent_count = 0;
  Group before{}, now = walk.next(), after = walk.next();
  for (int64_t q = 0; q < now.squares(); ++q) mirror.fetch(now, q, turned);
  while (now.columns) {
    const Group then = walk.next();
    for (int64_t r = 0; r < SQUARE; ++r) {
      if (r < mirror.count(now.i)) {
        const bool last = r + 1 == mirror.count(now.i);
        Traffic<T> traffic = last ? traffic_before(p, after.i, after.j) : traffic_before(p, now.i + r + 1, now.j);
        const int64_t line = (r + ASK_AHEAD) * now.squares();
        traffic.mirrored = mirror.lines(p.weight, p.row_stride, after, then, line);
        if (DW && !p.stream) traffic.mirrored_dw = mirror.lines(p.dweight, p.columns, before, now, line);
        traffic.from = tile.dw;
        traffic.to = sent_row;
        traffic.count = sent_count;
        value +=
            mirrored_row<T, DW, GRADS>(p, now.i + r, now.j, now.columns, tile, turned + r * tile.stride, traffic, parts);
        if (p.stream) {
          sent_row = static_cast<T*>(p.dweight) + (now.i + r) * p.columns + now.j;
          sent_count = now.columns;
        }
      }
      for (int64_t q = r * p.tile / (SQUARE * SQUARE); q < (r + 1) * p.tile / (SQUARE * SQUARE); ++q) {
        if (DW && q < before.squares()) mirror.send(before, q, turning);
        if (q < after.squares()) mirror.fetch(after, q, turning);
      }
    }
    T* const done = turned;
    turned = turning;
    turning = done;
    before = now;
    now = after;
    after = then;
  }
  for (int64_t q = 0; DW && q < before.squares(); ++q) mirror.send(before, q, turning);
  Traffic<T>{.from = tile.dw, .to = sent_row, .count = sent_count}.rest(0);
  if (p.stream) stream_fence();
  p.value_parts[task] = value;
}

}  // namespace moduli::MODULI_NAMESPACE
