// A sequence through one layer in one direction: the order of the steps, and what is done with each strip of the batch.
#pragma once

#include "cpu/rnn/weight_grad.h"

namespace moduli {
namespace {

struct Direction {
  int64_t steps, batch, input, hidden;
  Nonlinearity nonlinearity;
  double leak;
  bool reverse;
};

// Tensors are (steps, batch, input), (steps, batch, hidden) and (batch, hidden). lengths (batch), if given, are the
// steps of each sample. Slabs and matrices have inputs and neurons in their orders, tensors in their own. mostly_blocks
// says that products with the hidden weight are mostly those with its blocks.
template <typename T>
class Sequence {
 public:
  Sequence(const Direction& d, const OptionalTensor& lengths, const Order& inputs, const Order& neurons,
           std::vector<Strip> strips, bool mostly_blocks)
      : d_(d), lengths_(lengths), inputs_(inputs), neurons_(neurons), strips_(std::move(strips)),
        mostly_blocks_(mostly_blocks), loops_(loops<T>().rnn) {
    if (!lengths) return;
    const auto length = data<int64_t>(*lengths);
    active_ = make_slabs(d.steps, 1);
    each_step_of_strips(d_.steps, 1, [&](int64_t s, int64_t k) {
      const Strip& strip = strips_[s];
      for (int64_t l = 0; l < strip.width; ++l)
        active_->at(s, k)[l] = l < strip.lanes && time(k) < length[strip.first + l] ? T(1) : T(0);
    });
  }

  void forward(const Matrix<T>& input, const Matrix<T>& hidden, const T* bias, const T* x, const T* h, T* output, T* h_n,
               T* activations) const {
    strip_by_strip(goes_alone(hidden), [&](const Sequence& strips, int64_t) {
      strips.forward_steps(input, hidden, bias, x, h, output, h_n, activations);
    });
  }

  // The gradients to compute, null if not needed, and the weights' masks, null if there are none
  struct Grads {
    T *x, *h, *w_ih, *w_hh, *bias;
    const uint8_t *mask_ih, *mask_hh;
  };

  // grad_output is null if it is 0. activations is null if they are the output.
  void backward(const Matrix<T>& input, const Matrix<T>& hidden, const T* grad_output, const T* grad_h_n, const T* x,
                const T* h, const T* output, const T* activations, const Grads& grads) const {
    const TransposedMatrix<T> hidden_transposed(hidden, width_);
    std::optional<TransposedMatrix<T>> input_transposed;
    if (grads.x) input_transposed.emplace(input, width_);
    std::optional<WeightGrad<T>> dw_ih, dw_hh;
    if (grads.w_ih) dw_ih.emplace(input, neurons_, inputs_, grads.w_ih, grads.mask_ih, strips());
    if (grads.w_hh) dw_hh.emplace(hidden, neurons_, neurons_, grads.w_hh, grads.mask_hh, strips());
    const auto sums = grads.bias ? make_slabs(1, d_.hidden) : nullptr;
    const auto has_parts = [&](const std::optional<WeightGrad<T>>& grad) { return !grad || grad->parts == strips(); };
    strip_by_strip(goes_alone(hidden_transposed.matrix) && has_parts(dw_ih) && has_parts(dw_hh),
                   [&](const Sequence& strips, int64_t first_strip) {
                     strips.backward_steps({.hidden_transposed = hidden_transposed.matrix,
                                            .input_transposed = input_transposed ? &input_transposed->matrix : nullptr,
                                            .dw_ih = dw_ih ? &*dw_ih : nullptr,
                                            .dw_hh = dw_hh ? &*dw_hh : nullptr,
                                            .sums = sums.get(),
                                            .first_strip = first_strip},
                                           grad_output, grad_h_n, x, h, output, activations, grads.x, grads.h);
                   });
    if (dw_ih) dw_ih->finish();
    if (dw_hh) dw_hh->finish();
    if (sums) sum_lanes(*sums, grads.bias);
  }

 private:
  // Whether each strip can go through the whole sequence by itself, on a thread that has its slabs in its own cache. The
  // rows of many single entries are better shared out, since each thread then reads a part of them alone.
  bool goes_alone(const Matrix<T>& m) const {
    return strips() >= torch::stable::get_num_threads() && (mostly_blocks_ || !worth_sharing(m));
  }
  // The method calls run(sequence, first strip) for each strip alone, on torch's threads, or for all of them together.
  template <typename Run>
  void strip_by_strip(bool alone, Run run) const {
    if (!alone) return run(*this, 0);
    each_task(strips(), d_.steps * d_.hidden * lanes(), [&](int64_t s) {
      Sequence one(d_, lengths_, inputs_, neurons_, {strips_[s]}, mostly_blocks_);
      one.width_ = width_;
      run(one, s);
    });
  }

  void forward_steps(const Matrix<T>& input, const Matrix<T>& hidden, const T* bias, const T* x, const T* h, T* output,
                     T* h_n, T* activations) const {
    const int64_t at_once = chunk_steps(d_.input, 1, CHUNK_BYTES);
    const auto inputs = make_slabs(at_once, d_.input), state = make_slabs(2, d_.hidden);
    const auto kept = activations ? make_slabs(2, d_.hidden) : nullptr;
    for_strips([&](int64_t s) { read(h, neurons_, d_.hidden, s, state->at(s, 0)); });
    const auto write_step = [&](int64_t s, int64_t k, int64_t begin, int64_t end) {
      write(state->at(s, (k + 1) % 2), s, step_of(output, k), neurons_, d_.hidden, begin, end);
      if (activations) write(kept->at(s, k % 2), s, step_of(activations, k), neurons_, d_.hidden, begin, end);
    };
    for (int64_t first = 0; first < d_.steps; first += at_once) {
      const int64_t steps = std::min(at_once, d_.steps - first);
      read_inputs(x, first, steps, *inputs);
      run_steps(hidden, steps, [&](int64_t s, int64_t step, int64_t begin, int64_t end) {
        const int64_t k = first + step;
        // rows in an order are other rows of the tensor, which are all there once the step has ended
        if (neurons_.of && k > 0) write_step(s, k - 1, begin, end);
        loops_.forward({.input = input,
                        .hidden = hidden,
                        .x = inputs->at(s, step),
                        .h = state->at(s, k % 2),
                        .bias = bias,
                        .next = state->at(s, (k + 1) % 2),
                        .activation = kept ? kept->at(s, k % 2) : nullptr,
                        .active = active(s, k),
                        .width = strips_[s].width,
                        .nonlinearity = d_.nonlinearity,
                        .leak = T(d_.leak)},
                       begin, end);
        if (!neurons_.of) write_step(s, k, begin, end);
      });
    }
    for_strips([&](int64_t s) {
      if (neurons_.of && d_.steps) write_step(s, d_.steps - 1, 0, d_.hidden);
      write(state->at(s, d_.steps % 2), s, h_n, neurons_, d_.hidden, 0, d_.hidden);
    });
  }

  // What strips need and give in backward. The gradients of weights and `sums`, that of the bias lane by lane, are of all
  // strips, of which those at hand begin with number first_strip. Pointers are null for gradients that aren't needed.
  struct Backward {
    const Matrix<T>& hidden_transposed;
    const Matrix<T>* input_transposed;
    WeightGrad<T>*dw_ih, *dw_hh;
    const Slabs<T>* sums;
    int64_t first_strip;
  };

  // The method goes back over chunks of steps, whose slabs are used for all gradients before others take their place. Two
  // halves of the slabs take turns, since a chunk begins with the last step of the chunk before.
  void backward_steps(const Backward& b, const T* grad_output, const T* grad_h_n, const T* x, const T* h, const T* output,
                      const T* activations, T* dx, T* dh) const {
    const bool of_lanes =
        width_ > 1 && ((b.dw_ih && b.dw_ih->matrix.blocks.side) || (b.dw_hh && b.dw_hh->matrix.blocks.side));
    const bool strays = (b.dw_ih && has_strays(b.dw_ih->matrix)) || (b.dw_hh && has_strays(b.dw_hh->matrix));
    const int64_t at_once = strays ? chunk_steps(d_.hidden + (b.dw_ih ? d_.input : 0), 4, CHUNK_BYTES)
                                   : chunk_steps(d_.hidden, 1, CHUNK_BYTES / 4);
    const auto states = make_slabs(2 * at_once, d_.hidden), da = make_slabs(2 * at_once, d_.hidden);
    const auto inputs = make_slabs(b.dw_ih ? at_once : 0, d_.input);
    const auto stays = make_slabs(1, d_.hidden), grad = make_slabs(2, d_.hidden);
    const auto kept = activations ? make_slabs(2, d_.hidden) : nullptr;
    const auto da_of_lanes = of_lanes ? std::make_unique<LanesFirst<T>>(strips_, at_once, d_.hidden) : nullptr;
    const auto read_state = [&](int64_t s, int64_t k, T* slab, int64_t begin, int64_t end) {  // the state before step k
      read(k ? step_of(output, k - 1) : h, neurons_, d_.hidden, s, slab, begin, end);
    };
    const auto read_step = [&](int64_t s, int64_t k, int64_t begin, int64_t end) {
      if (grad_output) read(step_of(grad_output, k), neurons_, d_.hidden, s, grad->at(s, k % 2), begin, end);
      if (activations) read(step_of(activations, k), neurons_, d_.hidden, s, kept->at(s, k % 2), begin, end);
    };
    each_step_of_strips(1, d_.hidden, [&](int64_t s, int64_t) {
      read(grad_h_n, neurons_, d_.hidden, s, stays->at(s, 0));
      read_state(s, d_.steps, states->at(s, at_once), 0, d_.hidden);
      if (neurons_.of && d_.steps) read_step(s, d_.steps - 1, 0, d_.hidden);
      if (b.sums) std::fill_n(b.sums->at(b.first_strip + s, 0), b.sums->stride(b.first_strip + s), T(0));
    });
    int64_t half = 0;  // the first slab of this chunk
    for (int64_t last = d_.steps; last > 0; last -= at_once, half = at_once - half) {
      const int64_t first = std::max<int64_t>(0, last - at_once), steps = last - first;
      run_steps(b.hidden_transposed, steps, [&](int64_t s, int64_t step, int64_t begin, int64_t end) {
        const int64_t j = steps - 1 - step, k = first + j, after = step ? half + j + 1 : at_once - half;
        read_state(s, k, states->at(s, half + j), begin, end);
        // rows in an order are other rows of the tensor, which must all be there before the step begins
        if (!neurons_.of)
          read_step(s, k, begin, end);
        else if (k > 0)
          read_step(s, k - 1, begin, end);
        loops_.backward({.hidden_transposed = b.hidden_transposed,
                         .da_after = k + 1 < d_.steps ? da->at(s, after) : nullptr,
                         .grad_output = grad_output ? grad->at(s, k % 2) : nullptr,
                         .activation = activations ? kept->at(s, k % 2) : states->at(s, after),
                         .da = da->at(s, half + j),
                         .stays = stays->at(s, 0),
                         .sum = b.sums ? b.sums->at(b.first_strip + s, 0) : nullptr,
                         .active = active(s, k),
                         .width = strips_[s].width,
                         .nonlinearity = d_.nonlinearity,
                         .leak = T(d_.leak)},
                        begin, end);
        if (da_of_lanes) loops_.from_slab(da_of_lanes->from(s, j, da->at(s, half + j)), begin, end);
      });
      if (dx) input_grad(*b.input_transposed, *da, half, first, steps, dx);
      if (b.dw_hh) add_weight_grad(*b.dw_hh, b.first_strip, *da, half, da_of_lanes.get(), *states, half, steps);
      if (b.dw_ih) {
        read_inputs(x, first, steps, *inputs);
        add_weight_grad(*b.dw_ih, b.first_strip, *da, half, da_of_lanes.get(), *inputs, 0, steps);
      }
    }
    if (!dh) return;
    const int64_t first = at_once - half;  // the slab of the first step
    for_strips([&](int64_t s) {
      if (d_.steps)
        loops_.product(
            {.matrix = b.hidden_transposed, .from = da->at(s, first), .to = stays->at(s, 0), .width = strips_[s].width}, 0,
            d_.hidden);
      write(stays->at(s, 0), s, dh, neurons_, d_.hidden, 0, d_.hidden);
    });
  }

  // How many steps of a strip's slabs are worked on together, so that they stay in the second-level cache, as the slabs of
  // one band of columns do. Sums over lanes are made once for a chunk, so that strays want some steps in it. The number of
  // strips or threads doesn't matter, since results must not depend on them.
  static constexpr int64_t CHUNK_BYTES = int64_t{1} << 20, CACHED_BYTES = int64_t{1} << 19;
  int64_t chunk_steps(int64_t rows, int64_t least, int64_t bytes) const {
    const int64_t step = std::max<int64_t>(1, width_ * rows * static_cast<int64_t>(sizeof(T)));
    return std::max<int64_t>(1, std::min(d_.steps, std::max(least, bytes / step)));
  }
  static bool has_strays(const Matrix<T>& m) { return m.layout != Layout::ENTRIES || strays_of(m) > 0; }

  // The gradient gets what `steps` slabs of da and `other` add to it, from slabs first_da and first_other on.
  void add_weight_grad(WeightGrad<T>& grad, int64_t first_strip, const Slabs<T>& da, int64_t first_da,
                       const LanesFirst<T>* da_of_lanes, const Slabs<T>& other, int64_t first_other, int64_t steps) const {
    const Matrix<T>& m = grad.matrix;
    const int64_t parts = grad.parts > 1 ? strips() : 1, a_part = strips() / parts;
    // strips have different widths, but chunks of rows of all strips take equal time
    const int64_t chunks = chunks_a_group(m.rows, parts, parts > 1 ? 2 : 1);
    each_task(parts * chunks, entries_of(m) * lanes() * steps, [&](int64_t task) {
      const int64_t part = task / chunks, c = task % chunks;
      const RowRange rows = chunk_of_rows(c, chunks, m.rows);
      T* to = grad.of(grad.parts > 1 ? first_strip + part : 0);
      for (int64_t s = part * a_part; s < (part + 1) * a_part; ++s) {
        const int64_t width = strips_[s].width, share = m.band_columns * width * static_cast<int64_t>(sizeof(T));
        const int64_t at_once = std::max<int64_t>(1, CACHED_BYTES / std::max<int64_t>(1, share));
        for (int64_t k = 0; k < steps; k += at_once)
          loops_.sampled({.matrix = m,
                          .da = da.at(s, first_da + k),
                          .other = other.at(s, first_other + k),
                          .da_step = da.stride(s),
                          .other_step = other.stride(s),
                          .steps = std::min(at_once, steps - k),
                          .width = width,
                          .grad = to,
                          .da_of_lanes = da_of_lanes ? da_of_lanes->at(s, k) : da.at(s, first_da + k),
                          .lanes = strips_[s].lanes,
                          .lane_stride = da_of_lanes ? da_of_lanes->stride() : da.stride(s),
                          .grad_blocks = m.blocks.side ? to + strays_of(m) : nullptr},
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
      to[neurons_.at(i)] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    });
  }

  void input_grad(const Matrix<T>& input_transposed, const Slabs<T>& da, int64_t first_da, int64_t first, int64_t steps,
                  T* dx) const {
    each_step_of_strips(steps, entries_of(input_transposed), [&](int64_t s, int64_t j) {
      const Slabs<T> slab({strips_[s]}, 1, d_.input);
      const int64_t width = strips_[s].width;
      std::fill_n(slab.at(0, 0), slab.stride(0), T(0));
      loops_.product({.matrix = input_transposed, .from = da.at(s, first_da + j), .to = slab.at(0, 0), .width = width}, 0,
                     d_.input);
      write(slab.at(0, 0), s, dx + time(first + j) * d_.batch * d_.input, inputs_, d_.input, 0, d_.input);
    });
  }

  // The method fills slabs with x at `steps` steps from `first` on, in the order in which they are computed.
  void read_inputs(const T* x, int64_t first, int64_t steps, const Slabs<T>& slabs) const {
    each_step_of_strips(steps, d_.input, [&](int64_t s, int64_t j) {
      read(x + time(first + j) * d_.batch * d_.input, inputs_, d_.input, s, slabs.at(s, j));
    });
  }

  int64_t lanes() const { return lanes_of(strips_); }
  int64_t strips() const { return static_cast<int64_t>(strips_.size()); }
  // Where step k, in the order of computation, is in tensors
  int64_t time(int64_t k) const { return d_.reverse ? d_.steps - 1 - k : k; }
  template <typename U>
  U* step_of(U* states, int64_t k) const {
    return states + time(k) * d_.batch * d_.hidden;
  }
  const T* active(int64_t s, int64_t k) const { return active_ ? active_->at(s, k) : nullptr; }
  SlabsPointer<T> make_slabs(int64_t steps, int64_t rows) const { return std::make_unique<Slabs<T>>(strips_, steps, rows); }

  // Rows begin .. end of a tensor (batch, rows), of which strip s has a slab, are read into their places there or written
  // from them.
  Transposition<T> transposition(T* tensor, const Order& order, int64_t rows, int64_t s, T* slab) const {
    const Strip& strip = strips_[s];
    return {.lanes_first = tensor + strip.first * rows,
            .stride = rows,
            .lanes = strip.lanes,
            .slab = slab,
            .width = strip.width,
            .place = order.places()};
  }
  void read(const T* from, const Order& order, int64_t rows, int64_t s, T* slab, int64_t begin, int64_t end) const {
    loops_.to_slab(transposition(const_cast<T*>(from), order, rows, s, slab), begin, end);
  }
  void read(const T* from, const Order& order, int64_t rows, int64_t s, T* slab) const {
    read(from, order, rows, s, slab, 0, rows);
  }
  void write(T* slab, int64_t s, T* to, const Order& order, int64_t rows, int64_t begin, int64_t end) const {
    loops_.from_slab(transposition(to, order, rows, s, slab), begin, end);
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
  // or the rows of each step are shared out too. Rows come in runs that stay in the first-level cache while they are read,
  // multiplied and written, unless the matrix should be read once for all rows.
  template <typename Step>
  void run_steps(const Matrix<T>& m, int64_t steps, Step step) const {
    const int64_t rows = m.rows, work = (entries_of(m) + rows) * lanes();  // of a step
    const bool share_rows = torch::stable::get_num_threads() > 1 && rows >= 2 * SQUARE && worth_sharing(m);
    const auto in_runs = [&](int64_t s, int64_t k, int64_t first, int64_t end) {
      constexpr int64_t CACHED_NUMBERS = 4096;
      const int64_t run = is_read_once(m)
                              ? std::max<int64_t>(1, rows)
                              : std::max<int64_t>(MOST_SIDE, CACHED_NUMBERS / strips_[s].width / MOST_SIDE * MOST_SIDE);
      for (int64_t begin = first; begin < end; begin += run) step(s, k, begin, std::min(end, begin + run));
    };
    if (!share_rows) {
      each_task(strips(), steps * work, [&](int64_t s) {
        for (int64_t k = 0; k < steps; ++k) in_runs(s, k, 0, rows);
      });
      return;
    }
    const int64_t chunks = chunks_a_group(rows, strips(), 2);
    each_task_of_steps(steps, strips(), chunks, steps * work, [&](int64_t k, int64_t s, int64_t c) {
      const RowRange range = chunk_of_rows(c, chunks, rows);
      in_runs(s, k, range.first, range.end);
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
  const OptionalTensor& lengths_;
  const Order &inputs_, &neurons_;
  std::vector<Strip> strips_;
  bool mostly_blocks_;
  int64_t width_ = widest(strips_);  // of the widest strip of the batch
  const RnnLoops<T>& loops_;
  SlabsPointer<T> active_;
};

}  // namespace
}  // namespace moduli
