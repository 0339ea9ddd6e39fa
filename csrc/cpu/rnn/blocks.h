// Products with the blocks of a matrix, and the gradient of their entries. Contracts stand in steps.h.
//
// All rows of a block read the same rows of a slab. So a few vectors of sums stay in registers for several rows at once,
// and a vector of lanes, once loaded, serves them all.
#pragma once

#include "cpu/common/transpose.h"
#include "cpu/rnn/lanes.h"
#include "cpu/rnn/steps.h"

namespace moduli::MODULI_NAMESPACE {
namespace {

// How many sums are computed in registers at a time: vectors of lanes, and rows for each.
template <typename S, int SIDE>
struct BlockTile {
  static constexpr int VECTORS = S::N % 3 == 0 ? 3 : S::N % 2 == 0 ? 2 : 1;
#if defined(__AVX512F__)
  static constexpr int WANTED = VECTORS == 1 ? 16 : 8;
#else
  static constexpr int WANTED = VECTORS == 1 ? 8 : 4;
#endif
  static constexpr int ROWS = WANTED < SIDE ? WANTED : SIDE;
};

template <int SIDE, typename T>
inline int64_t columns_inside(const Matrix<T>& m, int64_t square) {
  const int64_t left = m.columns - square * SIDE;
  return left < SIDE ? left : SIDE;
}

// Rows begin .. end of slab sum += the blocks times a slab
template <int SIDE, typename S, typename T>
void add_blocks_of_lanes(const Matrix<T>& m, int64_t begin, int64_t end, const T* slab, T* sum) {
  using V = typename S::V;
  constexpr int VECTORS = BlockTile<S, SIDE>::VECTORS, ROWS = BlockTile<S, SIDE>::ROWS;
  const Blocks<T>& b = m.blocks;
  for (int64_t row = begin; row < end; row += SIDE) {
    const int64_t first = b.begin[row / SIDE], last = b.begin[row / SIDE + 1];
    for (int lane = 0; lane < S::WIDTH; lane += VECTORS * S::LANES)
      for (int r0 = 0; r0 < SIDE; r0 += ROWS) {
        T* to = sum + (row + r0) * S::WIDTH + lane;
        V acc[ROWS][VECTORS];
        for (int r = 0; r < ROWS; ++r)
          for (int v = 0; v < VECTORS; ++v) acc[r][v] = load_lanes<V>(to + r * S::WIDTH + v * S::LANES);
        for (int64_t i = first; i < last; ++i) {
          const T *w = b.value + i * SIDE * SIDE + r0, *from = slab + int64_t{b.column[i]} * SIDE * S::WIDTH + lane;
          const int64_t count = columns_inside<SIDE>(m, b.column[i]);
          for (int64_t k = 0; k < count; ++k, w += SIDE, from += S::WIDTH) {
            V lanes[VECTORS];
            for (int v = 0; v < VECTORS; ++v) lanes[v] = load_lanes<V>(from + v * S::LANES);
            for (int r = 0; r < ROWS; ++r)
              for (int v = 0; v < VECTORS; ++v) acc[r][v] += w[r] * lanes[v];
          }
        }
        for (int r = 0; r < ROWS; ++r)
          for (int v = 0; v < VECTORS; ++v) store_lanes(to + r * S::WIDTH + v * S::LANES, acc[r][v]);
      }
  }
}

// The same for one lane, with vectors along the rows of a block. Several sums are computed side by side, since the
// additions of a single sum would wait for each other.
template <int SIDE, typename T>
void add_blocks_of_one_lane(const Matrix<T>& m, int64_t begin, int64_t end, const T* slab, T* sum) {
  using R = Lanes<T, SIDE>;
  using V = typename R::V;
  constexpr int SIDE_BY_SIDE = R::N == 1 ? 4 : R::N == 2 ? 2 : 1;
  const Blocks<T>& b = m.blocks;
  for (int64_t row = begin; row < end; row += SIDE) {
    V acc[SIDE_BY_SIDE][R::N]{};
    for (int64_t i = b.begin[row / SIDE]; i < b.begin[row / SIDE + 1]; ++i) {
      const T *w = b.value + i * SIDE * SIDE, *from = slab + int64_t{b.column[i]} * SIDE;
      const int64_t count = columns_inside<SIDE>(m, b.column[i]);
      int64_t k = 0;
      for (; k + SIDE_BY_SIDE <= count; k += SIDE_BY_SIDE)
        for (int u = 0; u < SIDE_BY_SIDE; ++u)
          for (int v = 0; v < R::N; ++v) acc[u][v] += from[k + u] * load_lanes<V>(w + (k + u) * SIDE + v * R::LANES);
      for (; k < count; ++k)
        for (int v = 0; v < R::N; ++v) acc[0][v] += from[k] * load_lanes<V>(w + k * SIDE + v * R::LANES);
    }
    for (int v = 0; v < R::N; ++v) {
      V all = load_lanes<V>(sum + row + v * R::LANES);
      for (int u = 0; u < SIDE_BY_SIDE; ++u) all += acc[u][v];
      store_lanes(sum + row + v * R::LANES, all);
    }
  }
}

// The gradient of the blocks in rows begin .. end. Vectors go along the rows, for which da is read lane by lane, and so
// no sum goes across a vector.
template <int SIDE, typename S, typename T>
void sample_blocks(const SampledProduct<T>& p, int64_t begin, int64_t end) {
  using R = Lanes<T, SIDE>;
  using V = typename R::V;
#if defined(__AVX512F__)
  constexpr int SUMS = 16;
#else
  constexpr int SUMS = 8;
#endif
  constexpr int COLUMNS = SUMS / R::N < SIDE ? SUMS / R::N : SIDE;
  const Blocks<T>& b = p.matrix.blocks;
  for (int64_t row = begin; row < end; row += SIDE)
    for (int64_t i = b.begin[row / SIDE]; i < b.begin[row / SIDE + 1]; ++i)
      for (int c0 = 0; c0 < SIDE; c0 += COLUMNS) {
        T* to = p.grad_blocks + (i * SIDE + c0) * SIDE;
        const T* other = p.other + (int64_t{b.column[i]} * SIDE + c0) * S::WIDTH;
        V acc[COLUMNS][R::N];
        for (int c = 0; c < COLUMNS; ++c)
          for (int v = 0; v < R::N; ++v) acc[c][v] = load_lanes<V>(to + c * SIDE + v * R::LANES);
        for (int64_t k = 0; k < p.steps; ++k, other += p.other_step) {
          const T* da = p.da_of_lanes + k * p.lanes * p.lane_stride + row;
          for (int64_t l = 0; l < p.lanes; ++l, da += p.lane_stride) {
            V d[R::N];
            for (int v = 0; v < R::N; ++v) d[v] = load_lanes<V>(da + v * R::LANES);
            for (int c = 0; c < COLUMNS; ++c)
              for (int v = 0; v < R::N; ++v) acc[c][v] += other[c * S::WIDTH + l] * d[v];
          }
        }
        for (int c = 0; c < COLUMNS; ++c)
          for (int v = 0; v < R::N; ++v) store_lanes(to + c * SIDE + v * R::LANES, acc[c][v]);
      }
}

// `side` rows of a block, [row][column], become its columns.
template <typename T>
void transpose_block(const T* from, T* to, int64_t side) {
  if (side == SQUARE) return transpose_square<false>(from, SQUARE, to, SQUARE);
  for (int64_t c = 0; c < side; ++c)
    for (int64_t r = 0; r < side; ++r) to[c * side + r] = from[r * side + c];
}

template <typename T>
void fill_blocks(const BlockCopy<T>& p, int64_t begin, int64_t end) {
  const int64_t side = p.blocks.side;
  for (int64_t i = begin; i < end; ++i)
    for (int64_t b = p.blocks.begin[i]; b < p.blocks.begin[i + 1]; ++b) {
      const int64_t column = p.blocks.column[b] * side, count = p.columns - column < side ? p.columns - column : side;
      T block[SQUARE * SQUARE] = {};
      for (int64_t r = 0; r < side && i * side + r < p.rows; ++r) {
        const int64_t row = i * side + r;
        const uint64_t kept = p.bits[row * p.words + column / 64] >> column % 64;
        const T* from = p.weight + (p.row_order ? p.row_order[row] : row) * p.columns;
        T* to = block + r * side;
        if (p.column_order)
          for (int64_t c = 0; c < count; ++c) to[c] = kept >> c & 1 ? from[p.column_order[column + c]] : T(0);
        else
          for (int64_t c = 0; c < count; ++c) to[c] = kept >> c & 1 ? from[column + c] : T(0);
      }
      transpose_block(block, p.to + b * side * side, side);
    }
}

// The function calls run(side) with the side of the blocks as a constant, if there are blocks.
template <typename T, typename Run>
inline void with_side(const Matrix<T>& m, Run run) {
  if (m.blocks.side == 16)
    run(std::integral_constant<int, 16>());
  else if (m.blocks.side == 8)
    run(std::integral_constant<int, 8>());
}

template <typename S, typename T>
inline void add_blocks(const Matrix<T>& m, int64_t begin, int64_t end, const T* slab, T* sum) {
  with_side(m, [&](auto side) {
    if constexpr (S::WIDTH == 1)
      add_blocks_of_one_lane<side()>(m, begin, end, slab, sum);
    else
      add_blocks_of_lanes<side(), S>(m, begin, end, slab, sum);
  });
}

}  // namespace
}  // namespace moduli::MODULI_NAMESPACE
