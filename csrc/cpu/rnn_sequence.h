// A sequence through one layer in one direction: strips of the batch, their slabs, and the order of the steps.
#pragma once

#include "rnn_matrix.h"

namespace moduli {
namespace {

struct Direction {
  int64_t steps, batch, input, hidden;
  Nonlinearity nonlinearity;
  double leak;
  bool reverse;
};

struct Strip {
  int64_t first, lanes, width;  // of the batch
};

// Depends on the batch alone, so that sums over lanes do too. From 32 lanes on there are two at least, to share out.
inline std::vector<Strip> strips_of(int64_t batch) {
  constexpr int64_t UNIT = 16, MOST_UNITS = 4;
  const int64_t units = (batch + UNIT - 1) / UNIT;
  const int64_t count = batch == 0 ? 0 : batch <= 24 ? 1 : std::max<int64_t>(2, (units + MOST_UNITS - 1) / MOST_UNITS);
  std::vector<Strip> strips;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t first = units * s / count * UNIT, end = s + 1 == count ? batch : units * (s + 1) / count * UNIT;
    const auto width = std::find_if(std::begin(WIDTHS), std::end(WIDTHS), [&](int64_t w) { return w >= end - first; });
    strips.push_back({first, end - first, *width});
  }
  return strips;
}

// For each strip, `steps` slabs of `rows` rows in a row.
template <typename T>
class Slabs {
 public:
  Slabs(const std::vector<Strip>& strips, int64_t steps, int64_t rows) : rows_(rows) {
    int64_t size = 0;
    for (const Strip& strip : strips) {
      first_.push_back(size);
      width_.push_back(strip.width);
      size += steps * rows * strip.width;
    }
    memory_.reset(new T[size + 64 / sizeof(T)]);
    aligned_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
  }
  T* at(int64_t strip, int64_t step) const { return aligned_ + first_[strip] + step * stride(strip); }
  int64_t stride(int64_t strip) const { return rows_ * width_[strip]; }
  int64_t rows() const { return rows_; }

 private:
  int64_t rows_;
  std::vector<int64_t> first_, width_;
  std::unique_ptr<T[]> memory_;
  T* aligned_;
};

template <typename T>
using SlabsPointer = std::unique_ptr<Slabs<T>>;

template <typename T>
class Sequence {
 public:
  Sequence(const Direction& d, const OptionalTensor& lengths) : d_(d), strips_(strips_of(d.batch)), loops_(rnn_loops<T>()) {
    if (!lengths) return;
    const auto length = data<int64_t>(*lengths);
    active_ = make_slabs(d.steps, 1);
    each_step_of_strips([&](int64_t s, int64_t k) {
      const Strip& strip = strips_[s];
      for (int64_t l = 0; l < strip.width; ++l)
        active_->at(s, k)[l] = l < strip.lanes && time(k) < length[strip.first + l] ? T(1) : T(0);
    });
  }

  void forward(const Matrix<T>& input, const Matrix<T>& hidden, const T* bias, const T* x, const T* h, T* output, T* h_n,
               T* activations) const {
    const auto inputs_of = inputs(x);
    const auto state = make_slabs(2, d_.hidden), kept = activations ? make_slabs(1, d_.hidden) : nullptr;
    for_strips([&](int64_t s) { read(h, d_.hidden, s, state->at(s, 0)); });
    run_steps(hidden, [&](int64_t s, int64_t k, int64_t begin, int64_t end) {
      const int64_t width = strips_[s].width;
      T *next = state->at(s, (k + 1) % 2), *s_of_a = kept ? kept->at(s, 0) : nullptr;
      loops_.forward({input, hidden, inputs_of->at(s, k), state->at(s, k % 2), bias, next, s_of_a, active(s, k), width,
                      d_.nonlinearity, T(d_.leak)},
                     begin, end);
      write(next, s, step_of(output, k), d_.hidden, begin, end);
      if (activations) write(s_of_a, s, step_of(activations, k), d_.hidden, begin, end);
    });
    for_strips([&](int64_t s) { write(state->at(s, d_.steps % 2), s, h_n, d_.hidden, 0, d_.hidden); });
  }

  // Slabs of x, in the order in which the steps are taken.
  SlabsPointer<T> inputs(const T* x) const {
    auto slabs = make_slabs(d_.steps, d_.input);
    each_step_of_strips([&](int64_t s, int64_t k) { read(x + time(k) * d_.batch * d_.input, d_.input, s, slabs->at(s, k)); });
    return slabs;
  }

  // Slabs of the state before each step, and after the last.
  SlabsPointer<T> states(const T* h, const T* output) const {
    auto slabs = make_slabs(d_.steps + 1, d_.hidden);
    for_strips([&](int64_t s) { read(h, d_.hidden, s, slabs->at(s, 0)); });
    each_step_of_strips([&](int64_t s, int64_t k) { read(step_of(output, k), d_.hidden, s, slabs->at(s, k + 1)); });
    return slabs;
  }

  // Slabs of dL/da; activations null: they are the states after each step. dh null: not needed.
  SlabsPointer<T> backward(const Matrix<T>& hidden_transposed, const T* grad_output, const T* grad_h_n, const Slabs<T>* states,
                           const T* activations, T* dh) const {
    auto da = make_slabs(d_.steps, d_.hidden);
    const auto stays = make_slabs(1, d_.hidden), grads = make_slabs(1, d_.hidden);
    const auto kept = activations ? make_slabs(1, d_.hidden) : nullptr;
    for_strips([&](int64_t s) { read(grad_h_n, d_.hidden, s, stays->at(s, 0)); });
    run_steps(hidden_transposed, [&](int64_t s, int64_t step, int64_t begin, int64_t end) {
      const int64_t k = d_.steps - 1 - step, width = strips_[s].width;
      read(step_of(grad_output, k), d_.hidden, s, grads->at(s, 0), begin, end);
      if (activations) read(step_of(activations, k), d_.hidden, s, kept->at(s, 0), begin, end);
      loops_.backward({hidden_transposed, step ? da->at(s, k + 1) : nullptr, grads->at(s, 0),
                       activations ? kept->at(s, 0) : states->at(s, k + 1), da->at(s, k), stays->at(s, 0), active(s, k), width,
                       d_.nonlinearity, T(d_.leak)},
                      begin, end);
    });
    if (dh)
      for_strips([&](int64_t s) {
        if (d_.steps) loops_.product({hidden_transposed, da->at(s, 0), stays->at(s, 0), strips_[s].width}, 0, d_.hidden);
        write(stays->at(s, 0), s, dh, d_.hidden, 0, d_.hidden);
      });
    return da;
  }

  void input_grad(const Matrix<T>& input_transposed, const Slabs<T>* da, T* dx) const {
    each_step_of_strips([&](int64_t s, int64_t k) {
      const int64_t width = strips_[s].width;
      Slabs<T> slab({strips_[s]}, 1, d_.input);
      std::fill_n(slab.at(0, 0), slab.stride(0), T(0));
      loops_.product({input_transposed, da->at(s, k), slab.at(0, 0), width}, 0, d_.input);
      write(slab.at(0, 0), s, dx + time(k) * d_.batch * d_.input, d_.input, 0, d_.input);
    });
  }

  // grad (hidden, columns) = sum over steps and lanes of da other^T where the matrix has entries, else 0.
  void weight_grad(const Matrix<T>& matrix, const Slabs<T>* da, const Slabs<T>* other, T* grad) const {
    const int64_t columns = matrix.columns;
    each_chunk_of_rows(matrix, torch::stable::get_num_threads(), [&](int64_t begin, int64_t end) {
      std::fill(grad + begin * columns, grad + end * columns, T(0));
      const int64_t first = matrix.begin ? matrix.begin[begin] : 0;
      std::vector<T> sums(matrix.begin ? matrix.begin[end] - first : 0);
      for (int64_t s = 0; s < strips(); ++s) {
        const int64_t width = strips_[s].width, at_once = steps_at_once(columns * width);
        for (int64_t k = 0; k < d_.steps; k += at_once)
          for (int64_t i = begin; i < end; ++i) {
            const int64_t at = matrix.begin ? matrix.begin[i] : 0;
            loops_.sampled_row({da->at(s, k) + i * width, other->at(s, k), da->stride(s), other->stride(s),
                                std::min(at_once, d_.steps - k), width, matrix.begin ? matrix.column + at : nullptr,
                                matrix.begin ? matrix.begin[i + 1] - at : columns,
                                matrix.begin ? sums.data() + (at - first) : grad + i * columns});
          }
      }
      for (int64_t i = begin; matrix.begin && i < end; ++i)
        for (int64_t e = matrix.begin[i]; e < matrix.begin[i + 1]; ++e) grad[i * columns + matrix.column[e]] = sums[e - first];
    });
  }

  void bias_grad(const Slabs<T>* da, T* grad) const {
    each_row(d_.hidden, [&](int64_t i) {
      grad[i] = 0;
      for (int64_t s = 0; s < strips(); ++s) {
        const int64_t width = strips_[s].width;
        grad[i] += loops_.row_sum(da->at(s, 0) + i * width, da->stride(s), d_.steps, width);
      }
    });
  }

 private:
  // Bytes of slabs that are gone through together: they should stay in the second-level cache.
  static constexpr int64_t CACHED_BYTES = int64_t{1} << 19;
  static int64_t steps_at_once(int64_t slab) { return std::max<int64_t>(1, CACHED_BYTES / std::max<int64_t>(1, slab * sizeof(T))); }

  int64_t strips() const { return static_cast<int64_t>(strips_.size()); }
  int64_t time(int64_t k) const { return d_.reverse ? d_.steps - 1 - k : k; }
  template <typename U>
  U* step_of(U* states, int64_t k) const { return states + time(k) * d_.batch * d_.hidden; }
  const T* active(int64_t s, int64_t k) const { return active_ ? active_->at(s, k) : nullptr; }
  SlabsPointer<T> make_slabs(int64_t steps, int64_t rows) const { return std::make_unique<Slabs<T>>(strips_, steps, rows); }

  void read(const T* from, int64_t rows, int64_t s, T* slab, int64_t begin, int64_t end) const {
    const Strip& strip = strips_[s];
    loops_.to_slab({const_cast<T*>(from) + strip.first * rows, rows, strip.lanes, slab, strip.width}, begin, end);
  }
  void read(const T* from, int64_t rows, int64_t s, T* slab) const { read(from, rows, s, slab, 0, rows); }
  void write(T* slab, int64_t s, T* to, int64_t rows, int64_t begin, int64_t end) const {
    const Strip& strip = strips_[s];
    loops_.from_slab({to + strip.first * rows, rows, strip.lanes, slab, strip.width}, begin, end);
  }

  template <typename Run>
  void for_strips(Run run) const {
    for (int64_t s = 0; s < strips(); ++s) run(s);
  }
  template <typename Run>
  void each_step_of_strips(Run run) const {
    each_task(strips() * d_.steps, [&](int64_t task) { run(task / d_.steps, task % d_.steps); });
  }

  // run(begin, end) for chunks of rows with about as many entries each.
  template <typename Run>
  static void each_chunk_of_rows(const Matrix<T>& m, int64_t chunks, Run run) {
    chunks = std::max<int64_t>(1, std::min(chunks, m.rows / SQUARE_ROWS));
    each_task(chunks, [&](int64_t c) { run(chunk_begin(m, c, chunks), chunk_begin(m, c + 1, chunks)); });
  }
  static constexpr int64_t SQUARE_ROWS = 16;  // whole squares are transposed fastest
  static int64_t chunk_begin(const Matrix<T>& m, int64_t c, int64_t chunks) {
    if (c == chunks) return m.rows;
    int64_t row = m.rows * c / chunks;
    if (m.begin) row = std::lower_bound(m.begin, m.begin + m.rows, m.begin[m.rows] * c / chunks) - m.begin;
    return row / SQUARE_ROWS * SQUARE_ROWS;
  }

  // step(strip, k, first row, end) for all steps in order. Strips go on by themselves; where there are fewer of them than
  // threads, the rows of a step are shared out, and all wait for each other after it.
  template <typename Step>
  void run_steps(const Matrix<T>& m, Step step) const {
    const int64_t threads = torch::stable::get_num_threads();
    if (strips() >= threads || m.rows < 2 * SQUARE_ROWS) {
      each_task(strips(), [&](int64_t s) {
        for (int64_t k = 0; k < d_.steps; ++k) step(s, k, 0, m.rows);
      });
      return;
    }
    const int64_t chunks = std::max<int64_t>(1, std::min((threads + strips() - 1) / std::max<int64_t>(1, strips()), m.rows / SQUARE_ROWS));
    for (int64_t k = 0; k < d_.steps; ++k)
      each_task(strips() * chunks, [&](int64_t task) {
        const int64_t c = task % chunks;
        step(task / chunks, k, chunk_begin(m, c, chunks), chunk_begin(m, c + 1, chunks));
      });
  }

  Direction d_;
  std::vector<Strip> strips_;
  const RnnLoops<T>& loops_;
  SlabsPointer<T> active_;
};

}  // namespace
}  // namespace moduli
