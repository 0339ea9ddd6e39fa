// Copies of dense matrices to Layout::PANELS. Contracts stand in steps.h.
#pragma once

#include "cpu/rnn/steps.h"

namespace moduli::MODULI_NAMESPACE {
namespace {

// The number of columns that go through a buffer at a time
constexpr int64_t COLUMNS_AT_ONCE = 64;

// The loop has no branches, which the processor could only guess if about half of the entries are kept.
template <typename T>
void fill_panels(const DenseCopy<T>& p, int64_t begin, int64_t end) {
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
