// The gradient of a weight while it is summed up over steps and lanes.
#pragma once

#include "cpu/rnn/slabs.h"

namespace moduli {
namespace {

// The gradient of a weight while it is summed up: (parts, strays and entries of blocks) for kept entries, (parts, rows,
// columns) for a dense matrix. Each strip has a part of its own, unless parts would take much memory; then there is one,
// which for a dense matrix in the weight's own order is `whole` itself.
template <typename T>
class WeightGrad {
 public:
  WeightGrad(const Matrix<T>& m, const Order& rows, const Order& columns, T* whole, const uint8_t* mask, int64_t strips)
      : matrix(m), rows(rows), columns(columns), whole(whole), mask(mask) {
    constexpr int64_t MOST_KEPT = int64_t{1} << 24, MOST_DENSE = int64_t{1} << 18;
    parts = strips > 0 && strips * size() <= (m.begin ? MOST_KEPT : MOST_DENSE) ? strips : 1;
    set_to_zero(whole, m.rows * m.columns);
    if (!m.begin && !rows.of && !columns.of && parts == 1) return;
    entries.emplace(parts * size());
    set_to_zero(of(0), parts * size());
  }
  int64_t size() const { return entries_of(matrix); }
  T* of(int64_t part) { return entries ? entries->data() + part * size() : whole; }
  void finish() {
    if (matrix.begin) return spread();
    if (!mask && !entries) return;
    each_row(matrix.rows, matrix.columns, [&](int64_t i) {
      const int64_t to = rows.at(i) * matrix.columns;
      for (int64_t part = 0; part < parts; ++part) {
        const T* from = of(part) + i * matrix.columns;
        for (int64_t j = 0; j < matrix.columns; ++j) {
          const int64_t at = to + columns.at(j);
          const T before = part ? whole[at] : T(0);
          whole[at] = !mask || mask[at] ? before + from[j] : T(0);
        }
      }
    });
  }
  const Matrix<T>& matrix;
  const Order &rows, &columns;
  T* whole;
  const uint8_t* mask;  // (rows, columns), 0 where the gradient must be 0; or null
  int64_t parts = 1;
  std::optional<Aligned<T>> entries;

 private:
  void spread() {
    const int64_t side = matrix.blocks.side;
    each_row(matrix.rows, matrix.columns, [&](int64_t i) {
      const int64_t row = rows.at(i) * matrix.columns;
      for (int64_t part = 0; part < parts; ++part) {
        const T* from = of(part);
        for (int64_t b = 0; b < matrix.bands; ++b) {
          const int64_t first = b * matrix.band_columns, at = b * matrix.rows + i;
          for (int64_t e = matrix.begin[at]; e < matrix.begin[at + 1]; ++e)
            whole[row + columns.at(first + matrix.column[e])] += from[e];
        }
        if (!side) continue;
        const T* blocks = from + strays_of(matrix);
        for (int64_t b = matrix.blocks.begin[i / side]; b < matrix.blocks.begin[i / side + 1]; ++b) {
          const int64_t first = matrix.blocks.column[b] * side, end = std::min(matrix.columns, first + side);
          for (int64_t j = first; j < end; ++j) {
            const int64_t at = row + columns.at(j);
            whole[at] += mask[at] ? blocks[(b * side + j - first) * side + i % side] : T(0);
          }
        }
      }
    });
  }
};

}  // namespace
}  // namespace moduli
