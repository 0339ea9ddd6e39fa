// Dense matrices as panels (rnn.h: Matrix): their making, and what one lane alone, a batch of 1, needs of its own: there
// is nothing in a slab to make vectors of, so those are made along the columns. Contracts in rnn.h.
#pragma once

#include "lanes.h"
#include "rnn.h"

namespace moduli::MODULI_NAMESPACE {
namespace {

// Columns that go through a buffer at a time.
constexpr int64_t COLUMNS_AT_ONCE = 64;

// Without branches: where about half of the entries are kept, each would be a guess.
template <typename T>
void fill_panels(const PanelsOf<T>& p, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    T* to = p.to + panel * p.columns * PANEL;
    for (int64_t j = 0; j < p.columns; j += COLUMNS_AT_ONCE, to += COLUMNS_AT_ONCE * PANEL) {
      const int64_t count = p.columns - j < COLUMNS_AT_ONCE ? p.columns - j : COLUMNS_AT_ONCE;
      T row[PANEL][COLUMNS_AT_ONCE] = {};
      for (int64_t r = 0; r < PANEL && panel * PANEL + r < p.rows; ++r) {
        const int64_t at = (panel * PANEL + r) * p.columns + j;
        __builtin_memcpy(row[r], p.weight + at, count * sizeof(T));
        if (p.mask)
          for (int64_t c = 0; c < count; ++c) row[r][c] = p.mask[at + c] ? row[r][c] : T(0);
      }
      for (int64_t c = 0; c < count; ++c)
        for (int64_t r = 0; r < PANEL; ++r) to[c * PANEL + r] = row[r][c];
    }
  }
}

// Panel `q` of the transposed matrix is made of rows 4 q ... of it, which are columns of m: squares of PANEL x PANEL.
template <typename T>
void transpose_panels(const Matrix<T>& m, T* to, int64_t begin, int64_t end) {
  for (int64_t q = begin; q < end; ++q)
    for (int64_t i = 0; i < m.rows; i += PANEL) {
      const int64_t columns = m.columns - q * PANEL < PANEL ? m.columns - q * PANEL : PANEL;
      const int64_t rows = m.rows - i < PANEL ? m.rows - i : PANEL;
      const T* from = m.value + i * m.columns + q * PANEL * PANEL;  // [column][row]
      T square[PANEL][PANEL] = {};
      for (int64_t j = 0; j < columns; ++j)
        for (int64_t r = 0; r < PANEL; ++r) square[r][j] = from[j * PANEL + r];
      __builtin_memcpy(to + (q * m.rows + i) * PANEL, square, rows * PANEL * sizeof(T));
    }
}

// sum += m times `from`, one number a column, rows begin .. end; `begin` is a multiple of PANEL.
template <typename T>
void add_dense_of_one_lane(const Matrix<T>& m, int64_t begin, int64_t end, const T* from, T* sum) {
  using S = Lanes<T, 64>;
  using V = typename S::V;
  constexpr int64_t AT_ONCE = 4, STEP = AT_ONCE * S::LANES, COLUMNS = 256;
  T spread[COLUMNS * PANEL];  // each number once for each row of a panel
  for (int64_t first = 0; first < m.columns; first += COLUMNS) {
    const int64_t count = PANEL * (m.columns - first < COLUMNS ? m.columns - first : COLUMNS);
    for (int64_t i = 0; i < count; ++i) spread[i] = from[first + i / PANEL];
    for (int64_t row = begin; row < end; row += PANEL) {
      const T* w = m.value + row * m.columns + first * PANEL;
      V acc[AT_ONCE]{};
      int64_t i = 0;
      for (; i + STEP <= count; i += STEP)
        for (int64_t u = 0; u < AT_ONCE; ++u)
          acc[u] += load_lanes<V>(w + i + u * S::LANES) * load_lanes<V>(spread + i + u * S::LANES);
      T parts[STEP], sums[PANEL] = {};
      __builtin_memcpy(parts, acc, sizeof(parts));
      for (int64_t k = 0; k < STEP; ++k) sums[k % PANEL] += parts[k];
      for (; i < count; ++i) sums[i % PANEL] += w[i] * spread[i];
      for (int64_t r = 0; r < PANEL; ++r) sum[row + r] += sums[r];
    }
  }
}

// grad += the products of ROWS rows of da with VECTORS vectors of columns, summed over steps.
template <int ROWS, int VECTORS, typename S, typename T>
inline void add_outer(const SampledProduct<T>& p, int64_t row, int64_t column) {
  using V = typename S::V;
  V acc[ROWS][VECTORS];
  T* to = p.grad + row * p.matrix.columns + column;
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) acc[r][v] = load_lanes<V>(to + r * p.matrix.columns + v * S::LANES);
  const T *da = p.da + row, *other = p.other + column;
  for (int64_t k = 0; k < p.steps; ++k, da += p.da_step, other += p.other_step)
    for (int v = 0; v < VECTORS; ++v) {
      const V lanes = load_lanes<V>(other + v * S::LANES);
      for (int r = 0; r < ROWS; ++r) acc[r][v] += da[r] * lanes;
    }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) store_lanes(to + r * p.matrix.columns + v * S::LANES, acc[r][v]);
}

template <int ROWS, typename T>
inline int64_t add_outer_rows(const SampledProduct<T>& p, int64_t row, int64_t end) {
  using Wide = Lanes<T, 64>;
  using One = Lanes<T, 1>;
  constexpr int VECTORS = 4;
  const int64_t columns = p.matrix.columns;
  for (; row + ROWS <= end; row += ROWS) {
    int64_t c = 0;
    for (; c + VECTORS * Wide::LANES <= columns; c += VECTORS * Wide::LANES) add_outer<ROWS, VECTORS, Wide>(p, row, c);
    for (; c + Wide::LANES <= columns; c += Wide::LANES) add_outer<ROWS, 1, Wide>(p, row, c);
    for (; c < columns; ++c) add_outer<ROWS, 1, One>(p, row, c);
  }
  return row;
}

// The gradient of a dense weight from one lane.
template <typename T>
void sampled_dense_of_one_lane(const SampledProduct<T>& p, int64_t begin, int64_t end) {
#if defined(__AVX512F__)
  constexpr int ROWS = 4;
#else
  constexpr int ROWS = 2;
#endif
  add_outer_rows<1>(p, add_outer_rows<ROWS>(p, begin, end), end);
}

}  // namespace
}  // namespace moduli::MODULI_NAMESPACE
