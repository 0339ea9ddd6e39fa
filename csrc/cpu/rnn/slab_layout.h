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

// The part of the square at a lane and a row that there is: `rows` rows up to the end, `lanes` lanes of the tensor, and
// `filled` lanes of the slab, of which the last ones may only fill it up.
struct Part {
  int64_t rows, lanes, filled;
  bool is_whole() const { return rows == SQUARE && lanes == SQUARE; }
};
template <typename T>
inline Part part_at(const Transposition<T>& p, int64_t lane, int64_t row, int64_t end) {
  const auto most = [](int64_t left) { return left < SQUARE ? left : SQUARE; };
  return {.rows = most(end - row), .lanes = most(p.lanes - lane), .filled = most(p.width - lane)};
}

// Rows of a square are lines of memory that are far apart, of which no processor sees ahead that the next ones will be
// needed. The function asks for those of the square AHEAD rows further on.
template <bool WRITE, typename T>
inline void ask_ahead(const T* lanes_first, int64_t stride) {
  constexpr int64_t AHEAD = 128;
  for (int64_t l = 0; l < SQUARE; ++l) __builtin_prefetch(lanes_first + l * stride + AHEAD, WRITE, 2);
}

// From a square of the tensor to lines of lanes; lanes that only fill up the slab become 0 there.
template <typename T>
inline void square_to_lines(const T* from, int64_t from_stride, const Part& part, T* to, int64_t to_stride) {
  if (!part.is_whole())
    return transpose_part(from, from_stride, part.lanes, part.rows, to, to_stride, part.rows, part.filled);
  ask_ahead<false>(from, from_stride);
  transpose_square<false>(from, from_stride, to, to_stride);
}
template <typename T>
inline void lines_to_square(const T* from, int64_t from_stride, const Part& part, T* to, int64_t to_stride) {
  if (!part.is_whole())
    return transpose_part(from, from_stride, part.rows, part.filled, to, to_stride, part.lanes, part.rows);
  ask_ahead<true>(to, to_stride);
  transpose_square<false>(from, from_stride, to, to_stride);
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
  for (int64_t lane = 0; lane < p.width; lane += SQUARE)
    for (int64_t row = begin; row < end; row += SQUARE) {
      const Part part = part_at(p, lane, row, end);
      const T* from = p.lanes_first + lane * p.stride + row;
      if (!p.place) {
        square_to_lines(from, p.stride, part, p.slab + row * p.width + lane, p.width);
        continue;
      }
      T lines[SQUARE * SQUARE];  // which go to their places one by one
      square_to_lines(from, p.stride, part, lines, SQUARE);
      with_size(part.filled, [&](auto size) {
        for (int64_t r = 0; r < part.rows; ++r)
          __builtin_memcpy(p.slab + p.place[row + r] * p.width + lane, lines + r * SQUARE, size * sizeof(T));
      });
    }
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
  for (int64_t lane = 0; lane < p.lanes; lane += SQUARE)
    for (int64_t row = begin; row < end; row += SQUARE) {
      const Part part = part_at(p, lane, row, end);
      T* to = p.lanes_first + lane * p.stride + row;
      if (!p.place) {
        lines_to_square(p.slab + row * p.width + lane, p.width, part, to, p.stride);
        continue;
      }
      T lines[SQUARE * SQUARE];  // which come from their places one by one
      with_size(part.filled, [&](auto size) {
        for (int64_t r = 0; r < part.rows; ++r)
          __builtin_memcpy(lines + r * SQUARE, p.slab + p.place[row + r] * p.width + lane, size * sizeof(T));
      });
      lines_to_square(lines, SQUARE, part, to, p.stride);
    }
}

}  // namespace
}  // namespace moduli::MODULI_NAMESPACE
