// The RNN's weights in the layouts that the products read (steps.h: Layout).
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu/common/aligned.h"
#include "cpu/rnn/kept_entries.h"

namespace moduli {
namespace {

// A matrix and the memory of its values.
template <typename T>
class OwnedMatrix {
 public:
  Matrix<T> matrix{};

 protected:
  // The method begins a matrix of kept entries and chooses the bands of its strays. A band is so narrow that its share
  // of a slab, `width` lanes, stays in the first-level cache, but so wide that rows have some strays in each. It is a
  // multiple of MASK_STEP columns.
  void set_bands(int64_t rows, int64_t columns, int64_t strays, int64_t width) {
    constexpr int64_t CACHED_BYTES = 32 << 10, LEAST_ENTRIES = 8, MOST_COLUMNS = int64_t{1} << 16;
    const int64_t wanted = columns * width * static_cast<int64_t>(sizeof(T)) / CACHED_BYTES;
    const int64_t worth = strays / std::max<int64_t>(1, rows * LEAST_ENTRIES);
    const int64_t least = (columns + MOST_COLUMNS - 1) / MOST_COLUMNS;
    const int64_t bands = std::max({int64_t{1}, least, std::min(wanted, worth)});
    const int64_t steps = (columns + bands * MASK_STEP - 1) / (bands * MASK_STEP),
                  wide = std::max<int64_t>(1, steps) * MASK_STEP;
    const int64_t needed = std::max<int64_t>(1, (columns + wide - 1) / wide);
    matrix = {.layout = Layout::ENTRIES,
              .rows = rows,
              .columns = columns,
              .bands = needed,
              .band_columns = wide,
              .begin = nullptr,
              .column = nullptr,
              .value = nullptr,
              .blocks = {}};
    begin_.reset(new int64_t[matrix.bands * rows + 1]());
  }
  // The number of strays of a band and row, to be set before allocate()
  int64_t& count(int64_t band, int64_t row) { return begin_[band * matrix.rows + row + 1]; }

  void allocate() {
    const int64_t size = matrix.bands * matrix.rows;
    for (int64_t i = 0; i < size; ++i) begin_[i + 1] += begin_[i];
    column_.reset(new uint16_t[std::max<int64_t>(1, begin_[size])]);
    value_ = std::make_unique<Aligned<T>>(begin_[size]);
    matrix.begin = begin_.get();
    matrix.column = column_.get();
    matrix.value = value_->data();
  }
  void put(int64_t at, int64_t column, T value) {
    column_[at] = static_cast<uint16_t>(column);
    value_->data()[at] = value;
  }

  // The method makes room for blocks, of which each row of squares has as many as counted.
  void allocate_blocks(int64_t side, const std::vector<int64_t>& counts) {
    block_begin_.reset(new int64_t[counts.size() + 1]());
    std::partial_sum(counts.begin(), counts.end(), block_begin_.get() + 1);
    const int64_t blocks = block_begin_[counts.size()];
    block_column_.reset(new uint16_t[blocks]);
    block_value_ = std::make_unique<Aligned<T>>(blocks * side * side);
    matrix.blocks = {
        .side = side, .begin = block_begin_.get(), .column = block_column_.get(), .value = block_value_->data()};
  }
  uint16_t& block_column(int64_t block) { return block_column_[block]; }
  T* block(int64_t i) { return block_value_->data() + i * matrix.blocks.side * matrix.blocks.side; }

  void set_dense(Layout layout, int64_t rows, int64_t columns, const T* value) {
    matrix = {.layout = layout,
              .rows = rows,
              .columns = columns,
              .bands = 1,
              .band_columns = columns,
              .begin = nullptr,
              .column = nullptr,
              .value = value,
              .blocks = {}};
  }
  // The method makes a dense matrix by calls of fill(to, first, end) for its panels or, if the layout is ROWS, its
  // rows.
  template <typename Fill>
  void make_dense(Layout layout, int64_t rows, int64_t columns, Fill fill) {
    const int64_t height = layout == Layout::PANELS ? PANEL : 1, a_task = ROWS_A_TASK / height;
    const int64_t count = (rows + height - 1) / height;
    value_ = std::make_unique<Aligned<T>>(count * height * columns);
    each_task((count + a_task - 1) / a_task, rows * columns,
              [&](int64_t task) { fill(value_->data(), task * a_task, std::min(count, (task + 1) * a_task)); });
    set_dense(layout, rows, columns, value_->data());
  }

 private:
  std::unique_ptr<int64_t[]> begin_;
  std::unique_ptr<uint16_t[]> column_;
  std::unique_ptr<Aligned<T>> value_;
  std::unique_ptr<int64_t[]> block_begin_;
  std::unique_ptr<uint16_t[]> block_column_;
  std::unique_ptr<Aligned<T>> block_value_;
};

// The share of kept entries above which the whole masked weight is multiplied. It was measured, see
// benchmarks/NOTES.md. A single entry takes as long for one lane as for a vector of lanes. One lane goes over the whole
// weight without a copy, and over the transposed matrix too, whose entries would have to be sorted anew.
inline double dense_from(int64_t width, bool transposed) {
  if (width == 1) return transposed ? 0.1 : 0.25;
  return width <= 16 ? 0.4 : width <= 32 ? 0.6 : 0.7;
}

// The matrix of an op's weight, which must outlive it, with its rows and columns in an order. `kept` says which entries
// are kept, and is null if all are. `width` is the number of lanes of the widest strip. `transposed` says that the
// transposed matrix will be needed too.
template <typename T>
class StoredMatrix : public OwnedMatrix<T> {
 public:
  StoredMatrix(const Weight& w, const KeptEntries* kept, int64_t rows, int64_t columns, const Order& row_order,
               const Order& column_order, int64_t width, bool transposed) {
    if (kept && !(w.mask && whole_is_best(*kept, dense_from(width, transposed))))
      from_entries(w, *kept, row_order, column_order, width);
    else
      dense({.weight = data<T>(w.weight),
             .mask = data_or_null<uint8_t>(w.mask),
             .rows = rows,
             .columns = columns,
             .row_order = row_order.of,
             .column_order = column_order.of,
             .to = nullptr},
            width);
  }

 private:
  static bool whole_is_best(const KeptEntries& kept, double most) {
    const double all = static_cast<double>(kept.rows * kept.columns);
    return static_cast<double>(kept.entries) > most * all && !kept.blocks_are_clearly_best();
  }

  void dense(const DenseCopy<T>& w, int64_t width) {
    if (width == 1 && !w.mask && !w.row_order && !w.column_order)
      return this->set_dense(Layout::ROWS, w.rows, w.columns, w.weight);
    const Layout layout = width == 1 ? Layout::ROWS : Layout::PANELS;
    const auto fill = width == 1 ? loops<T>().rnn.fill_rows : loops<T>().rnn.fill_panels;
    this->make_dense(layout, w.rows, w.columns, [&](T* to, int64_t begin, int64_t end) {
      DenseCopy<T> copy = w;
      copy.to = to;
      fill(copy, begin, end);
    });
  }

  void from_entries(const Weight& w, const KeptEntries& kept, const Order& row_order, const Order& column_order,
                    int64_t width) {
    this->set_bands(kept.rows, kept.columns, kept.strays, width);
    const int64_t wide = this->matrix.band_columns / MASK_STEP, side = kept.side;
    if (side) find_blocks(kept);
    const auto each_row_of_strays = [&](auto use) {  // use(row, bits of its strays)
      each_run_of_rows(kept.rows, kept.columns, [&](int64_t first, int64_t end) {
        const std::unique_ptr<uint64_t[]> strays(new uint64_t[kept.words]);
        for (int64_t i = first; i < end; ++i) {
          std::copy_n(kept.bits(i), kept.words, strays.get());
          if (side) clear_blocks(i / side, strays.get());
          use(i, strays.get());
        }
      });
    };
    if (kept.strays)
      each_row_of_strays([&](int64_t i, const uint64_t* bits) {
        for (int64_t b = 0; b < this->matrix.bands; ++b)
          this->count(b, i) = loops<T>().rnn.count_bits(bits + b * wide, std::min(wide, kept.words - b * wide));
      });
    this->allocate();
    if (w.crow) return from_compressed(w, kept, row_order, column_order);
    if (side) fill_blocks(data<T>(w.weight), kept, row_order, column_order);
    if (kept.strays)
      each_row_of_strays([&](int64_t i, const uint64_t* bits) {
        const T* weight = data<T>(w.weight) + row_order.at(i) * kept.columns;
        for (int64_t b = 0; b < this->matrix.bands; ++b) {
          int64_t at = this->matrix.begin[b * kept.rows + i];
          const int64_t first = b * this->matrix.band_columns, words = std::min(wide, kept.words - b * wide);
          for (int64_t word = 0; word < words; ++word)
            for (uint64_t left = bits[b * wide + word]; left; left &= left - 1, ++at) {
              const int64_t j = word * MASK_STEP + __builtin_ctzll(left);
              this->put(at, j, weight[column_order.at(first + j)]);
            }
        }
      });
  }

  void fill_blocks(const T* weight, const KeptEntries& kept, const Order& row_order, const Order& column_order) {
    constexpr int64_t AT_ONCE = 4;  // rows of squares of a task
    const int64_t count = KeptEntries::squares(kept.rows, kept.side);
    each_task((count + AT_ONCE - 1) / AT_ONCE, kept.entries, [&](int64_t task) {
      loops<T>().rnn.fill_blocks({.weight = weight,
                                  .bits = kept.bits(0),
                                  .rows = kept.rows,
                                  .columns = kept.columns,
                                  .words = kept.words,
                                  .row_order = row_order.of,
                                  .column_order = column_order.of,
                                  .blocks = this->matrix.blocks,
                                  .to = this->block(0)},
                                 task * AT_ONCE, std::min(count, (task + 1) * AT_ONCE));
    });
  }

  // Compressed rows are sorted by the weight's own columns, so entries come to their places one by one.
  void from_compressed(const Weight& w, const KeptEntries& kept, const Order& row_order, const Order& column_order) {
    const auto crow = data<int64_t>(*w.crow), col = data<int64_t>(*w.col);
    const T* value = data<T>(w.weight);
    const int64_t side = kept.side;
    if (side) set_to_zero(this->block(0), kept.blocks * side * side);
    each_run_of_rows(kept.rows, kept.columns, [&](int64_t first, int64_t end) {
      std::vector<int64_t> next(this->matrix.bands);
      std::vector<int32_t> block_of(side ? KeptEntries::squares(kept.columns, side) : 0, -1);
      for (int64_t i = first; i < end; ++i) {
        if (side && i % side == 0) blocks_of_row(i / side, block_of);
        for (int64_t b = 0; b < this->matrix.bands; ++b) next[b] = this->matrix.begin[b * kept.rows + i];
        const int64_t row = row_order.at(i);
        for (int64_t e = crow[row]; e < crow[row + 1]; ++e) {
          const int64_t j = column_order.place_of(col[e]), block = side ? block_of[j / side] : -1;
          if (block >= 0)
            this->block(block)[j % side * side + i % side] = value[e];
          else
            this->put(next[j / this->matrix.band_columns]++, j % this->matrix.band_columns, value[e]);
        }
      }
    });
  }

  void find_blocks(const KeptEntries& kept) {
    const int64_t side = kept.side, wide = KeptEntries::squares(kept.columns, side);
    std::vector<int64_t> counts(KeptEntries::squares(kept.rows, side));
    const auto each_row_of_squares = [&](auto run) { each_row(static_cast<int64_t>(counts.size()), kept.words, run); };
    each_row_of_squares([&](int64_t i) {
      for (int64_t j = 0; j < wide; ++j) counts[i] += kept.is_block(i, j);
    });
    this->allocate_blocks(side, counts);
    each_row_of_squares([&](int64_t i) {
      int64_t at = this->matrix.blocks.begin[i];
      for (int64_t j = 0; j < wide; ++j)
        if (kept.is_block(i, j)) this->block_column(at++) = static_cast<uint16_t>(j);
    });
  }
  // The method clears the bits of a row's entries that are in blocks of row i of squares.
  void clear_blocks(int64_t i, uint64_t* bits) const {
    const Blocks<T>& b = this->matrix.blocks;
    const uint64_t ones = (uint64_t{1} << b.side) - 1;
    for (int64_t at = b.begin[i]; at < b.begin[i + 1]; ++at) {
      const int64_t j = int64_t{b.column[at]} * b.side;
      bits[j / MASK_STEP] &= ~(ones << j % MASK_STEP);
    }
  }
  // block_of[j] becomes the block in column j of squares, or -1, for row i of squares.
  void blocks_of_row(int64_t i, std::vector<int32_t>& block_of) const {
    const Blocks<T>& b = this->matrix.blocks;
    std::fill(block_of.begin(), block_of.end(), -1);
    for (int64_t at = b.begin[i]; at < b.begin[i + 1]; ++at) block_of[b.column[at]] = static_cast<int32_t>(at);
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
    else {
      transpose_strays(m, width);
      if (m.blocks.side) transpose_blocks(m.blocks, m.rows, m.columns);
    }
  }

 private:
  void transpose_strays(const Matrix<T>& m, int64_t width) {
    const int64_t strays = strays_of(m);
    this->set_bands(m.columns, m.rows, strays, width);
    const int64_t wide = this->matrix.band_columns;
    // Each task has its own columns, which become rows.
    const int64_t tasks = std::min<int64_t>(torch::stable::get_num_threads(), row_tasks(m.band_columns));
    const auto each_stray = [&](auto use) {
      if (strays == 0) return;
      each_task(tasks, 4 * strays, [&](int64_t task) {
        const int64_t low = m.band_columns * task / tasks, high = m.band_columns * (task + 1) / tasks;
        for (int64_t b = 0; b < m.bands; ++b)
          for (int64_t i = 0; i < m.rows; ++i) {
            const uint16_t* end = m.column + m.begin[b * m.rows + i + 1];
            const uint16_t* c = std::lower_bound(m.column + m.begin[b * m.rows + i], end, low);
            for (; c < end && *c < high; ++c) use(i, b * m.band_columns + *c, m.value[c - m.column]);
          }
      });
    };
    each_stray([&](int64_t i, int64_t j, T) { ++this->count(i / wide, j); });
    this->allocate();
    std::vector<int64_t> next(this->matrix.begin, this->matrix.begin + this->matrix.bands * m.columns);
    each_stray([&](int64_t i, int64_t j, T value) { this->put(next[i / wide * m.columns + j]++, i % wide, value); });
  }

  void transpose_blocks(const Blocks<T>& b, int64_t rows, int64_t columns) {
    const int64_t side = b.side, tall = KeptEntries::squares(rows, side);
    std::vector<int64_t> counts(KeptEntries::squares(columns, side));
    for (int64_t at = 0; at < b.begin[tall]; ++at) ++counts[b.column[at]];
    this->allocate_blocks(side, counts);
    std::vector<int64_t> next(this->matrix.blocks.begin, this->matrix.blocks.begin + counts.size());
    std::vector<int64_t> from(b.begin[tall]);  // the block of b that each block here is made of
    for (int64_t i = 0; i < tall; ++i)
      for (int64_t at = b.begin[i]; at < b.begin[i + 1]; ++at) {
        const int64_t to = next[b.column[at]]++;
        this->block_column(to) = static_cast<uint16_t>(i);
        from[to] = at;
      }
    each_row(b.begin[tall], side * side,
             [&](int64_t i) { loops<T>().rnn.transpose_block(b.value + from[i] * side * side, this->block(i), side); });
  }
};

}  // namespace
}  // namespace moduli
