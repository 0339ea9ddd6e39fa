// The loops of the masked RNN, for whatever instruction set this is compiled for: contracts in rnn.h.
#pragma once

#include "kept_bits.h"
#include "lanes.h"
#include "nonlinearity.h"
#include "rnn.h"
#include "transpose.h"

namespace moduli::MODULI_NAMESPACE {
namespace {

// Vectors that are accumulated in registers at a time, of one row and of a panel of rows.
constexpr int AT_ONCE = 8;
#if defined(__AVX512F__)
constexpr int AT_ONCE_OF_PANEL = 4;
#else
constexpr int AT_ONCE_OF_PANEL = 2;
#endif

// The most that can be taken at a time so that nothing of n is left over.
constexpr int divisor(int n, int most) { return n <= most ? n : n % most == 0 ? most : divisor(n, most - 1); }

// sum += entries begin .. end times a slab; few vectors take several sums side by side, for one alone would wait for itself.
template <typename S, typename T>
inline void add_entries(const uint16_t* column, const T* value, int64_t begin, int64_t end, const T* slab, T* sum) {
  using V = typename S::V;
  constexpr int VECTORS = divisor(S::N, AT_ONCE), SIDE_BY_SIDE = VECTORS == 1 ? 4 : VECTORS <= 3 ? 2 : 1;
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

// The same of PANEL rows of a dense matrix; sum: as many rows of a slab.
template <typename S, typename T>
inline void add_panel(const Matrix<T>& m, int64_t row, const T* slab, T* sum) {
  using V = typename S::V;
  constexpr int VECTORS = divisor(S::N, AT_ONCE_OF_PANEL);
  for (int first = 0; first < S::N; first += VECTORS) {
    const T *from = slab + first * S::LANES, *w = m.value + row * m.columns;
    V acc[PANEL][VECTORS];
    for (int r = 0; r < PANEL; ++r)
      for (int v = 0; v < VECTORS; ++v) acc[r][v] = load_lanes<V>(sum + r * S::WIDTH + (first + v) * S::LANES);
    for (int64_t k = 0; k < m.columns; ++k, w += PANEL, from += S::WIDTH) {
      V lanes[VECTORS];
      for (int v = 0; v < VECTORS; ++v) lanes[v] = load_lanes<V>(from + v * S::LANES);
      for (int r = 0; r < PANEL; ++r)
        for (int v = 0; v < VECTORS; ++v) acc[r][v] += w[r] * lanes[v];
    }
    for (int r = 0; r < PANEL; ++r)
      for (int v = 0; v < VECTORS; ++v) store_lanes(sum + r * S::WIDTH + (first + v) * S::LANES, acc[r][v]);
  }
}

// sum += the matrix times slab, rows begin .. end of slab `sum`.
template <typename S, typename T>
inline void add_product(const Matrix<T>& m, int64_t begin, int64_t end, const T* slab, T* sum) {
  if (!m.begin)
    for (int64_t row = begin; row < end; row += PANEL) add_panel<S>(m, row, slab, sum + row * S::WIDTH);
  else
    for (int64_t b = 0; b < m.blocks; ++b) {
      const int64_t* first = m.begin + b * m.rows;
      const T* share = slab + b * m.block_columns * S::WIDTH;
      for (int64_t row = begin; row < end; ++row)
        add_entries<S>(m.column, m.value, first[row], first[row + 1], share, sum + row * S::WIDTH);
    }
}

// Rows that go through all parts of a step together: few, so that their sums stay at hand, but where each block of columns
// is to serve all rows.
template <typename T>
inline int64_t rows_together(const Matrix<T>& m, int64_t rows) {
  return m.begin && m.blocks > 1 ? rows : 8 * PANEL;
}

template <typename S, typename T>
void forward_rows(const ForwardStep<T>& p, int64_t all_begin, int64_t all_end) {
  const int64_t rows = all_end - all_begin, a = rows_together(p.input, rows), b = rows_together(p.hidden, rows);
  const int64_t together = a > b ? a : b;
  for (int64_t begin = all_begin; begin < all_end; begin += together) {
    const int64_t end = begin + together < all_end ? begin + together : all_end, from = begin * S::WIDTH, to = end * S::WIDTH;
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

template <typename S, typename T>
void backward_rows(const BackwardStep<T>& p, int64_t all_begin, int64_t all_end) {
  const int64_t together = rows_together(p.hidden_transposed, all_end - all_begin);
  for (int64_t begin = all_begin; begin < all_end; begin += together) {
    const int64_t end = begin + together < all_end ? begin + together : all_end, from = begin * S::WIDTH, to = end * S::WIDTH;
    for (int64_t i = from; i < to; ++i) p.stays[i] += p.grad_output[i];
    if (p.da_after) add_product<S>(p.hidden_transposed, begin, end, p.da_after, p.stays);
    for (int64_t i = from; i < to; ++i) {
      const T d = p.stays[i];
      p.da[i] = p.leak * slope_at(p.activation[i], p.nonlinearity) * d;
      p.stays[i] = (1 - p.leak) * d;
      if (p.active && p.active[i % S::WIDTH] == 0) {
        p.da[i] = 0;
        p.stays[i] = d;
      }
    }
  }
}

// grad[e] += the entry of each of `count` columns; column null: 0, 1, ... Eight at a time, for their sums over lanes are made
// together; the last ones are filled up with the last.
template <typename S, typename T>
inline void sampled_row(const SampledProduct<T>& p, const T* da, const T* other, const uint16_t* column, int64_t count,
                        T* grad) {
  using V = typename S::V;
  constexpr int GROUP = 8;
  for (int64_t e = 0; e < count; e += GROUP) {
    const int64_t left = count - e;
    const T *at[GROUP], *d_at = da;
    V acc[GROUP]{};
    for (int g = 0; g < GROUP; ++g) {
      const int64_t entry = g < left ? e + g : count - 1;
      at[g] = other + (column ? int64_t{column[entry]} : entry) * S::WIDTH;
    }
    for (int64_t k = 0; k < p.steps; ++k, d_at += p.da_step)
      for (int v = 0; v < S::N; ++v) {
        const V d = load_lanes<V>(d_at + v * S::LANES);
        for (int g = 0; g < GROUP; ++g) acc[g] += d * load_lanes<V>(at[g] + k * p.other_step + v * S::LANES);
      }
    if (left >= GROUP) {
      add_sums_of_eight(acc, grad + e);
    } else {
      T sums[GROUP] = {};
      add_sums_of_eight(acc, sums);
      for (int64_t g = 0; g < left; ++g) grad[e + g] += sums[g];
    }
  }
}

template <typename S, typename T>
void sampled_rows(const SampledProduct<T>& p, int64_t begin, int64_t end) {
  const Matrix<T>& m = p.matrix;
  if (!m.begin)
    for (int64_t row = begin; row < end; ++row)
      sampled_row<S>(p, p.da + row * S::WIDTH, p.other, nullptr, m.columns, p.grad + row * m.columns);
  else
    for (int64_t b = 0; b < m.blocks; ++b)
      for (int64_t row = begin; row < end; ++row) {
        const int64_t e = m.begin[b * m.rows + row], count = m.begin[b * m.rows + row + 1] - e;
        const T* share = p.other + b * m.block_columns * S::WIDTH;
        sampled_row<S>(p, p.da + row * S::WIDTH, share, m.column + e, count, p.grad + e);
      }
}

// What `run` does with the type of the strip's width.
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

template <typename T>
T row_sum(const T* da, int64_t da_step, int64_t steps, int64_t width) {
  constexpr int SIDE_BY_SIDE = 8;  // widths from 8 on are multiples of it
  T sums[SIDE_BY_SIDE] = {}, sum = 0;
  for (int64_t k = 0; k < steps; ++k, da += da_step)
    if (width % SIDE_BY_SIDE == 0)
      for (int64_t l = 0; l < width; l += SIDE_BY_SIDE)
        for (int i = 0; i < SIDE_BY_SIDE; ++i) sums[i] += da[l + i];
    else
      for (int64_t l = 0; l < width; ++l) sum += da[l];
  for (const T each : sums) sum += each;
  return sum;
}

// A square of `lanes` x `rows` elements, at most SQUARE each way, through a buffer: those that are missing count as 0, and
// are not written but for `filled` lanes.
template <typename T>
inline void small_square_to_slab(const Transposition<T>& p, int64_t lane, int64_t row, int64_t rows) {
  const int64_t lanes = p.lanes - lane < SQUARE ? p.lanes - lane : SQUARE;
  const int64_t filled = p.width - lane < SQUARE ? p.width - lane : SQUARE;
  T from[SQUARE * SQUARE] = {}, to[SQUARE * SQUARE];
  for (int64_t l = 0; l < lanes; ++l)
    __builtin_memcpy(from + l * SQUARE, p.lanes_first + (lane + l) * p.stride + row, rows * sizeof(T));
  transpose_square<false>(from, SQUARE, to, SQUARE);
  T* slab = p.slab + row * p.width + lane;
  if (filled == SQUARE / 2)  // a size known beforehand takes one move
    for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(slab + r * p.width, to + r * SQUARE, SQUARE / 2 * sizeof(T));
  else
    for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(slab + r * p.width, to + r * SQUARE, filled * sizeof(T));
}
template <typename T>
inline void small_square_from_slab(const Transposition<T>& p, int64_t lane, int64_t row, int64_t rows) {
  const int64_t lanes = p.lanes - lane < SQUARE ? p.lanes - lane : SQUARE;
  T from[SQUARE * SQUARE] = {}, to[SQUARE * SQUARE];
  const int64_t filled = p.width - lane < SQUARE ? p.width - lane : SQUARE;
  const T* slab = p.slab + row * p.width + lane;
  if (filled == SQUARE / 2)
    for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(from + r * SQUARE, slab + r * p.width, SQUARE / 2 * sizeof(T));
  else
    for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(from + r * SQUARE, slab + r * p.width, filled * sizeof(T));
  transpose_square<false>(from, SQUARE, to, SQUARE);
  for (int64_t l = 0; l < lanes; ++l)
    __builtin_memcpy(p.lanes_first + (lane + l) * p.stride + row, to + l * SQUARE, rows * sizeof(T));
}

template <typename T>
void to_slab(const Transposition<T>& p, int64_t begin, int64_t end) {
  if (p.width == 1) {
    __builtin_memcpy(p.slab + begin, p.lanes_first + begin, (end - begin) * sizeof(T));
    return;
  }
  for (int64_t lane = 0; lane < p.width; lane += SQUARE)
    for (int64_t row = begin; row < end; row += SQUARE)
      if (lane + SQUARE <= p.lanes && row + SQUARE <= end)
        transpose_square<false>(p.lanes_first + lane * p.stride + row, p.stride, p.slab + row * p.width + lane, p.width);
      else
        small_square_to_slab(p, lane, row, end - row < SQUARE ? end - row : SQUARE);
}

template <typename T>
void from_slab(const Transposition<T>& p, int64_t begin, int64_t end) {
  if (p.width == 1) {
    __builtin_memcpy(p.lanes_first + begin, p.slab + begin, (end - begin) * sizeof(T));
    return;
  }
  for (int64_t lane = 0; lane < p.lanes; lane += SQUARE)
    for (int64_t row = begin; row < end; row += SQUARE)
      if (lane + SQUARE <= p.lanes && row + SQUARE <= end)
        transpose_square<false>(p.slab + row * p.width + lane, p.width, p.lanes_first + lane * p.stride + row, p.stride);
      else
        small_square_from_slab(p, lane, row, end - row < SQUARE ? end - row : SQUARE);
}

inline void find_kept(const uint8_t* mask, int64_t columns, uint64_t* bits) {
  for (int64_t j = 0; j < columns; j += MASK_STEP) *bits++ = kept_bits(mask + j, columns - j);
}

inline int64_t count_bits(const uint64_t* bits, int64_t words) {
  int64_t count = 0;
  for (int64_t w = 0; w < words; ++w) count += __builtin_popcountll(bits[w]);
  return count;
}

template <typename T>
constexpr RnnLoops<T> LOOPS = {
    [](const ForwardStep<T>& p, int64_t begin, int64_t end) {
      with_width<T>(p.width, [&](auto s) { forward_rows<decltype(s)>(p, begin, end); });
    },
    [](const BackwardStep<T>& p, int64_t begin, int64_t end) {
      with_width<T>(p.width, [&](auto s) { backward_rows<decltype(s)>(p, begin, end); });
    },
    [](const Product<T>& p, int64_t begin, int64_t end) {
      with_width<T>(p.width, [&](auto s) { add_product<decltype(s)>(p.matrix, begin, end, p.from, p.to); });
    },
    [](const SampledProduct<T>& p, int64_t begin, int64_t end) {
      with_width<T>(p.width, [&](auto s) { sampled_rows<decltype(s)>(p, begin, end); });
    },
    row_sum<T>, to_slab<T>, from_slab<T>, find_kept, count_bits,
};

}  // namespace

extern const RnnLoops<float> rnn_f32;
extern const RnnLoops<double> rnn_f64;
const RnnLoops<float> rnn_f32 = LOOPS<float>;
const RnnLoops<double> rnn_f64 = LOOPS<double>;

}  // namespace moduli::MODULI_NAMESPACE
