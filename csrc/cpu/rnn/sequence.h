// A sequence through one layer in one direction: the order of the steps, and what is done with each strip of the batch.
#pragma once

#include "cpu/rnn/slabs.h"

namespace moduli {
namespace {

struct Direction {
  int64_t steps, batch, input, hidden;
  Nonlinearity nonlinearity;
  double leak;
  bool reverse;
};

// Tensors are (steps, batch, input), (steps, batch, hidden) and (batch, hidden). lengths (batch), if given, are the
// steps of each sample.
template <typename T>
class Sequence {
 public:
  Sequence(const Direction& d, const OptionalTensor& lengths)
      : d_(d), strips_(strips_of(d.batch, d.hidden)), loops_(loops<T>().rnn) {
    if (!lengths) return;
    const auto length = data<int64_t>(*lengths);
    active_ = make_slabs(d.steps, 1);
    each_step_of_strips(d_.steps, 1, [&](int64_t s, int64_t k) {
      const Strip& strip = strips_[s];
      for (int64_t l = 0; l < strip.width; ++l)
        active_->at(s, k)[l] = l < strip.lanes && time(k) < length[strip.first + l] ? T(1) : T(0);
    });
  }

  // The number of lanes of the widest strip
  int64_t width() const {
    int64_t widest = 1;
    for (const Strip& strip : strips_) widest = std::max(widest, strip.width);
    return widest;
  }

  void forward(const Matrix<T>& input, const Matrix<T>& hidden, const T* bias, const T* x, const T* h, T* output, T* h_n,
               T* activations) const {
    const int64_t at_once = chunk_steps(d_.input);
    const auto inputs = make_slabs(at_once, d_.input), state = make_slabs(2, d_.hidden);
    const auto kept = activations ? make_slabs(1, d_.hidden) : nullptr;
    for_strips([&](int64_t s) { read(h, d_.hidden, s, state->at(s, 0)); });
    for (int64_t first = 0; first < d_.steps; first += at_once) {
      const int64_t steps = std::min(at_once, d_.steps - first);
      read_inputs(x, first, steps, *inputs);
      run_steps(hidden, steps, [&](int64_t s, int64_t step, int64_t begin, int64_t end) {
        const int64_t k = first + step, width = strips_[s].width;
        T *next = state->at(s, (k + 1) % 2), *activation = kept ? kept->at(s, 0) : nullptr;
        loops_.forward({.input = input,
                        .hidden = hidden,
                        .x = inputs->at(s, step),
                        .h = state->at(s, k % 2),
                        .bias = bias,
                        .next = next,
                        .activation = activation,
                        .active = active(s, k),
                        .width = width,
                        .nonlinearity = d_.nonlinearity,
                        .leak = T(d_.leak)},
                       begin, end);
        write(next, s, step_of(output, k), d_.hidden, begin, end);
        if (activations) write(activation, s, step_of(activations, k), d_.hidden, begin, end);
      });
    }
    for_strips([&](int64_t s) { write(state->at(s, d_.steps % 2), s, h_n, d_.hidden, 0, d_.hidden); });
  }

  // The gradients to compute, null if not needed, and the weights' masks, null if there are none
  struct Grads {
    T *x, *h, *w_ih, *w_hh, *bias;
    const uint8_t *mask_ih, *mask_hh;
  };

  // The method goes back over chunks of steps, whose slabs are used for all gradients before the next ones take their
  // place. grad_output is null if it is 0. activations is null if they are the output.
  void backward(const Matrix<T>& input, const Matrix<T>& hidden, const T* grad_output, const T* grad_h_n, const T* x,
                const T* h, const T* output, const T* activations, const Grads& grads) const {
    const TransposedMatrix<T> hidden_transposed(hidden, width());
    std::optional<TransposedMatrix<T>> input_transposed;
    if (grads.x) input_transposed.emplace(input, width());
    std::optional<WeightGrad> dw_ih, dw_hh;
    // strips run independently only if W_hh keeps few entries, and a copy of W_ih's gradient for each strip is worth
    // its memory only if W_ih keeps few
    const auto parts = [&](const Matrix<T>& m) {
      return worth_sharing(hidden_transposed.matrix) || worth_sharing(m) ? 1 : std::max<int64_t>(1, strips());
    };
    if (grads.w_ih) dw_ih.emplace(input, grads.w_ih, grads.mask_ih, parts(input));
    if (grads.w_hh) dw_hh.emplace(hidden, grads.w_hh, grads.mask_hh, parts(hidden));

    const int64_t at_once = chunk_steps(d_.hidden + (grads.w_ih ? d_.input : 0));
    const auto states = make_slabs(at_once + 1, d_.hidden), da = make_slabs(at_once + 1, d_.hidden);
    const auto inputs = make_slabs(grads.w_ih ? at_once : 0, d_.input);
    const auto stays = make_slabs(1, d_.hidden), grad = make_slabs(1, d_.hidden);
    const auto kept = activations ? make_slabs(1, d_.hidden) : nullptr,
               sums = grads.bias ? make_slabs(1, d_.hidden) : nullptr;
    for_strips([&](int64_t s) {
      read(grad_h_n, d_.hidden, s, stays->at(s, 0));
      if (sums) std::fill_n(sums->at(s, 0), sums->stride(s), T(0));
    });
    for (int64_t last = d_.steps; last > 0; last -= at_once) {
      const int64_t first = std::max<int64_t>(0, last - at_once), steps = last - first;
      read_states(h, output, first, steps, *states);
      // da of the step after this chunk was the first one of the last chunk; it goes behind this chunk's own
      if (last < d_.steps)
        for_strips([&](int64_t s) { std::copy_n(da->at(s, 0), da->stride(s), da->at(s, steps)); });
      run_steps(hidden_transposed.matrix, steps, [&](int64_t s, int64_t step, int64_t begin, int64_t end) {
        const int64_t j = steps - 1 - step, k = first + j, width = strips_[s].width;
        if (grad_output) read(step_of(grad_output, k), d_.hidden, s, grad->at(s, 0), begin, end);
        if (activations) read(step_of(activations, k), d_.hidden, s, kept->at(s, 0), begin, end);
        loops_.backward({.hidden_transposed = hidden_transposed.matrix,
                         .da_after = k + 1 < d_.steps ? da->at(s, j + 1) : nullptr,
                         .grad_output = grad_output ? grad->at(s, 0) : nullptr,
                         .activation = activations ? kept->at(s, 0) : states->at(s, j + 1),
                         .da = da->at(s, j),
                         .stays = stays->at(s, 0),
                         .sum = sums ? sums->at(s, 0) : nullptr,
                         .active = active(s, k),
                         .width = width,
                         .nonlinearity = d_.nonlinearity,
                         .leak = T(d_.leak)},
                        begin, end);
      });
      if (grads.x) input_grad(input_transposed->matrix, *da, first, steps, grads.x);
      if (dw_hh) add_weight_grad(*dw_hh, *da, *states, steps);
      if (dw_ih) {
        read_inputs(x, first, steps, *inputs);
        add_weight_grad(*dw_ih, *da, *inputs, steps);
      }
    }
    if (dw_ih) dw_ih->finish();
    if (dw_hh) dw_hh->finish();
    if (sums) sum_lanes(*sums, grads.bias);
    if (grads.h)
      for_strips([&](int64_t s) {
        if (d_.steps)
          loops_.product(
              {.matrix = hidden_transposed.matrix, .from = da->at(s, 0), .to = stays->at(s, 0), .width = strips_[s].width},
              0, d_.hidden);
        write(stays->at(s, 0), s, grads.h, d_.hidden, 0, d_.hidden);
      });
  }

 private:
  // Bytes of slabs that are worked on together: those of all strips should stay in the last-level cache, and those of
  // one strip and block of columns in the second-level cache.
  static constexpr int64_t CHUNK_BYTES = int64_t{1} << 21, CACHED_BYTES = int64_t{1} << 19;
  int64_t chunk_steps(int64_t rows) const {
    const int64_t step = std::max<int64_t>(1, lanes() * rows * static_cast<int64_t>(sizeof(T)));
    return std::max<int64_t>(1, std::min(d_.steps, std::max<int64_t>(4, CHUNK_BYTES / step)));
  }

  // The gradient of a weight while it is summed up. For a dense matrix that is `whole` itself (rows, columns). For kept
  // entries it is (parts, entries), where one part serves all strips, or each strip has its own if its slabs are in the
  // cache of the thread that computed it.
  struct WeightGrad {
    WeightGrad(const Matrix<T>& m, T* whole, const uint8_t* mask, int64_t parts)
        : matrix(m), whole(whole), mask(mask), parts(m.begin ? parts : 1) {
      each_row(m.rows, m.columns, [&](int64_t i) { std::fill_n(whole + i * m.columns, m.columns, T(0)); });
      if (m.begin) entries.resize(parts * entries_of(m));
    }
    T* of(int64_t part) { return matrix.begin ? entries.data() + part * entries_of(matrix) : whole; }
    void finish() {
      if (!matrix.begin && !mask) return;
      each_row(matrix.rows, matrix.columns, [&](int64_t i) {
        if (!matrix.begin) {
          const int64_t end = (i + 1) * matrix.columns;
          for (int64_t at = i * matrix.columns; at < end; ++at) whole[at] = mask[at] ? whole[at] : T(0);
          return;
        }
        for (int64_t b = 0; b < matrix.blocks; ++b) {
          T* to = whole + i * matrix.columns + b * matrix.block_columns;
          const int64_t at = b * matrix.rows + i;
          for (int64_t part = 0; part < parts; ++part) {
            const T* from = of(part);
            for (int64_t e = matrix.begin[at]; e < matrix.begin[at + 1]; ++e) to[matrix.column[e]] += from[e];
          }
        }
      });
    }
    const Matrix<T>& matrix;
    T* whole;
    const uint8_t* mask;  // (rows, columns), 0 where the gradient of a dense matrix must be 0; or null
    int64_t parts;
    std::vector<T> entries;
  };

  void add_weight_grad(WeightGrad& grad, const Slabs<T>& da, const Slabs<T>& other, int64_t steps) const {
    const Matrix<T>& m = grad.matrix;
    // strips have different widths, but chunks of rows of all strips take equal time
    const int64_t chunks = chunks_a_group(m.rows, grad.parts, grad.parts > 1 ? 2 : 1), a_part = strips() / grad.parts;
    each_task(grad.parts * chunks, entries_of(m) * lanes() * steps, [&](int64_t task) {
      const int64_t part = task / chunks, c = task % chunks;
      const RowRange rows = chunk_of_rows(c, chunks, m.rows);
      for (int64_t s = part * a_part; s < (part + 1) * a_part; ++s) {
        const int64_t width = strips_[s].width, share = m.block_columns * width * static_cast<int64_t>(sizeof(T));
        const int64_t at_once = std::max<int64_t>(1, CACHED_BYTES / std::max<int64_t>(1, share));
        for (int64_t k = 0; k < steps; k += at_once)
          loops_.sampled({.matrix = m,
                          .da = da.at(s, k),
                          .other = other.at(s, k),
                          .da_step = da.stride(s),
                          .other_step = other.stride(s),
                          .steps = std::min(at_once, steps - k),
                          .width = width,
                          .grad = grad.of(part)},
                         rows.first, rows.end);
      }
    });
  }

  // to[i] becomes the sum of row i over all lanes.
  void sum_lanes(const Slabs<T>& slabs, T* to) const {
    constexpr int64_t SIDE_BY_SIDE = 4;  // widths but 1 are multiples of it
    each_row(d_.hidden, lanes(), [&](int64_t i) {
      T sums[SIDE_BY_SIDE] = {};
      for (int64_t s = 0; s < strips(); ++s) {
        const int64_t width = strips_[s].width;
        const T* row = slabs.at(s, 0) + i * width;
        if (width == 1) sums[0] += row[0];
        for (int64_t l = 0; l + SIDE_BY_SIDE <= width; l += SIDE_BY_SIDE)
          for (int64_t k = 0; k < SIDE_BY_SIDE; ++k) sums[k] += row[l + k];
      }
      to[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    });
  }

  void input_grad(const Matrix<T>& input_transposed, const Slabs<T>& da, int64_t first, int64_t steps, T* dx) const {
    each_step_of_strips(steps, entries_of(input_transposed), [&](int64_t s, int64_t j) {
      const Slabs<T> slab({strips_[s]}, 1, d_.input);
      const int64_t width = strips_[s].width;
      std::fill_n(slab.at(0, 0), slab.stride(0), T(0));
      loops_.product({.matrix = input_transposed, .from = da.at(s, j), .to = slab.at(0, 0), .width = width}, 0, d_.input);
      write(slab.at(0, 0), s, dx + time(first + j) * d_.batch * d_.input, d_.input, 0, d_.input);
    });
  }

  // The method fills slabs with x at `steps` steps from `first` on, in the order in which they are computed.
  void read_inputs(const T* x, int64_t first, int64_t steps, const Slabs<T>& slabs) const {
    each_step_of_strips(steps, d_.input, [&](int64_t s, int64_t j) {
      read(x + time(first + j) * d_.batch * d_.input, d_.input, s, slabs.at(s, j));
    });
  }

  // The method fills slabs with the state before each of these steps, and after the last one.
  void read_states(const T* h, const T* output, int64_t first, int64_t steps, const Slabs<T>& slabs) const {
    each_step_of_strips(steps + 1, d_.hidden, [&](int64_t s, int64_t j) {
      const int64_t k = first + j;
      read(k ? step_of(output, k - 1) : h, d_.hidden, s, slabs.at(s, j));
    });
  }

  int64_t lanes() const { return lanes_of(strips_); }
  int64_t strips() const { return static_cast<int64_t>(strips_.size()); }
  // Where step k, in the order of computation, is in tensors
  int64_t time(int64_t k) const { return d_.reverse ? d_.steps - 1 - k : k; }
  template <typename U>
  U* step_of(U* states, int64_t k) const { return states + time(k) * d_.batch * d_.hidden; }
  const T* active(int64_t s, int64_t k) const { return active_ ? active_->at(s, k) : nullptr; }
  SlabsPointer<T> make_slabs(int64_t steps, int64_t rows) const { return std::make_unique<Slabs<T>>(strips_, steps, rows); }

  // Rows begin .. end of strip s between a tensor (batch, rows) and a slab
  Transposition<T> transposition(T* tensor, int64_t rows, int64_t s, T* slab) const {
    const Strip& strip = strips_[s];
    return {.lanes_first = tensor + strip.first * rows,
            .stride = rows,
            .lanes = strip.lanes,
            .slab = slab,
            .width = strip.width};
  }
  void read(const T* from, int64_t rows, int64_t s, T* slab, int64_t begin, int64_t end) const {
    loops_.to_slab(transposition(const_cast<T*>(from), rows, s, slab), begin, end);
  }
  void read(const T* from, int64_t rows, int64_t s, T* slab) const { read(from, rows, s, slab, 0, rows); }
  void write(T* slab, int64_t s, T* to, int64_t rows, int64_t begin, int64_t end) const {
    loops_.from_slab(transposition(to, rows, s, slab), begin, end);
  }

  template <typename Run>
  void for_strips(Run run) const {
    for (int64_t s = 0; s < strips(); ++s) run(s);
  }
  // The method calls run(strip, step) for all strips and steps 0 .. steps, on torch's threads.
  template <typename Run>
  void each_step_of_strips(int64_t steps, int64_t work_a_lane, Run run) const {
    each_task(strips() * steps, steps * work_a_lane * lanes(), [&](int64_t task) { run(task / steps, task % steps); });
  }

  // The method calls step(strip, k, first row, end) for k = 0 .. steps in order. Either each strip runs independently,
  // or the rows of each step are shared out too.
  template <typename Step>
  void run_steps(const Matrix<T>& m, int64_t steps, Step step) const {
    const int64_t rows = m.rows, work = (entries_of(m) + rows) * lanes();  // of a step
    const bool share_rows = torch::stable::get_num_threads() > 1 && rows >= 2 * SQUARE && worth_sharing(m);
    if (!share_rows) {
      each_task(strips(), steps * work, [&](int64_t s) {
        for (int64_t k = 0; k < steps; ++k) step(s, k, 0, rows);
      });
      return;
    }
    const int64_t chunks = chunks_a_group(rows, strips(), 2);
    each_task_of_steps(steps, strips(), chunks, steps * work, [&](int64_t k, int64_t s, int64_t c) {
      const RowRange range = chunk_of_rows(c, chunks, rows);
      step(s, k, range.first, range.end);
    });
  }

  // Whether the rows of a step are worth sharing out. A step must have enough to multiply for two costs: threads wait
  // for each other, and each state goes to the caches of other threads. Both were measured, see benchmarks/NOTES.md.
  bool worth_sharing(const Matrix<T>& m) const {
    constexpr int64_t VECTOR = 16, WORTH_WAITING = int64_t{1} << 13, WORTH_SENDING = 64;
    const bool of_columns = m.layout == Layout::ROWS || m.layout == Layout::COLUMNS;
    const int64_t vectors = of_columns ? entries_of(m) / VECTOR : entries_of(m) * ((lanes() + VECTOR - 1) / VECTOR);
    return vectors >= WORTH_WAITING && vectors >= WORTH_SENDING * (m.rows * lanes() / VECTOR);
  }

  Direction d_;
  std::vector<Strip> strips_;
  const RnnLoops<T>& loops_;
  SlabsPointer<T> active_;
};

}  // namespace
}  // namespace moduli
