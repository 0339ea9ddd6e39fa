// Strips of a batch, their slabs, and chunks of rows: how the work on a sequence is cut.
#pragma once

#include "aligned.h"
#include "rnn_matrix.h"

namespace moduli {
namespace {

struct Strip {
  int64_t first, lanes, width;  // of the batch
};

// Depends on sizes alone, not on threads, so that sums over lanes do too. From 25 lanes on, and from 17 on where each thread
// can have the weights in its own cache, there are two at least, to share out.
inline std::vector<Strip> strips_of(int64_t batch, int64_t hidden) {
  constexpr int64_t UNIT = 16, MOST_UNITS = 4, CACHED_HIDDEN = 768;
  const int64_t most_in_one = hidden > CACHED_HIDDEN ? 24 : UNIT, units = (batch + UNIT - 1) / UNIT;
  const int64_t several = std::max<int64_t>(2, (units + MOST_UNITS - 1) / MOST_UNITS);
  const int64_t count = batch == 0 ? 0 : batch <= most_in_one ? 1 : several;
  std::vector<Strip> strips;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t first = units * s / count * UNIT, end = s + 1 == count ? batch : units * (s + 1) / count * UNIT;
    // one lane is a strip of its own only where it is the batch: its dense weights lie otherwise
    const int64_t least = count == 1 ? end - first : std::max<int64_t>(4, end - first);
    const auto width = std::find_if(std::begin(WIDTHS), std::end(WIDTHS), [&](int64_t w) { return w >= least; });
    strips.push_back({first, end - first, *width});
  }
  return strips;
}

// Of all strips, with those that are filled up.
inline int64_t lanes_of(const std::vector<Strip>& strips) {
  int64_t lanes = 0;
  for (const Strip& strip : strips) lanes += strip.width;
  return lanes;
}

// For each strip, `steps` slabs of `rows` rows in a row.
template <typename T>
class Slabs {
 public:
  Slabs(const std::vector<Strip>& strips, int64_t steps, int64_t rows)
      : rows_((rows + PANEL - 1) / PANEL * PANEL), memory_(steps * rows_ * lanes_of(strips)) {
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

template <typename T>
using SlabsPointer = std::unique_ptr<Slabs<T>>;

// Chunks of a matrix's rows, to share out.
constexpr int64_t SQUARE_ROWS = 16;  // whole squares are transposed fastest
inline int64_t chunk_begin(int64_t rows, int64_t c, int64_t chunks) {
  return c == chunks ? rows : rows * c / chunks / SQUARE_ROWS * SQUARE_ROWS;
}
// For each of some groups that have the threads between them: `a_thread` for each thread of a group. Of more than one, a
// thread that is held up takes fewer.
inline int64_t chunks_a_group(int64_t rows, int64_t groups, int64_t a_thread) {
  const int64_t threads = (torch::stable::get_num_threads() + groups - 1) / std::max<int64_t>(1, groups);
  return std::max<int64_t>(1, std::min(threads * a_thread, rows / SQUARE_ROWS));
}

template <typename T>
int64_t entries_of(const Matrix<T>& m) {
  return m.layout == Layout::ENTRIES ? m.begin[m.blocks * m.rows] : m.rows * m.columns;
}

}  // namespace
}  // namespace moduli
