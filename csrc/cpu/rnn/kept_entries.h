// Which entries of a weight are kept, its rows and columns brought into an order, and the squares in which so many are
// kept that they are multiplied whole.
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

// The order in which neurons or inputs stand in slabs and matrices. Both members are empty if that is their own.
struct Order {
  const int64_t* of = nullptr;  // (n): which neuron comes next
  std::vector<int32_t> place;  // (n): the place of each neuron

  Order() = default;
  Order(const OptionalTensor& order, int64_t n) {
    if (!order) return;
    of = data<int64_t>(*order);
    place.assign(n, -1);
    STD_TORCH_CHECK(order->numel() == n, "an order must have an entry for each of the ", n, ", got ", order->numel());
    for (int64_t i = 0; i < n; ++i) {
      STD_TORCH_CHECK(of[i] >= 0 && of[i] < n && place[of[i]] < 0, "an order must be a permutation of 0 ... ", n - 1);
      place[of[i]] = static_cast<int32_t>(i);
    }
  }
  int64_t at(int64_t i) const { return of ? of[i] : i; }
  int64_t place_of(int64_t i) const { return of ? place[i] : i; }
  const int32_t* places() const { return of ? place.data() : nullptr; }
};

// The number of rows of a task, enough to be worth handing out and a whole number of blocks
constexpr int64_t ROWS_A_TASK = 64;
inline int64_t row_tasks(int64_t rows) { return (rows + ROWS_A_TASK - 1) / ROWS_A_TASK; }

// The function calls run(first, end) for runs of ROWS_A_TASK rows, on torch's threads.
template <typename Run>
void each_run_of_rows(int64_t rows, int64_t columns, Run run) {
  each_task(row_tasks(rows), rows * columns,
            [&](int64_t task) { run(task * ROWS_A_TASK, std::min(rows, (task + 1) * ROWS_A_TASK)); });
}
// The function calls run(row) for all rows.
template <typename Run>
void each_row(int64_t rows, int64_t columns, Run run) {
  each_run_of_rows(rows, columns, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) run(i);
  });
}

// The function sets `count` numbers to 0, on torch's threads.
template <typename T>
void set_to_zero(T* to, int64_t count) {
  constexpr int64_t A_TASK = int64_t{1} << 16;
  each_task((count + A_TASK - 1) / A_TASK, count,
            [&](int64_t task) { std::fill(to + task * A_TASK, to + std::min(count, (task + 1) * A_TASK), T(0)); });
}

constexpr int64_t SIDES[] = {16, 8};
constexpr int64_t LEAST_SIDE = 8, MOST_SIDE = 16;

// What a product with a stray costs, where an entry of a block costs 1. It was measured, see benchmarks/NOTES.md.
inline double cost_of_stray(int64_t batch) { return batch == 1 ? 8 : 1.75; }

// The kept entries of a weight with a mask or in compressed rows, as bits, and its squares.
class KeptEntries {
 public:
  KeptEntries(const Weight& w, int64_t rows, int64_t columns, const Order& row_order, const Order& column_order,
              int64_t batch)
      : rows(rows), columns(columns), words((columns + MASK_STEP - 1) / MASK_STEP),
        bits_(new uint64_t[std::max<int64_t>(1, rows * words)]()),
        counts_(new uint8_t[std::max<int64_t>(1, 2 * squares(rows, MOST_SIDE) * words * PER_WORD)]()) {
    find_bits(w, row_order, column_order);
    count();
    choose_side(cost_of_stray(batch));
  }

  const int64_t rows, columns, words;  // a row's bits are `words` words
  int64_t entries = 0;
  int64_t side = 0;  // of blocks, or 0 if there are none
  int64_t blocks = 0, strays = 0;  // how many there are of each
  double cost = 0;  // of a product
  // Whether blocks are clearly faster than the whole weight; squares in which a little more than the half is kept by
  // chance are not.
  bool blocks_are_clearly_best() const {
    constexpr double CLEARLY = 0.75;
    return side && cost < CLEARLY * static_cast<double>(rows * columns);
  }
  // Whether a product multiplies blocks, and little else
  bool mostly_blocks() const { return blocks_are_clearly_best() && blocks * side * side > 2 * strays; }

  // Entry l of a row is kept if bit l % 64 of word l / 64 is 1.
  const uint64_t* bits(int64_t row) const { return &bits_[row * words]; }
  // Whether square (i, j) of `side` rows and columns is a block
  bool is_block(int64_t i, int64_t j) const { return count_of(side, i, j) >= least_; }
  static int64_t squares(int64_t length, int64_t side) { return (length + side - 1) / side; }

 private:
  static constexpr int64_t PER_WORD = MASK_STEP / LEAST_SIDE;  // squares that a word of bits reaches over

  void find_bits(const Weight& w, const Order& row_order, const Order& column_order) {
    const RnnLoops<float>& rnn = loops<float>().rnn;
    std::atomic<int64_t> all{0};
    each_run_of_rows(rows, columns, [&](int64_t first, int64_t end) {
      const std::unique_ptr<uint64_t[]> own(column_order.of && w.mask ? new uint64_t[words] : nullptr);
      for (int64_t i = first; i < end; ++i) {
        uint64_t* to = &bits_[i * words];
        const int64_t row = row_order.at(i);
        const auto keep = [&](int64_t j) { to[j / MASK_STEP] |= uint64_t{1} << j % MASK_STEP; };
        if (w.crow) {
          const auto crow = data<int64_t>(*w.crow), col = data<int64_t>(*w.col);
          for (int64_t e = crow[row]; e < crow[row + 1]; ++e) keep(column_order.place_of(col[e]));
        } else {
          const uint8_t* mask = data<uint8_t>(*w.mask) + row * columns;
          rnn.find_kept(mask, columns, own ? own.get() : to);
          if (own)
            for (int64_t word = 0; word < words; ++word)
              for (uint64_t left = own[word]; left; left &= left - 1)
                keep(column_order.place[word * MASK_STEP + __builtin_ctzll(left)]);
        }
      }
      all += rnn.count_bits(&bits_[first * words], (end - first) * words);
    });
    entries = all;
  }

  void count() {
    const RnnLoops<float>& rnn = loops<float>().rnn;
    each_run_of_rows(rows, columns, [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; i += LEAST_SIDE)
        rnn.count_squares(bits(i), std::min(LEAST_SIDE, end - i), words, &counts_[i / LEAST_SIDE * words * PER_WORD]);
    });
  }
  int64_t count_of(int64_t side, int64_t i, int64_t j) const {
    const int64_t wide = words * PER_WORD;
    if (side == LEAST_SIDE) return counts_[i * wide + j];
    const uint8_t *above = &counts_[2 * i * wide + 2 * j], *below = above + wide;
    return above[0] + above[1] + below[0] + below[1];
  }

  // The method takes the side with which a product costs least, or no blocks.
  void choose_side(double stray) {
    strays = entries;
    cost = stray * static_cast<double>(entries);
    for (const int64_t with : SIDES) {
      const int64_t area = with * with, least = static_cast<int64_t>(static_cast<double>(area) / stray) + 1;
      std::atomic<int64_t> found{0}, inside{0};
      each_run_of_rows(rows, words, [&](int64_t first, int64_t end) {
        int64_t its = 0, its_inside = 0;
        for (int64_t i = first / with; i < squares(end, with); ++i)
          for (int64_t j = 0; j < squares(columns, with); ++j) {
            const int64_t kept = count_of(with, i, j);
            its += kept >= least;
            its_inside += kept >= least ? kept : 0;
          }
        found += its;
        inside += its_inside;
      });
      const double its_cost = static_cast<double>(found * area) + stray * static_cast<double>(entries - inside);
      if (its_cost < cost) {
        side = with, least_ = least, blocks = found, strays = entries - inside;
        cost = its_cost;
      }
    }
  }

  std::unique_ptr<uint64_t[]> bits_;
  std::unique_ptr<uint8_t[]> counts_;  // how many entries each square of 8 x 8 keeps, in an even number of rows
  int64_t least_ = 0;  // kept entries of a block
};

}  // namespace
}  // namespace moduli
