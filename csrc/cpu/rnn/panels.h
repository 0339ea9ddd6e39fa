// Copies of dense matrices to Layout::PANELS and Layout::ROWS. Contracts stand in steps.h.
#pragma once

#include "cpu/rnn/steps.h"

namespace moduli::MODULI_NAMESPACE {
namespace {

// The number of columns that go through a buffer at a time
constexpr int64_t COLUMNS_AT_ONCE = 64;

// `count` entries of a row from a column on, 0 where masked. The loops have no branches, which the processor could only
// guess if about half of the entries are kept.
template <typename T>
inline void copy_row(const DenseCopy<T>& p, int64_t row, int64_t column, int64_t count, T* to) {
  const int64_t start = (p.row_order ? p.row_order[row] : row) * p.columns;
  if (p.column_order) {
    for (int64_t c = 0; c < count; ++c) {
      const int64_t at = start + p.column_order[column + c];
      const T w = p.weight[at];
      to[c] = !p.mask || p.mask[at] ? w : T(0);
    }
    return;
  }
  const T* from = p.weight + start + column;
  __builtin_memcpy(to, from, count * sizeof(T));
  if (p.mask)
    for (int64_t c = 0; c < count; ++c) to[c] = p.mask[start + column + c] ? to[c] : T(0);
}

template <typename T>
void fill_rows(const DenseCopy<T>& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) copy_row(p, row, 0, p.columns, p.to + row * p.columns);
}

template <typename T>
void fill_panels(const DenseCopy<T>& p, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    T* to = p.to + panel * p.columns * PANEL;
    for (int64_t j = 0; j < p.columns; j += COLUMNS_AT_ONCE, to += COLUMNS_AT_ONCE * PANEL) {
      const int64_t count = p.columns - j < COLUMNS_AT_ONCE ? p.columns - j : COLUMNS_AT_ONCE;
      T row[PANEL][COLUMNS_AT_ONCE] = {};
      for (int64_t r = 0; r < PANEL && panel * PANEL + r < p.rows; ++r) copy_row(p, panel * PANEL + r, j, count, row[r]);
      for (int64_t c = 0; c < count; ++c)
        for (int64_t r = 0; r < PANEL; ++r) to[c * PANEL + r] = row[r][c];
    }
  }
}

// Panel q of the transposed matrix holds its rows PANEL q, PANEL q + 1, ..., which are columns of m. It is made of
// squares of PANEL x PANEL.
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

}  // namespace
}  // namespace moduli::MODULI_NAMESPACE
