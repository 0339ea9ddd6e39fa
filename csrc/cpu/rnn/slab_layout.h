// Between a tensor, one lane of the batch after another, and a slab: contracts in rnn.h.
#pragma once

#include <type_traits>

#include "rnn.h"
#include "transpose.h"

namespace moduli::MODULI_NAMESPACE {
namespace {

// What is known of a size beforehand takes one move of each run.
template <int N>
using Size = std::integral_constant<int64_t, N>;
template <typename Run>
inline void with_size(int64_t size, Run run) {
  switch (size) {
    case SQUARE: return run(Size<SQUARE>());
    case SQUARE / 2: return run(Size<SQUARE / 2>());
    case SQUARE / 4: return run(Size<SQUARE / 4>());
    default: return run(size);
  }
}
template <typename T, typename Length>
inline void copy_runs(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t count, Length length) {
  for (int64_t i = 0; i < count; ++i) __builtin_memcpy(to + i * to_stride, from + i * from_stride, length * sizeof(T));
}

// A square of `lanes` x `rows` elements, at most SQUARE each way, through buffers: those that are missing count as 0, and
// are not written but for lanes that are filled up.
template <typename T>
inline void small_square_to_slab(const Transposition<T>& p, int64_t lane, int64_t row, int64_t rows) {
  const int64_t lanes = p.lanes - lane < SQUARE ? p.lanes - lane : SQUARE;
  const int64_t filled = p.width - lane < SQUARE ? p.width - lane : SQUARE;
  T from[SQUARE * SQUARE] = {}, to[SQUARE * SQUARE];
  const T* tensor = p.lanes_first + lane * p.stride + row;
  with_size(rows, [&](auto length) { copy_runs(tensor, p.stride, from, SQUARE, lanes, length); });
  transpose_square<false>(from, SQUARE, to, SQUARE);
  T* slab = p.slab + row * p.width + lane;
  with_size(filled, [&](auto length) { copy_runs(to, SQUARE, slab, p.width, rows, length); });
}
template <typename T>
inline void small_square_from_slab(const Transposition<T>& p, int64_t lane, int64_t row, int64_t rows) {
  const int64_t lanes = p.lanes - lane < SQUARE ? p.lanes - lane : SQUARE;
  const int64_t filled = p.width - lane < SQUARE ? p.width - lane : SQUARE;
  T from[SQUARE * SQUARE] = {}, to[SQUARE * SQUARE];
  const T* slab = p.slab + row * p.width + lane;
  with_size(filled, [&](auto length) { copy_runs(slab, p.width, from, SQUARE, rows, length); });
  transpose_square<false>(from, SQUARE, to, SQUARE);
  T* tensor = p.lanes_first + lane * p.stride + row;
  with_size(rows, [&](auto length) { copy_runs(to, SQUARE, tensor, p.stride, lanes, length); });
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

}  // namespace
}  // namespace moduli::MODULI_NAMESPACE
