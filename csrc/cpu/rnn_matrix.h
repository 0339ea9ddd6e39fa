// The RNN's weights as the products read them: compressed rows of what is kept, or panels of a dense matrix.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "isa.h"
#include "rnn.h"
#include "tasks.h"

namespace moduli {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
const RnnLoops<T>& rnn_loops() {
  static const RnnLoops<T>& picked = [&]() -> const RnnLoops<T>& {
    constexpr bool FLOAT = sizeof(T) == 4;
    const auto of = [](const RnnLoops<float>& f32, const RnnLoops<double>& f64) -> const RnnLoops<T>& {
      if constexpr (FLOAT)
        return f32;
      else
        return f64;
    };
    switch (pick_isa()) {
#if MODULI_KERNELS_X86
      case Isa::AVX512: return of(avx512::rnn_f32, avx512::rnn_f64);
      case Isa::AVX2: return of(avx2::rnn_f32, avx2::rnn_f64);
#endif
      default: return of(portable::rnn_f32, portable::rnn_f64);
    }
  }();
  return picked;
}

// As an op gets it: see _library_rnn.py.
struct Weight {
  const Tensor& weight;
  const OptionalTensor &mask, &crow, &col;
};

// A matrix and the memory it lies in.
template <typename T>
struct OwnedMatrix {
  Matrix<T> matrix{};

 protected:
  std::unique_ptr<int64_t[]> begin;
  std::unique_ptr<int32_t[]> column;
  std::unique_ptr<T[]> value;

  // With room for the entries that begin[1 ..] counts, one number a row, which become their places.
  void allocate(int64_t rows, int64_t columns) {
    begin[0] = 0;
    for (int64_t i = 0; i < rows; ++i) begin[i + 1] += begin[i];
    column.reset(new int32_t[std::max<int64_t>(1, begin[rows])]);
    value.reset(new T[std::max<int64_t>(1, begin[rows])]);
    matrix = {rows, columns, begin.get(), column.get(), value.get()};
  }

  // element(i, j) of a dense matrix
  template <typename Element>
  void fill_panels(int64_t rows, int64_t columns, Element element) {
    const int64_t panels = (rows + PANEL - 1) / PANEL;
    value.reset(new T[std::max<int64_t>(1, panels * columns * PANEL)]);
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t j = 0; j < columns; ++j)
        for (int64_t r = 0; r < PANEL; ++r) {
          const int64_t i = p * PANEL + r;
          value[(p * columns + j) * PANEL + r] = i < rows ? element(i, j) : T(0);
        }
    matrix = {rows, columns, nullptr, nullptr, value.get()};
  }
};

// Rows that a task goes through: enough of them to be worth handing out.
constexpr int64_t ROWS_A_TASK = 64;
inline int64_t row_tasks(int64_t rows) { return (rows + ROWS_A_TASK - 1) / ROWS_A_TASK; }
template <typename Run>
void each_row(int64_t rows, Run run) {
  each_task(row_tasks(rows), [&](int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * ROWS_A_TASK);
    for (int64_t i = task * ROWS_A_TASK; i < end; ++i) run(i);
  });
}

template <typename T>
struct StoredMatrix : OwnedMatrix<T> {
  StoredMatrix(const Weight& w, int64_t rows, int64_t columns) {
    const T* weight = data<T>(w.weight);
    if (w.crow) {
      const auto crow = data<int64_t>(*w.crow), col = data<int64_t>(*w.col);
      const int64_t entries = crow[rows];
      this->column.reset(new int32_t[std::max<int64_t>(1, entries)]);
      std::transform(col, col + entries, this->column.get(), [](int64_t j) { return static_cast<int32_t>(j); });
      this->matrix = {rows, columns, crow, this->column.get(), weight};
    } else if (w.mask) {
      const auto mask = data<uint8_t>(*w.mask);
      const RnnLoops<T>& loops = rnn_loops<T>();
      this->begin.reset(new int64_t[rows + 1]);
      each_row(rows, [&](int64_t i) { this->begin[i + 1] = loops.count_kept(mask + i * columns, columns); });
      this->allocate(rows, columns);
      each_row(rows, [&](int64_t i) {
        const int64_t at = this->begin[i];
        loops.take_kept(mask + i * columns, weight + i * columns, columns, &this->column[at], &this->value[at]);
      });
    } else {
      this->fill_panels(rows, columns, [&](int64_t i, int64_t j) { return weight[i * columns + j]; });
    }
  }
};

template <typename T>
struct TransposedMatrix : OwnedMatrix<T> {
  explicit TransposedMatrix(const Matrix<T>& m) {
    if (!m.begin) {
      const auto element = [&](int64_t i, int64_t j) { return m.value[(j / PANEL * m.columns + i) * PANEL + j % PANEL]; };
      this->fill_panels(m.columns, m.rows, element);
      return;
    }
    // Each task goes through all rows, for columns of its own.
    const int64_t tasks = std::min<int64_t>(torch::stable::get_num_threads(), row_tasks(m.columns));
    const auto each_entry = [&](auto use) {
      each_task(tasks, [&](int64_t task) {
        const auto low = static_cast<int32_t>(m.columns * task / tasks);
        const auto high = static_cast<int32_t>(m.columns * (task + 1) / tasks);
        for (int64_t i = 0; i < m.rows; ++i) {
          const int32_t* end = m.column + m.begin[i + 1];
          for (const int32_t* c = std::lower_bound(m.column + m.begin[i], end, low); c < end && *c < high; ++c)
            use(i, *c, m.value[c - m.column]);
        }
      });
    };
    this->begin.reset(new int64_t[m.columns + 1]());
    each_entry([&](int64_t, int32_t j, T) { ++this->begin[j + 1]; });
    this->allocate(m.columns, m.rows);
    std::vector<int64_t> next(this->begin.get(), this->begin.get() + m.columns);
    each_entry([&](int64_t i, int32_t j, T value) {
      this->column[next[j]] = static_cast<int32_t>(i);
      this->value[next[j]++] = value;
    });
  }
};

}  // namespace
}  // namespace moduli
