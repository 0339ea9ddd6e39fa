// How the work on a sequence is cut: strips of the batch with their slabs, and chunks of rows.
#pragma once

#include "cpu/common/aligned.h"
#include "cpu/common/chunks.h"
#include "cpu/common/transpose.h"
#include "cpu/rnn/matrix.h"

namespace moduli {
namespace {

struct Strip {
  int64_t first, lanes;  // lanes first .. first + lanes of the batch
  int64_t width;         // lanes of the slab, of which the last ones may only fill it up
};

// The strips of a batch. They depend on sizes alone, not on threads, and so do sums over lanes. There are at least two
// to share out from 25 lanes on, or from 17 on if each thread can have the weights in its own cache. `narrow` says that
// the hidden weight is in blocks, which cost no more for fewer lanes; if there are many neurons, strips are narrower then,
// so that the few slabs of a step stay in the second-level cache.
inline std::vector<Strip> strips_of(int64_t batch, int64_t hidden, bool narrow) {
  constexpr int64_t UNIT = 16, CACHED_HIDDEN = 768, MANY_HIDDEN = 2048;
  const int64_t most_in_one = hidden > CACHED_HIDDEN ? 24 : UNIT, units = (batch + UNIT - 1) / UNIT;
  const int64_t most_units = narrow && hidden > MANY_HIDDEN ? 2 : 4;
  const int64_t several = std::max<int64_t>(2, (units + most_units - 1) / most_units);
  const int64_t count = batch == 0 ? 0 : batch <= most_in_one ? 1 : several;
  std::vector<Strip> strips;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t first = units * s / count * UNIT, end = s + 1 == count ? batch : units * (s + 1) / count * UNIT;
    // a strip has one lane only if the batch has one, since dense weights have another layout then
    const int64_t least = count == 1 ? end - first : std::max<int64_t>(4, end - first);
    const auto width = std::find_if(std::begin(WIDTHS), std::end(WIDTHS), [&](int64_t w) { return w >= least; });
    strips.push_back({.first = first, .lanes = end - first, .width = *width});
  }
  return strips;
}

// The number of lanes of the widest strip
inline int64_t widest(const std::vector<Strip>& strips) {
  int64_t widest = 1;
  for (const Strip& strip : strips) widest = std::max(widest, strip.width);
  return widest;
}

// The lanes of all slabs, with those that fill them up
inline int64_t lanes_of(const std::vector<Strip>& strips) {
  int64_t lanes = 0;
  for (const Strip& strip : strips) lanes += strip.width;
  return lanes;
}

// Slabs have room for whole panels and whole blocks.
inline int64_t rounded_up(int64_t rows) { return (rows + MOST_SIDE - 1) / MOST_SIDE * MOST_SIDE; }

// `steps` slabs of `rows` rows for each strip, one behind the other.
template <typename T>
class Slabs {
 public:
  Slabs(const std::vector<Strip>& strips, int64_t steps, int64_t rows)
      : rows_(rounded_up(rows)), memory_(steps * rows_ * lanes_of(strips)) {
    int64_t lanes = 0;
    for (const Strip& strip : strips) {
      first_.push_back(steps * rows_ * lanes);
      width_.push_back(strip.width);
      lanes += strip.width;
    }
  }
  T* at(int64_t strip, int64_t step) const { return memory_.data() + first_[strip] + step * stride(strip); }
  int64_t stride(int64_t strip) const { return rows_ * width_[strip]; }

 private:
  int64_t rows_;
  std::vector<int64_t> first_, width_;
  Aligned<T> memory_;
};

// `steps` slabs of each strip lane by lane, (lanes, rows), which the gradient of blocks reads.
template <typename T>
class LanesFirst {
 public:
  LanesFirst(const std::vector<Strip>& strips, int64_t steps, int64_t rows)
      : strips_(strips), steps_(steps), stride_(rounded_up(rows)),
        memory_(steps * (strips.back().first + strips.back().lanes - strips[0].first) * stride_) {}
  int64_t stride() const { return stride_; }  // elements from lane to lane
  T* at(int64_t strip, int64_t step) const {
    const Strip& its = strips_[strip];
    return memory_.data() + (steps_ * (its.first - strips_[0].first) + step * its.lanes) * stride_;
  }
  // What brings a slab of the strip here
  Transposition<T> from(int64_t strip, int64_t step, T* slab) const {
    return {.lanes_first = at(strip, step),
            .stride = stride_,
            .lanes = strips_[strip].lanes,
            .slab = slab,
            .width = strips_[strip].width,
            .place = nullptr};
  }

 private:
  const std::vector<Strip>& strips_;
  int64_t steps_, stride_;
  Aligned<T> memory_;
};

template <typename T>
using SlabsPointer = std::unique_ptr<Slabs<T>>;

// Rows first .. end of a chunk of a matrix. Chunks begin at whole squares, which are transposed fastest.
struct RowRange {
  int64_t first, end;
};
inline RowRange chunk_of_rows(int64_t chunk, int64_t chunks, int64_t rows) {
  return {.first = chunk_begin(chunk, chunks, rows, SQUARE), .end = chunk_begin(chunk + 1, chunks, rows, SQUARE)};
}

// The number of chunks for each of `groups` groups that share the threads: `a_thread` chunks for each thread of a
// group. If there are several chunks a thread, one that is held up takes fewer.
inline int64_t chunks_a_group(int64_t rows, int64_t groups, int64_t a_thread) {
  const int64_t threads = (torch::stable::get_num_threads() + groups - 1) / std::max<int64_t>(1, groups);
  return std::max<int64_t>(1, std::min(threads * a_thread, rows / SQUARE));
}

// The number of entries in blocks, those that are masked there included
template <typename T>
int64_t entries_in_blocks(const Matrix<T>& m) {
  const int64_t side = m.blocks.side;
  return side ? m.blocks.begin[KeptEntries::squares(m.rows, side)] * side * side : 0;
}
// The number of entries that a product with the matrix multiplies
template <typename T>
int64_t entries_of(const Matrix<T>& m) {
  return m.layout == Layout::ENTRIES ? strays_of(m) + entries_in_blocks(m) : m.rows * m.columns;
}

}  // namespace
}  // namespace moduli
