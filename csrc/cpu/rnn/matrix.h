// The RNN's weights in the layouts that the products read (steps.h: Layout).
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "cpu/common/dispatch.h"
#include "cpu/common/kept_bits.h"
#include "cpu/common/tasks.h"
#include "cpu/common/tensors.h"
#include "cpu/rnn/steps.h"

namespace moduli {
namespace {

// A weight as an op gets it: (rows, columns) with a mask of its shape, if given; or stored entries with crow (rows + 1)
// and col, those of torch.sparse_csr.
struct Weight {
  const Tensor& weight;
  const OptionalTensor &mask, &crow, &col;
};

// The number of rows of a task, enough to be worth handing out
constexpr int64_t ROWS_A_TASK = 64;
inline int64_t row_tasks(int64_t rows) { return (rows + ROWS_A_TASK - 1) / ROWS_A_TASK; }

// The function calls run(row) for all rows, on torch's threads.
template <typename Run>
void each_row(int64_t rows, int64_t columns, Run run) {
  each_task(row_tasks(rows), rows * columns, [&](int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * ROWS_A_TASK);
    for (int64_t i = task * ROWS_A_TASK; i < end; ++i) run(i);
  });
}

// A matrix and the memory of its values.
template <typename T>
class OwnedMatrix {
 public:
  Matrix<T> matrix{};

 protected:
  // The method begins a matrix of kept entries and chooses its blocks of columns. A block is so narrow that its share
  // of a slab, `width` lanes, stays in the first-level cache, but so wide that rows have some entries in each. It is a
  // multiple of MASK_STEP columns.
  void set_blocks(int64_t rows, int64_t columns, int64_t entries, int64_t width) {
    constexpr int64_t CACHED_BYTES = 32 << 10, LEAST_ENTRIES = 8, MOST_COLUMNS = int64_t{1} << 16;
    const int64_t wanted = columns * width * static_cast<int64_t>(sizeof(T)) / CACHED_BYTES;
    const int64_t worth = entries / std::max<int64_t>(1, rows * LEAST_ENTRIES);
    const int64_t least = (columns + MOST_COLUMNS - 1) / MOST_COLUMNS;
    const int64_t blocks = std::max({int64_t{1}, least, std::min(wanted, worth)});
    const int64_t steps = (columns + blocks * MASK_STEP - 1) / (blocks * MASK_STEP),
                  wide = std::max<int64_t>(1, steps) * MASK_STEP;
    const int64_t needed = std::max<int64_t>(1, (columns + wide - 1) / wide);
    matrix = {.layout = Layout::ENTRIES,
              .rows = rows,
              .columns = columns,
              .blocks = needed,
              .block_columns = wide,
              .begin = nullptr,
              .column = nullptr,
              .value = nullptr};
    begin_.reset(new int64_t[matrix.blocks * rows + 1]());
  }
  // The number of entries of a block and row, to be set before allocate()
  int64_t& count(int64_t block, int64_t row) { return begin_[block * matrix.rows + row + 1]; }

  void allocate() {
    const int64_t size = matrix.blocks * matrix.rows;
    for (int64_t i = 0; i < size; ++i) begin_[i + 1] += begin_[i];
    column_.reset(new uint16_t[std::max<int64_t>(1, begin_[size])]);
    value_.reset(new T[std::max<int64_t>(1, begin_[size])]);
    matrix.begin = begin_.get();
    matrix.column = column_.get();
    matrix.value = value_.get();
  }
  void put(int64_t at, int64_t column, T value) {
    column_[at] = static_cast<uint16_t>(column);
    value_[at] = value;
  }

  void set_dense(Layout layout, int64_t rows, int64_t columns, const T* value) {
    matrix = {.layout = layout,
              .rows = rows,
              .columns = columns,
              .blocks = 1,
              .block_columns = columns,
              .begin = nullptr,
              .column = nullptr,
              .value = value};
  }
  // The method makes a dense matrix by calls of fill(to, first, end) for its panels or, if the layout is ROWS, its
  // rows.
  template <typename Fill>
  void make_dense(Layout layout, int64_t rows, int64_t columns, Fill fill) {
    const int64_t height = layout == Layout::PANELS ? PANEL : 1, a_task = ROWS_A_TASK / height;
    const int64_t count = (rows + height - 1) / height;
    value_.reset(new T[std::max<int64_t>(1, count * height * columns)]);
    each_task((count + a_task - 1) / a_task, rows * columns,
              [&](int64_t task) { fill(value_.get(), task * a_task, std::min(count, (task + 1) * a_task)); });
    set_dense(layout, rows, columns, value_.get());
  }

 private:
  std::unique_ptr<int64_t[]> begin_;
  std::unique_ptr<uint16_t[]> column_;
  std::unique_ptr<T[]> value_;
};

// The share of kept entries above which the whole masked weight is multiplied. It was measured, see
// benchmarks/NOTES.md. A single entry takes as long for one lane as for a vector of lanes. One lane goes over the whole
// weight without a copy, and over the transposed matrix too, whose entries would have to be sorted anew.
inline double dense_from(int64_t width, bool transposed) {
  if (width == 1) return transposed ? 0.1 : 0.25;
  return width <= 16 ? 0.4 : width <= 32 ? 0.6 : 0.7;
}

// The matrix of an op's weight, which must outlive it. `width` is the number of lanes of the widest strip. `transposed`
// says that the transposed matrix will be needed too.
template <typename T>
class StoredMatrix : public OwnedMatrix<T> {
 public:
  StoredMatrix(const Weight& w, int64_t rows, int64_t columns, int64_t width, bool transposed) {
    const T* weight = data<T>(w.weight);
    if (w.crow)
      from_compressed(data<int64_t>(*w.crow), data<int64_t>(*w.col), weight, rows, columns, width);
    else if (w.mask)
      from_mask(data<uint8_t>(*w.mask), weight, rows, columns, width, dense_from(width, transposed));
    else
      dense(weight, nullptr, rows, columns, width);
  }

 private:
  void dense(const T* weight, const uint8_t* mask, int64_t rows, int64_t columns, int64_t width) {
    if (width == 1 && !mask) return this->set_dense(Layout::ROWS, rows, columns, weight);
    const Layout layout = width == 1 ? Layout::ROWS : Layout::PANELS;
    const auto fill = width == 1 ? loops<T>().rnn.fill_rows : loops<T>().rnn.fill_panels;
    this->make_dense(layout, rows, columns, [&](T* to, int64_t begin, int64_t end) {
      fill({.weight = weight, .mask = mask, .rows = rows, .columns = columns, .to = to}, begin, end);
    });
  }

  void from_compressed(const int64_t* crow, const int64_t* col, const T* value, int64_t rows, int64_t columns,
                       int64_t width) {
    this->set_blocks(rows, columns, crow[rows], width);
    const int64_t wide = this->matrix.block_columns;
    each_row(rows, columns, [&](int64_t i) {
      for (int64_t e = crow[i]; e < crow[i + 1]; ++e) ++this->count(col[e] / wide, i);
    });
    this->allocate();
    each_row(rows, columns, [&](int64_t i) {
      int64_t e = crow[i];
      for (int64_t b = 0; b < this->matrix.blocks; ++b)
        for (int64_t at = this->matrix.begin[b * rows + i]; at < this->matrix.begin[b * rows + i + 1]; ++at, ++e)
          this->put(at, col[e] - b * wide, value[e]);
    });
  }

  void from_mask(const uint8_t* mask, const T* weight, int64_t rows, int64_t columns, int64_t width, double most) {
    const int64_t words = (columns + MASK_STEP - 1) / MASK_STEP;
    std::unique_ptr<uint64_t[]> bits(new uint64_t[std::max<int64_t>(1, rows * words)]);
    std::atomic<int64_t> entries{0};
    const RnnLoops<T>& rnn = loops<T>().rnn;
    each_row(rows, columns, [&](int64_t i) {
      rnn.find_kept(mask + i * columns, columns, &bits[i * words]);
      entries += rnn.count_bits(&bits[i * words], words);
    });
    if (static_cast<double>(entries) > most * static_cast<double>(rows * columns)) {
      dense(weight, mask, rows, columns, width);
      return;
    }
    this->set_blocks(rows, columns, entries, width);
    const int64_t wide = this->matrix.block_columns / MASK_STEP;
    const auto words_of = [&](int64_t b) { return std::min(wide, words - b * wide); };
    each_row(rows, columns, [&](int64_t i) {
      for (int64_t b = 0; b < this->matrix.blocks; ++b)
        this->count(b, i) = rnn.count_bits(&bits[i * words + b * wide], words_of(b));
    });
    this->allocate();
    each_row(rows, columns, [&](int64_t i) {
      for (int64_t b = 0; b < this->matrix.blocks; ++b) {
        const T* from = weight + i * columns + b * this->matrix.block_columns;
        int64_t at = this->matrix.begin[b * rows + i];
        for (int64_t w = 0; w < words_of(b); ++w)
          for (uint64_t left = bits[i * words + b * wide + w]; left; left &= left - 1, ++at) {
            const int64_t j = w * MASK_STEP + __builtin_ctzll(left);
            this->put(at, j, from[j]);
          }
      }
    });
  }
};

// The transposed matrix of m, which must outlive it.
template <typename T>
class TransposedMatrix : public OwnedMatrix<T> {
 public:
  TransposedMatrix(const Matrix<T>& m, int64_t width) {
    if (m.layout == Layout::ROWS)
      this->set_dense(Layout::COLUMNS, m.columns, m.rows, m.value);
    else if (m.layout == Layout::PANELS)
      this->make_dense(Layout::PANELS, m.columns, m.rows,
                       [&](T* to, int64_t begin, int64_t end) { loops<T>().rnn.transpose_panels(m, to, begin, end); });
    else
      transpose_entries(m, width);
  }

 private:
  void transpose_entries(const Matrix<T>& m, int64_t width) {
    const int64_t entries = m.begin[m.blocks * m.rows];
    this->set_blocks(m.columns, m.rows, entries, width);
    const int64_t wide = this->matrix.block_columns;
    // Each task has its own columns, which become rows.
    const int64_t tasks = std::min<int64_t>(torch::stable::get_num_threads(), row_tasks(m.block_columns));
    const auto each_entry = [&](auto use) {
      each_task(tasks, 4 * entries, [&](int64_t task) {
        const int64_t low = m.block_columns * task / tasks, high = m.block_columns * (task + 1) / tasks;
        for (int64_t b = 0; b < m.blocks; ++b)
          for (int64_t i = 0; i < m.rows; ++i) {
            const uint16_t* end = m.column + m.begin[b * m.rows + i + 1];
            const uint16_t* c = std::lower_bound(m.column + m.begin[b * m.rows + i], end, low);
            for (; c < end && *c < high; ++c) use(i, b * m.block_columns + *c, m.value[c - m.column]);
          }
      });
    };
    each_entry([&](int64_t i, int64_t j, T) { ++this->count(i / wide, j); });
    this->allocate();
    std::vector<int64_t> next(this->matrix.begin, this->matrix.begin + this->matrix.blocks * m.columns);
    each_entry([&](int64_t i, int64_t j, T value) { this->put(next[i / wide * m.columns + j]++, i % wide, value); });
  }
};

}  // namespace
}  // namespace moduli
