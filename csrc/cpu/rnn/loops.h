// The loops of the masked RNN. At the end of the file stands their table; avx512.cpp, avx2.cpp and portable.cpp each
// include this file for their instruction set. Contracts stand in steps.h.
#pragma once

#include "cpu/common/kept_bits.h"
#include "cpu/rnn/blocks.h"
#include "cpu/rnn/lanes.h"
#include "cpu/rnn/nonlinearity.h"
#include "cpu/rnn/one_lane.h"
#include "cpu/rnn/panels.h"
#include "cpu/rnn/slab_layout.h"
#include "cpu/rnn/steps.h"

namespace moduli::MODULI_NAMESPACE {
namespace {

// How much is accumulated in registers at a time.
constexpr int ROW_VECTORS = 8;  // vectors of one row of kept entries
constexpr int GROUP = 8;  // columns of a weight's gradient
#if defined(__AVX512F__)
constexpr int PANEL_VECTORS = 16;  // vectors of panels
constexpr int GRADIENT_ROWS = 3;  // rows of a dense weight's gradient, each with GROUP columns
#else
constexpr int PANEL_VECTORS = 8;
constexpr int GRADIENT_ROWS = 1;
#endif

// The largest divisor of n that is at most `most`
constexpr int divisor(int n, int most) { return n <= most ? n : n % most == 0 ? most : divisor(n, most - 1); }

// sum (S::WIDTH) += entries begin .. end times a slab. If there are few vectors, several sums are computed side by
// side, since the additions of a single sum would wait for each other.
template <typename S, typename T>
inline void add_entries(const uint16_t* column, const T* value, int64_t begin, int64_t end, const T* slab, T* sum) {
  using V = typename S::V;
  constexpr int VECTORS = divisor(S::N, ROW_VECTORS), SIDE_BY_SIDE = VECTORS == 1 ? 4 : VECTORS <= 3 ? 2 : 1;
  for (int first = 0; first < S::N; first += VECTORS) {
    const T* from = slab + first * S::LANES;
    T* to = sum + first * S::LANES;
    V acc[SIDE_BY_SIDE][VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      acc[0][v] = load_lanes<V>(to + v * S::LANES);
      for (int u = 1; u < SIDE_BY_SIDE; ++u) acc[u][v] = V{};
    }
    int64_t e = begin;
    for (; e + SIDE_BY_SIDE <= end; e += SIDE_BY_SIDE)
      for (int u = 0; u < SIDE_BY_SIDE; ++u) {
        const T* lanes = from + int64_t{column[e + u]} * S::WIDTH;
        const T w = value[e + u];
        for (int v = 0; v < VECTORS; ++v) acc[u][v] += w * load_lanes<V>(lanes + v * S::LANES);
      }
    for (; e < end; ++e) {
      const T* lanes = from + int64_t{column[e]} * S::WIDTH;
      const T w = value[e];
      for (int v = 0; v < VECTORS; ++v) acc[0][v] += w * load_lanes<V>(lanes + v * S::LANES);
    }
    for (int v = 0; v < VECTORS; ++v) {
      for (int u = 1; u < SIDE_BY_SIDE; ++u) acc[0][v] += acc[u][v];
      store_lanes(to + v * S::LANES, acc[0][v]);
    }
  }
}

// The same for PANELS panels of a dense matrix, where sum holds all their rows. A vector of lanes is loaded once for
// all rows.
template <typename S, int PANELS, int VECTORS, typename T>
inline void add_panels(const Matrix<T>& m, int64_t row, const T* slab, T* sum) {
  using V = typename S::V;
  constexpr int ROWS = PANELS * PANEL;
  for (int first = 0; first < S::N; first += VECTORS) {
    const T *from = slab + first * S::LANES, *w = m.value + row * m.columns;
    V acc[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) acc[r][v] = load_lanes<V>(sum + r * S::WIDTH + (first + v) * S::LANES);
    for (int64_t k = 0; k < m.columns; ++k, w += PANEL, from += S::WIDTH) {
      V lanes[VECTORS];
      for (int v = 0; v < VECTORS; ++v) lanes[v] = load_lanes<V>(from + v * S::LANES);
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) acc[r][v] += w[r / PANEL * PANEL * m.columns + r % PANEL] * lanes[v];
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) store_lanes(sum + r * S::WIDTH + (first + v) * S::LANES, acc[r][v]);
  }
}

// Rows begin .. end of a dense matrix. If there are few vectors, several panels are computed side by side.
template <typename S, typename T>
inline void add_dense(const Matrix<T>& m, int64_t begin, int64_t end, const T* slab, T* sum) {
  constexpr int VECTORS = divisor(S::N, PANEL_VECTORS / PANEL), PANELS = PANEL_VECTORS / (PANEL * VECTORS);
  int64_t row = begin;
  for (; row + PANELS * PANEL <= end; row += PANELS * PANEL)
    add_panels<S, PANELS, VECTORS>(m, row, slab, sum + row * S::WIDTH);
  for (; row < end; row += PANEL) add_panels<S, 1, VECTORS>(m, row, slab, sum + row * S::WIDTH);
}

// Rows begin .. end of slab sum += the matrix times a slab
template <typename S, typename T>
inline void add_product(const Matrix<T>& m, int64_t begin, int64_t end, const T* slab, T* sum) {
  if (m.layout == Layout::ROWS || m.layout == Layout::COLUMNS)
    add_dense_of_one_lane(m, begin, end, slab, sum);
  else if (m.layout == Layout::PANELS)
    add_dense<S>(m, begin, end, slab, sum);
  else if (strays_of(m) > 0)
    for (int64_t b = 0; b < m.bands; ++b) {
      const int64_t* first = m.begin + b * m.rows;
      const T* share = slab + b * m.band_columns * S::WIDTH;
      for (int64_t row = begin; row < end; ++row)
        add_entries<S>(m.column, m.value, first[row], first[row + 1], share, sum + row * S::WIDTH);
    }
  add_blocks<S>(m, begin, end, slab, sum);
}

// The number of rows that go through all parts of a step together. It is small, so that their sums stay in the
// first-level cache, unless the matrix is to be read once.
template <typename T>
inline int64_t rows_together(const Matrix<T>& m, int64_t rows) {
  return is_read_once(m) ? rows : 8 * PANEL;
}

template <typename S, typename T>
void forward_rows(const ForwardStep<T>& p, int64_t all_begin, int64_t all_end) {
  const int64_t rows = all_end - all_begin, a = rows_together(p.input, rows), b = rows_together(p.hidden, rows);
  const int64_t together = a > b ? a : b;
  for (int64_t begin = all_begin; begin < all_end; begin += together) {
    const int64_t end = begin + together < all_end ? begin + together : all_end, from = begin * S::WIDTH,
                  to = end * S::WIDTH;
    for (int64_t row = begin; row < end; ++row)
      for (int l = 0; l < S::WIDTH; ++l) p.next[row * S::WIDTH + l] = p.bias ? p.bias[row] : T(0);
    add_product<S>(p.input, begin, end, p.x, p.next);
    add_product<S>(p.hidden, begin, end, p.h, p.next);
    activate(p.next + from, to - from, p.nonlinearity);
    if (p.activation) __builtin_memcpy(p.activation + from, p.next + from, (to - from) * sizeof(T));
    if (p.leak != 1)
      for (int64_t i = from; i < to; ++i) p.next[i] = (1 - p.leak) * p.h[i] + p.leak * p.next[i];
    if (p.active)
      for (int64_t i = from; i < to; ++i) p.next[i] = p.active[i % S::WIDTH] == 0 ? p.h[i] : p.next[i];
  }
}

// Numbers begin .. end, whole rows, of da, stays and sum
template <typename S, Nonlinearity NONLINEARITY, typename T>
inline void backward_lanes(const BackwardStep<T>& p, int64_t begin, int64_t end) {
  using V = typename S::V;
  const V zero{};
  for (int64_t i = begin; i < end; i += S::LANES) {
    const V d = load_lanes<V>(p.stays + i);
    V da = p.leak * slope_at(load_lanes<V>(p.activation + i), NONLINEARITY) * d, stays = (1 - p.leak) * d;
    if (p.active) {
      const V active = load_lanes<V>(p.active + i % S::WIDTH);
      da = active != 0 ? da : zero;
      stays = active != 0 ? stays : d;
    }
    store_lanes(p.da + i, da);
    store_lanes(p.stays + i, stays);
    if (p.sum) store_lanes(p.sum + i, load_lanes<V>(p.sum + i) + da);
  }
}

template <typename S, typename T>
void backward_rows(const BackwardStep<T>& p, int64_t all_begin, int64_t all_end) {
  const int64_t together = rows_together(p.hidden_transposed, all_end - all_begin);
  for (int64_t begin = all_begin; begin < all_end; begin += together) {
    const int64_t end = begin + together < all_end ? begin + together : all_end, from = begin * S::WIDTH,
                  to = end * S::WIDTH;
    if (p.grad_output)
      for (int64_t i = from; i < to; ++i) p.stays[i] += p.grad_output[i];
    if (p.da_after) add_product<S>(p.hidden_transposed, begin, end, p.da_after, p.stays);
    if (p.nonlinearity == Nonlinearity::TANH)
      backward_lanes<S, Nonlinearity::TANH>(p, from, to);
    else
      backward_lanes<S, Nonlinearity::RELU>(p, from, to);
  }
}

// ROWS rows of a weight's gradient: grad[r][e] += the sum over steps and lanes of row r of da times column[e] of
// `other`, for `count` columns, which are 0, 1, ... if column is null. GROUP columns are computed at a time, since
// their sums over lanes are made together; the last group is filled up with the last column.
template <typename S, int ROWS, typename T>
inline void sampled_row(const SampledProduct<T>& p, const T* da, const T* other, const uint16_t* column, int64_t count,
                        T* grad) {
  using V = typename S::V;
  for (int64_t e = 0; e < count; e += GROUP) {
    const int64_t left = count - e;
    const T *at[GROUP], *d_at = da;
    V acc[ROWS][GROUP]{};
    for (int g = 0; g < GROUP; ++g) {
      const int64_t entry = g < left ? e + g : count - 1;
      at[g] = other + (column ? int64_t{column[entry]} : entry) * S::WIDTH;
    }
    for (int64_t k = 0; k < p.steps; ++k, d_at += p.da_step)
      for (int v = 0; v < S::N; ++v) {
        V d[ROWS];
        for (int r = 0; r < ROWS; ++r) d[r] = load_lanes<V>(d_at + r * S::WIDTH + v * S::LANES);
        for (int g = 0; g < GROUP; ++g) {
          const V lanes = load_lanes<V>(at[g] + k * p.other_step + v * S::LANES);
          for (int r = 0; r < ROWS; ++r) acc[r][g] += d[r] * lanes;
        }
      }
    for (int r = 0; r < ROWS; ++r) {
      T* to = grad + r * p.matrix.columns + e;
      if (left >= GROUP) {
        add_sums_of_eight(acc[r], to);
      } else {
        T sums[GROUP] = {};
        add_sums_of_eight(acc[r], sums);
        for (int64_t g = 0; g < left; ++g) to[g] += sums[g];
      }
    }
  }
}

template <typename S, int ROWS, typename T>
inline int64_t sampled_dense(const SampledProduct<T>& p, int64_t row, int64_t end) {
  const int64_t columns = p.matrix.columns;
  for (; row + ROWS <= end; row += ROWS)
    sampled_row<S, ROWS>(p, p.da + row * S::WIDTH, p.other, nullptr, columns, p.grad + row * columns);
  return row;
}

// The same for one or two columns, with four rows at a time in the place of many columns
template <typename S, typename T>
inline int64_t sampled_narrow(const SampledProduct<T>& p, int64_t row, int64_t end) {
  using V = typename S::V;
  constexpr int ROWS = GROUP / 2;
  const int64_t columns = p.matrix.columns;
  for (; row + ROWS <= end; row += ROWS) {
    V acc[GROUP]{};
    for (int64_t k = 0; k < p.steps; ++k) {
      const T *da = p.da + k * p.da_step + row * S::WIDTH, *other = p.other + k * p.other_step;
      for (int lane = 0; lane < S::WIDTH; lane += S::LANES) {
        const V first = load_lanes<V>(other + lane), last = load_lanes<V>(other + (columns - 1) * S::WIDTH + lane);
        for (int r = 0; r < ROWS; ++r) {
          const V d = load_lanes<V>(da + r * S::WIDTH + lane);
          acc[r] += d * first;
          acc[ROWS + r] += d * last;
        }
      }
    }
    T sums[GROUP] = {};
    add_sums_of_eight(acc, sums);
    for (int64_t r = 0; r < ROWS; ++r)
      for (int64_t c = 0; c < columns; ++c) p.grad[(row + r) * columns + c] += sums[c * ROWS + r];
  }
  return row;
}

template <typename S, typename T>
void sampled_rows(const SampledProduct<T>& p, int64_t begin, int64_t end) {
  const Matrix<T>& m = p.matrix;
  if (m.layout != Layout::ENTRIES && S::WIDTH == 1)
    sampled_dense_of_one_lane(p, begin, end);
  else if (m.layout != Layout::ENTRIES && (m.columns == 1 || m.columns == 2))
    sampled_dense<S, 1>(p, sampled_narrow<S>(p, begin, end), end);
  else if (m.layout != Layout::ENTRIES)
    sampled_dense<S, 1>(p, sampled_dense<S, GRADIENT_ROWS>(p, begin, end), end);
  else if (strays_of(m) > 0)
    for (int64_t b = 0; b < m.bands; ++b)
      for (int64_t row = begin; row < end; ++row) {
        const int64_t e = m.begin[b * m.rows + row], count = m.begin[b * m.rows + row + 1] - e;
        const T* share = p.other + b * m.band_columns * S::WIDTH;
        sampled_row<S, 1>(p, p.da + row * S::WIDTH, share, m.column + e, count, p.grad + e);
      }
  with_side(m, [&](auto side) { sample_blocks<side(), S>(p, begin, end); });
}

// The function calls run(Lanes<T, width>()) for the width of a strip.
template <typename T, typename Run>
inline void with_width(int64_t width, Run run) {
  switch (width) {
    case 1: return run(Lanes<T, 1>());
    case 4: return run(Lanes<T, 4>());
    case 8: return run(Lanes<T, 8>());
    case 16: return run(Lanes<T, 16>());
    case 24: return run(Lanes<T, 24>());
    case 32: return run(Lanes<T, 32>());
    case 48: return run(Lanes<T, 48>());
    default: return run(Lanes<T, 64>());
  }
}

inline void find_kept(const uint8_t* mask, int64_t columns, uint64_t* bits) {
  for (int64_t j = 0; j < columns; j += MASK_STEP) *bits++ = kept_bits(mask + j, columns - j);
}

inline int64_t count_bits(const uint64_t* bits, int64_t words) {
  int64_t count = 0;
  for (int64_t w = 0; w < words; ++w) count += __builtin_popcountll(bits[w]);
  return count;
}

// Each byte of a word counts its own ones: in pairs of bits first, then in fours, then in eights.
inline void count_squares(const uint64_t* bits, int64_t rows, int64_t words, uint8_t* counts) {
  for (int64_t w = 0; w < words; ++w) {
    uint64_t sum = 0;
    for (int64_t r = 0; r < rows; ++r) {
      uint64_t x = bits[r * words + w];
      x -= x >> 1 & 0x5555555555555555;
      x = (x & 0x3333333333333333) + (x >> 2 & 0x3333333333333333);
      sum += (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0f;
    }
    __builtin_memcpy(counts + 8 * w, &sum, 8);
  }
}

template <typename T>
constexpr RnnLoops<T> RNN_LOOPS = {
    .forward = [](const ForwardStep<T>& p, int64_t begin,
                  int64_t end) { with_width<T>(p.width, [&](auto s) { forward_rows<decltype(s)>(p, begin, end); }); },
    .backward = [](const BackwardStep<T>& p, int64_t begin,
                   int64_t end) { with_width<T>(p.width, [&](auto s) { backward_rows<decltype(s)>(p, begin, end); }); },
    .product =
        [](const Product<T>& p, int64_t begin, int64_t end) {
          with_width<T>(p.width, [&](auto s) { add_product<decltype(s)>(p.matrix, begin, end, p.from, p.to); });
        },
    .sampled = [](const SampledProduct<T>& p, int64_t begin,
                  int64_t end) { with_width<T>(p.width, [&](auto s) { sampled_rows<decltype(s)>(p, begin, end); }); },
    .to_slab = to_slab<T>,
    .from_slab = from_slab<T>,
    .fill_panels = fill_panels<T>,
    .transpose_panels = transpose_panels<T>,
    .fill_blocks = fill_blocks<T>,
    .transpose_block = transpose_block<T>,
    .fill_rows = fill_rows<T>,
    .find_kept = find_kept,
    .count_bits = count_bits,
    .count_squares = count_squares,
};

}  // namespace

template <typename T>
const RnnLoops<T>& rnn_loops() {
  return RNN_LOOPS<T>;
}
template const RnnLoops<float>& rnn_loops<float>();
template const RnnLoops<double>& rnn_loops<double>();

}  // namespace moduli::MODULI_NAMESPACE
