// Between a tensor, one lane of the batch after another, and a slab: contracts in rnn.h.
#pragma once

#include "rnn.h"
#include "transpose.h"

namespace moduli::MODULI_NAMESPACE {
namespace {

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

}  // namespace
}  // namespace moduli::MODULI_NAMESPACE
