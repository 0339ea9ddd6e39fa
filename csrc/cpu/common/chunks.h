// How a number of rows or columns is cut into chunks.
#pragma once

#include <cstdint>

namespace moduli {

// The first element of a chunk when `size` elements are cut into `chunks` chunks of nearly equal size, which begin at
// multiples of `multiple`. Chunk number `chunks` begins at `size`.
constexpr int64_t chunk_begin(int64_t chunk, int64_t chunks, int64_t size, int64_t multiple) {
  const int64_t units = (size + multiple - 1) / multiple;
  const int64_t begin = units * chunk / chunks * multiple;
  return begin < size ? begin : size;
}

}  // namespace moduli
