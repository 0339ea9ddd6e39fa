// Copies between a tensor, which holds one lane of the batch after another, and a slab. Contracts stand in steps.h.
#pragma once

#include <type_traits>

#include "cpu/common/transpose.h"
#include "cpu/rnn/steps.h"

namespace moduli::MODULI_NAMESPACE {
namespace {

// The function calls run(size) with a size that is a constant for the compiler where possible, so that a copy of that
// length is one move.
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

// `count` runs of `length` elements
template <typename T, typename Length>
inline void copy_runs(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t count, Length length) {
  for (int64_t i = 0; i < count; ++i) __builtin_memcpy(to + i * to_stride, from + i * from_stride, length * sizeof(T));
}

// A part of a square, transposed through buffers: `lines` lines of `length` elements are read, `to_lines` lines of
// `to_length` elements are written. Elements that are not read count as 0.
template <typename T>
inline void transpose_part(const T* from, int64_t from_stride, int64_t lines, int64_t length, T* to, int64_t to_stride,
                           int64_t to_lines, int64_t to_length) {
  T read[SQUARE * SQUARE] = {}, transposed[SQUARE * SQUARE];
  with_size(length, [&](auto size) { copy_runs(from, from_stride, read, SQUARE, lines, size); });
  transpose_square<false>(read, SQUARE, transposed, SQUARE);
  with_size(to_length, [&](auto size) { copy_runs(transposed, SQUARE, to, to_stride, to_lines, size); });
}

// The part of a square that a slab or a tensor has; lanes that only fill up the slab become 0 there.
template <typename T>
inline void part_to_slab(const Transposition<T>& p, int64_t lane, int64_t row, int64_t rows) {
  const int64_t lanes = p.lanes - lane < SQUARE ? p.lanes - lane : SQUARE;
  const int64_t filled = p.width - lane < SQUARE ? p.width - lane : SQUARE;
  transpose_part(p.lanes_first + lane * p.stride + row, p.stride, lanes, rows, p.slab + row * p.width + lane, p.width, rows,
                 filled);
}
template <typename T>
inline void part_from_slab(const Transposition<T>& p, int64_t lane, int64_t row, int64_t rows) {
  const int64_t lanes = p.lanes - lane < SQUARE ? p.lanes - lane : SQUARE;
  const int64_t filled = p.width - lane < SQUARE ? p.width - lane : SQUARE;
  transpose_part(p.slab + row * p.width + lane, p.width, rows, filled, p.lanes_first + lane * p.stride + row, p.stride,
                 lanes, rows);
}

// Rows of a square are lines of memory that are far apart, of which no processor sees ahead that the next ones will be
// needed. The function asks for those of the square AHEAD rows further on.
template <bool WRITE, typename T>
inline void ask_ahead(const T* lanes_first, int64_t stride) {
  constexpr int64_t AHEAD = 128;
  for (int64_t l = 0; l < SQUARE; ++l) __builtin_prefetch(lanes_first + l * stride + AHEAD, WRITE, 2);
}

// The same between a tensor and a slab whose rows have other places: rows of a square go through a buffer.
template <typename T>
void to_places(const Transposition<T>& p, int64_t begin, int64_t end) {
  for (int64_t lane = 0; lane < p.width; lane += SQUARE)
    for (int64_t row = begin; row < end; row += SQUARE) {
      const int64_t rows = end - row < SQUARE ? end - row : SQUARE,
                    lanes = p.lanes - lane < SQUARE ? p.lanes - lane : SQUARE;
      const int64_t filled = p.width - lane < SQUARE ? p.width - lane : SQUARE;
      T square[SQUARE * SQUARE];
      const T* from = p.lanes_first + lane * p.stride + row;
      if (rows == SQUARE && lanes == SQUARE) {
        ask_ahead<false>(from, p.stride);
        transpose_square<false>(from, p.stride, square, SQUARE);
      } else
        transpose_part(from, p.stride, lanes, rows, square, SQUARE, rows, filled);
      with_size(filled, [&](auto size) {
        for (int64_t r = 0; r < rows; ++r)
          __builtin_memcpy(p.slab + p.place[row + r] * p.width + lane, square + r * SQUARE, size * sizeof(T));
      });
    }
}
template <typename T>
void from_places(const Transposition<T>& p, int64_t begin, int64_t end) {
  for (int64_t lane = 0; lane < p.lanes; lane += SQUARE)
    for (int64_t row = begin; row < end; row += SQUARE) {
      const int64_t rows = end - row < SQUARE ? end - row : SQUARE,
                    lanes = p.lanes - lane < SQUARE ? p.lanes - lane : SQUARE;
      const int64_t filled = p.width - lane < SQUARE ? p.width - lane : SQUARE;
      T square[SQUARE * SQUARE] = {};
      with_size(filled, [&](auto size) {
        for (int64_t r = 0; r < rows; ++r)
          __builtin_memcpy(square + r * SQUARE, p.slab + p.place[row + r] * p.width + lane, size * sizeof(T));
      });
      T* to = p.lanes_first + lane * p.stride + row;
      if (rows == SQUARE && lanes == SQUARE) {
        ask_ahead<true>(to, p.stride);
        transpose_square<false>(square, SQUARE, to, p.stride);
      } else
        transpose_part(square, SQUARE, rows, filled, to, p.stride, lanes, rows);
    }
}

template <typename T>
void to_slab(const Transposition<T>& p, int64_t begin, int64_t end) {
  if (p.width == 1) {
    if (p.place)
      for (int64_t row = begin; row < end; ++row) p.slab[p.place[row]] = p.lanes_first[row];
    else
      __builtin_memcpy(p.slab + begin, p.lanes_first + begin, (end - begin) * sizeof(T));
    return;
  }
  if (p.place) return to_places(p, begin, end);
  for (int64_t lane = 0; lane < p.width; lane += SQUARE)
    for (int64_t row = begin; row < end; row += SQUARE)
      if (lane + SQUARE <= p.lanes && row + SQUARE <= end) {
        const T* from = p.lanes_first + lane * p.stride + row;
        ask_ahead<false>(from, p.stride);
        transpose_square<false>(from, p.stride, p.slab + row * p.width + lane, p.width);
      } else
        part_to_slab(p, lane, row, end - row < SQUARE ? end - row : SQUARE);
}

template <typename T>
void from_slab(const Transposition<T>& p, int64_t begin, int64_t end) {
  if (p.width == 1) {
    if (p.place)
      for (int64_t row = begin; row < end; ++row) p.lanes_first[row] = p.slab[p.place[row]];
    else
      __builtin_memcpy(p.lanes_first + begin, p.slab + begin, (end - begin) * sizeof(T));
    return;
  }
  if (p.place) return from_places(p, begin, end);
  for (int64_t lane = 0; lane < p.lanes; lane += SQUARE)
    for (int64_t row = begin; row < end; row += SQUARE)
      if (lane + SQUARE <= p.lanes && row + SQUARE <= end) {
        T* to = p.lanes_first + lane * p.stride + row;
        ask_ahead<true>(to, p.stride);
        transpose_square<false>(p.slab + row * p.width + lane, p.width, to, p.stride);
      } else
        part_from_slab(p, lane, row, end - row < SQUARE ? end - row : SQUARE);
}

}  // namespace
}  // namespace moduli::MODULI_NAMESPACE
