// Dense matrices with one lane, which is a batch of 1. A slab of one lane holds no vectors, so these loops read vectors
// along the rows or columns of the weight, in the tensor's own layout. Contracts stand in steps.h.
#pragma once

#include "cpu/rnn/lanes.h"
#include "cpu/rnn/steps.h"

namespace moduli::MODULI_NAMESPACE {
namespace {

// sum[r] += the product of row r of ROWS rows with `from` (columns). The last columns, which fill no vector, are read
// together with some before them that count as 0. If there are none before them, they are multiplied one by one.
template <int ROWS, typename T>
inline void add_rows(const T* w, int64_t columns, const T* from, T* sum) {
  using S = Lanes<T, 64>;
  using V = typename S::V;
  V acc[ROWS]{};
  int64_t j = 0;
  for (; j + S::LANES <= columns; j += S::LANES) {
    const V x = load_lanes<V>(from + j);
    for (int r = 0; r < ROWS; ++r) acc[r] += load_lanes<V>(w + r * columns + j) * x;
  }
  if (j < columns && j > 0) {
    const int64_t last = columns - S::LANES;
    T place[S::LANES];
    for (int l = 0; l < S::LANES; ++l) place[l] = static_cast<T>(last + l - j);
    const auto left = load_lanes<V>(place) >= V{};
    const V zero{}, x = left ? load_lanes<V>(from + last) : zero;
    for (int r = 0; r < ROWS; ++r) acc[r] += (left ? load_lanes<V>(w + r * columns + last) : zero) * x;
  } else {
    for (; j < columns; ++j)
      for (int r = 0; r < ROWS; ++r) sum[r] += w[r * columns + j] * from[j];
  }
  if constexpr (ROWS == 8)
    add_sums_of_eight<T>(acc, sum);
  else
    for (int r = 0; r < ROWS; ++r) sum[r] += sum_of_lanes<T>(acc[r]);
}

// sum[begin .. end] += the products of COLUMNS columns with their COLUMNS numbers of `from`.
template <int COLUMNS, typename T>
inline void add_columns(const T* w, int64_t stride, int64_t begin, int64_t end, const T* from, T* sum) {
  using S = Lanes<T, 64>;
  using V = typename S::V;
  int64_t row = begin;
  for (; row + S::LANES <= end; row += S::LANES) {
    V acc = load_lanes<V>(sum + row);
    for (int c = 0; c < COLUMNS; ++c) acc += from[c] * load_lanes<V>(w + c * stride + row);
    store_lanes(sum + row, acc);
  }
  for (; row < end; ++row)
    for (int c = 0; c < COLUMNS; ++c) sum[row] += from[c] * w[c * stride + row];
}

// Rows begin .. end of sum += m times `from` (columns)
template <typename T>
void add_dense_of_one_lane(const Matrix<T>& m, int64_t begin, int64_t end, const T* from, T* sum) {
  constexpr int AT_ONCE = 8;
  if (m.layout == Layout::ROWS) {
    int64_t row = begin;
    for (; row + AT_ONCE <= end; row += AT_ONCE) add_rows<AT_ONCE>(m.value + row * m.columns, m.columns, from, sum + row);
    for (; row < end; ++row) add_rows<1>(m.value + row * m.columns, m.columns, from, sum + row);
  } else {
    int64_t c = 0;
    for (; c + AT_ONCE <= m.columns; c += AT_ONCE)
      add_columns<AT_ONCE>(m.value + c * m.rows, m.rows, begin, end, from + c, sum);
    for (; c < m.columns; ++c) add_columns<1>(m.value + c * m.rows, m.rows, begin, end, from + c, sum);
  }
}

// grad += the products of ROWS rows of da with VECTORS vectors of columns of `other`, summed over steps
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

// Rows begin .. end of the gradient of a dense weight
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
