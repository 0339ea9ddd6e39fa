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

// sum += row of the matrix times slab; few vectors take several sums side by side, for one alone would wait for itself.
template <typename S, typename T>
inline void add_row(const Matrix<T>& m, int64_t row, const T* slab, T* sum) {
  using V = typename S::V;
  constexpr int VECTORS = divisor(S::N, AT_ONCE), SIDE_BY_SIDE = VECTORS == 1 ? 4 : VECTORS <= 3 ? 2 : 1;
  const int64_t end = m.begin[row + 1];
  for (int first = 0; first < S::N; first += VECTORS) {
    const T* from = slab + first * S::LANES;
    T* to = sum + first * S::LANES;
    V acc[SIDE_BY_SIDE][VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      acc[0][v] = load_lanes<V>(to + v * S::LANES);
      for (int u = 1; u < SIDE_BY_SIDE; ++u) acc[u][v] = V{};
    }
    int64_t e = m.begin[row];
    for (; e + SIDE_BY_SIDE <= end; e += SIDE_BY_SIDE)
      for (int u = 0; u < SIDE_BY_SIDE; ++u) {
        const T* lanes = from + int64_t{m.column[e + u]} * S::WIDTH;
        const T w = m.value[e + u];
        for (int v = 0; v < VECTORS; ++v) acc[u][v] += w * load_lanes<V>(lanes + v * S::LANES);
      }
    for (; e < end; ++e) {
      const T* lanes = from + int64_t{m.column[e]} * S::WIDTH;
      const T w = m.value[e];
      for (int v = 0; v < VECTORS; ++v) acc[0][v] += w * load_lanes<V>(lanes + v * S::LANES);
    }
    for (int v = 0; v < VECTORS; ++v) {
      for (int u = 1; u < SIDE_BY_SIDE; ++u) acc[0][v] += acc[u][v];
      store_lanes(to + v * S::LANES, acc[0][v]);
    }
  }
}

// The same of a dense matrix, PANEL rows at once; sums lie `stride` apart.
template <typename S, typename T>
inline void add_panel(const Matrix<T>& m, int64_t row, const T* slab, T* sum, int64_t stride) {
  using V = typename S::V;
  constexpr int VECTORS = divisor(S::N, AT_ONCE_OF_PANEL);
  for (int first = 0; first < S::N; first += VECTORS) {
    const T *from = slab + first * S::LANES, *w = m.value + row * m.columns;
    V acc[PANEL][VECTORS];
    for (int r = 0; r < PANEL; ++r)
      for (int v = 0; v < VECTORS; ++v) acc[r][v] = load_lanes<V>(sum + r * stride + (first + v) * S::LANES);
    for (int64_t k = 0; k < m.columns; ++k, w += PANEL, from += S::WIDTH) {
      V lanes[VECTORS];
      for (int v = 0; v < VECTORS; ++v) lanes[v] = load_lanes<V>(from + v * S::LANES);
      for (int r = 0; r < PANEL; ++r)
        for (int v = 0; v < VECTORS; ++v) acc[r][v] += w[r] * lanes[v];
    }
    for (int r = 0; r < PANEL; ++r)
      for (int v = 0; v < VECTORS; ++v) store_lanes(sum + r * stride + (first + v) * S::LANES, acc[r][v]);
  }
}

// Up to PANEL rows; sums lie `stride` apart, and there are PANEL of them.
template <typename S, typename T>
inline void add_rows(const Matrix<T>& m, int64_t row, int64_t count, const T* slab, T* sum, int64_t stride) {
  if (m.begin)
    for (int64_t r = 0; r < count; ++r) add_row<S>(m, row + r, slab, sum + r * stride);
  else
    add_panel<S>(m, row, slab, sum, stride);
}

// Sums of PANEL rows: room for whole packs.
template <typename S, typename T>
struct Sums {
  static constexpr int STRIDE = (S::WIDTH + 15) / 16 * 16;
  alignas(64) T at[PANEL * STRIDE];
};

template <typename S, typename T>
void forward_rows(const ForwardStep<T>& p, int64_t begin, int64_t end) {
  constexpr int STRIDE = Sums<S, T>::STRIDE;
  Sums<S, T> sums;
  for (int64_t row = begin; row < end; row += PANEL) {
    const int64_t count = end - row < PANEL ? end - row : PANEL;
    for (int64_t r = 0; r < PANEL; ++r)
      for (int l = 0; l < STRIDE; ++l) sums.at[r * STRIDE + l] = p.bias && r < count ? p.bias[row + r] : T(0);
    add_rows<S>(p.input, row, count, p.x, sums.at, STRIDE);
    add_rows<S>(p.hidden, row, count, p.h, sums.at, STRIDE);
    activate(sums.at, count * STRIDE, p.nonlinearity);
    for (int64_t r = 0; r < count; ++r) {
      const T *s = sums.at + r * STRIDE, *h = p.h + (row + r) * S::WIDTH;
      T* next = p.next + (row + r) * S::WIDTH;
      if (p.activation) __builtin_memcpy(p.activation + (row + r) * S::WIDTH, s, S::WIDTH * sizeof(T));
      for (int l = 0; l < S::WIDTH; ++l) {
        const T moved = p.leak == 1 ? s[l] : (1 - p.leak) * h[l] + p.leak * s[l];
        next[l] = p.active && p.active[l] == 0 ? h[l] : moved;
      }
    }
  }
}

template <typename S, typename T>
void backward_rows(const BackwardStep<T>& p, int64_t begin, int64_t end) {
  constexpr int STRIDE = Sums<S, T>::STRIDE;
  Sums<S, T> sums{};
  for (int64_t row = begin; row < end; row += PANEL) {
    const int64_t count = end - row < PANEL ? end - row : PANEL;
    for (int64_t r = 0; r < count; ++r)
      for (int l = 0; l < S::WIDTH; ++l) {
        const int64_t at = (row + r) * S::WIDTH + l;
        sums.at[r * STRIDE + l] = p.grad_output[at] + p.stays[at];
      }
    if (p.da_after) add_rows<S>(p.hidden_transposed, row, count, p.da_after, sums.at, STRIDE);
    for (int64_t r = 0; r < count; ++r)
      for (int l = 0; l < S::WIDTH; ++l) {
        const int64_t at = (row + r) * S::WIDTH + l;
        const T d = sums.at[r * STRIDE + l];
        const bool active = !p.active || p.active[l] != 0;
        p.da[at] = active ? p.leak * slope_at(p.activation[at], p.nonlinearity) * d : T(0);
        p.stays[at] = active ? (1 - p.leak) * d : d;
      }
  }
}

template <typename S, typename T>
void product_rows(const Product<T>& p, int64_t begin, int64_t end) {
  constexpr int STRIDE = Sums<S, T>::STRIDE;
  Sums<S, T> sums{};
  for (int64_t row = begin; row < end; row += PANEL) {
    const int64_t count = end - row < PANEL ? end - row : PANEL;
    for (int64_t r = 0; r < count; ++r)
      __builtin_memcpy(sums.at + r * STRIDE, p.to + (row + r) * S::WIDTH, S::WIDTH * sizeof(T));
    add_rows<S>(p.matrix, row, count, p.from, sums.at, STRIDE);
    for (int64_t r = 0; r < count; ++r)
      __builtin_memcpy(p.to + (row + r) * S::WIDTH, sums.at + r * STRIDE, S::WIDTH * sizeof(T));
  }
}

template <typename S, typename T>
void sampled_row(const SampledRow<T>& p) {
  using V = typename S::V;
  constexpr int GROUP = 8;
  int64_t e = 0;
  for (; e + GROUP <= p.entries; e += GROUP) {
    const T* other[GROUP];
    V acc[GROUP]{};
    for (int g = 0; g < GROUP; ++g) other[g] = p.other + (p.column ? int64_t{p.column[e + g]} : e + g) * S::WIDTH;
    const T* da = p.da;
    for (int64_t k = 0; k < p.steps; ++k, da += p.da_step)
      for (int v = 0; v < S::N; ++v) {
        const V d = load_lanes<V>(da + v * S::LANES);
        for (int g = 0; g < GROUP; ++g) acc[g] += d * load_lanes<V>(other[g] + k * p.other_step + v * S::LANES);
      }
    add_sums_of_eight(acc, p.grad + e);
  }
  for (; e < p.entries; ++e) {
    const T *other = p.other + (p.column ? int64_t{p.column[e]} : e) * S::WIDTH, *da = p.da;
    V acc{};
    for (int64_t k = 0; k < p.steps; ++k, da += p.da_step, other += p.other_step)
      for (int v = 0; v < S::N; ++v) acc += load_lanes<V>(da + v * S::LANES) * load_lanes<V>(other + v * S::LANES);
    p.grad[e] += sum_of_lanes<T>(acc);
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
  T sum = 0;
  for (int64_t k = 0; k < steps; ++k)
    for (int64_t l = 0; l < width; ++l) sum += da[k * da_step + l];
  return sum;
}

template <typename T>
void to_slab(const Transposition<T>& p, int64_t begin, int64_t end) {
  int64_t lane = 0;
  for (; lane + SQUARE <= p.lanes; lane += SQUARE) {
    int64_t row = begin;
    for (; row + SQUARE <= end; row += SQUARE)
      transpose_square<false>(p.lanes_first + lane * p.stride + row, p.stride, p.slab + row * p.width + lane, p.width);
    for (; row < end; ++row)
      for (int64_t l = lane; l < lane + SQUARE; ++l) p.slab[row * p.width + l] = p.lanes_first[l * p.stride + row];
  }
  for (; lane < p.width; ++lane)
    for (int64_t row = begin; row < end; ++row)
      p.slab[row * p.width + lane] = lane < p.lanes ? p.lanes_first[lane * p.stride + row] : T(0);
}

template <typename T>
void from_slab(const Transposition<T>& p, int64_t begin, int64_t end) {
  int64_t lane = 0;
  for (; lane + SQUARE <= p.lanes; lane += SQUARE) {
    int64_t row = begin;
    for (; row + SQUARE <= end; row += SQUARE)
      transpose_square<false>(p.slab + row * p.width + lane, p.width, p.lanes_first + lane * p.stride + row, p.stride);
    for (; row < end; ++row)
      for (int64_t l = lane; l < lane + SQUARE; ++l) p.lanes_first[l * p.stride + row] = p.slab[row * p.width + l];
  }
  for (; lane < p.lanes; ++lane)
    for (int64_t row = begin; row < end; ++row) p.lanes_first[lane * p.stride + row] = p.slab[row * p.width + lane];
}

inline int64_t count_kept(const uint8_t* mask, int64_t columns) {
  int64_t kept = 0;
  for (int64_t j = 0; j < columns; j += MASK_STEP) kept += __builtin_popcountll(kept_bits(mask + j, columns - j));
  return kept;
}

template <typename T>
void take_kept(const uint8_t* mask, const T* weight, int64_t columns, int32_t* column, T* value) {
  int64_t count = 0;
  for (int64_t j = 0; j < columns; j += MASK_STEP)
    for (uint64_t bits = kept_bits(mask + j, columns - j); bits; bits &= bits - 1, ++count) {
      const int64_t at = j + __builtin_ctzll(bits);
      column[count] = static_cast<int32_t>(at);
      value[count] = weight[at];
    }
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
      with_width<T>(p.width, [&](auto s) { product_rows<decltype(s)>(p, begin, end); });
    },
    [](const SampledRow<T>& p) { with_width<T>(p.width, [&](auto s) { sampled_row<decltype(s)>(p); }); },
    row_sum<T>, to_slab<T>, from_slab<T>, count_kept, take_kept<T>,
};

}  // namespace

extern const RnnLoops<float> rnn_f32;
extern const RnnLoops<double> rnn_f64;
const RnnLoops<float> rnn_f32 = LOOPS<float>;
const RnnLoops<double> rnn_f64 = LOOPS<double>;

}  // namespace moduli::MODULI_NAMESPACE
