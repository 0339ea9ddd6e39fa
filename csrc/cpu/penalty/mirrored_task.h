// A task where rows and columns share their points: a band of rows against the columns from the diagonal on. The
// distance of (i, j) is that of (j, i), so s and f are worked out once for both entries of a pair. The entries below
// the diagonal come and go through squares transposed in registers, a few a row, so that memory and arithmetic overlap:
// while a group of SQUARE rows is worked on, the mirrored weights of the group after it are turned, after they were
// asked for some rows ahead, and the mirrored gradients of the group before are sent off.
#pragma once

#include "penalty_tile.h"
#include "transpose.h"

namespace moduli::MODULI_NAMESPACE {

// First row of a mirrored task: bands of equal numbers of entries from the diagonal on, whole squares.
inline int64_t band_begin(int64_t band, int64_t bands, int64_t size) {
  const double rows = double(size) * (1 - std::sqrt(1 - double(band) / double(bands)));
  const int64_t begin = band == bands ? size : static_cast<int64_t>(rows / SQUARE + 0.5) * SQUARE;
  return begin < size ? begin : size;
}

// Rows i .. i + SQUARE, as far as there are so many, against columns j .. j + columns; no columns: none. Where j is i
// the first square lies on the diagonal, and there every entry stands for itself.
struct Group {
  int64_t i, j, columns;

  int64_t squares() const { return (columns + SQUARE - 1) / SQUARE; }
};

// The groups of rows begin .. end, down the rows of a tile of columns, then the next tile. Tiles are of equal width,
// whole squares, and begin at the diagonal.
struct GroupWalk {
  int64_t begin, end, size, width;
  int64_t tile = 0, i = begin;

  int64_t tiles() const { return (size - begin + width - 1) / width; }
  int64_t tile_begin(int64_t t) const { return begin + chunk_begin(t, tiles(), size - begin, SQUARE); }

  Group next() {
    if (begin >= end || tile == tiles()) return {};
    const int64_t columns_end = tile_begin(tile + 1);
    const Group group{i, i > tile_begin(tile) ? i : tile_begin(tile), 0};
    i += SQUARE;
    if (i >= end || i >= columns_end) {
      ++tile;
      i = begin;
    }
    return {group.i, group.j, columns_end - group.j};
  }
};

// Squares between memory and `turned`, (SQUARE, stride): turned[i][j] = W[group.j + j][group.i + i], and back for dW. On
// the diagonal the mirrored weights are 0 and no gradient goes back.
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

  // A square's worth of `matrix` a line a row, from `line` on in `first` or, past its end, in `second`.
  Lines lines(const void* matrix, int64_t row_stride, const Group& first, const Group& second, int64_t line) const {
    const bool in_first = line < first.columns;
    const Group& g = in_first ? first : second;
    const int64_t from = in_first ? line : line - first.columns, row = row_stride * p.weight_size;
    return {static_cast<const char*>(matrix) + g.i * p.weight_size + (g.j + from) * row, row, g.columns - from};
  }
};

// Value (without scale), dW and the sums for the points of row i against columns j .. j + n and back. `turned`: the
// mirrored weights in, their gradients out.
template <typename T, bool DW, bool GRADS>
inline double mirrored_row(const PenaltyProblem<T>& p, int64_t i, int64_t j, int64_t n, Tile<T>& tile, T* turned,
                           const Traffic<T>& traffic, T* parts) {
  const int64_t packs = padded<T>(n);
  distance_stage<T, GRADS>(p, i, p.column_points + j, p.column_stride, packs, tile);
  inhibitor_stage<T, GRADS>(p, packs, tile, traffic);
  traffic.rest(packs);
  const bool plane = GRADS && is_plane(p);
  T* column_parts = parts + j;
  T row_sums[2];
  const PlaneSums<T> sums{tile.g, tile.g + tile.stride, column_parts, column_parts + p.column_stride, row_sums};
  const int64_t at = i * p.row_stride + j, out = i * p.columns + j;
  const bool direct = p.weight_type == weight_type(T()) && packs == n && !p.accumulate;
  WeightTile<T> io{read_weights(p, at, out, n, tile), turned, tile.f, tile.slope, tile.dw, tile.t, T(p.power), T(p.scale)};
  if (DW && direct && !p.stream) io.dw = static_cast<T*>(p.dweight) + out;  // else tile.dw, sent off later
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
  T* turning = turned + SQUARE * tile.stride;  // gradients of the group before out, weights of the group after in
  T* parts = GRADS ? p.column_parts + task * p.coordinates * p.column_stride : nullptr;
  for (int64_t at = 0; GRADS && at < p.coordinates * p.column_stride; ++at) parts[at] = 0;
  double value = 0;
  T* sent_row = nullptr;  // the gradient in tile.dw goes there with the next row
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
        value += mirrored_row<T, DW, GRADS>(p, now.i + r, now.j, now.columns, tile, turned + r * tile.stride, traffic, parts);
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
  Traffic<T>{nullptr, nullptr, 0, {}, {}, tile.dw, sent_row, sent_count}.rest(0);
  if (p.stream) stream_fence();
  p.value_parts[task] = value;
}

}  // namespace moduli::MODULI_NAMESPACE
