// Second stage of a tile: f and its slope df/ds from s.
#pragma once

#include "cpu/penalty/tile.h"

namespace moduli::MODULI_NAMESPACE {

// Lines of a column of squares (mirrored_task.h): `count` lines, `stride` bytes apart, one for each SQUARE columns of
// the tile.
struct Lines {
  const char* first;
  int64_t stride, count;

  template <int WRITE>
  __attribute__((always_inline)) void ask(int64_t j) const {
    if (j / SQUARE < count) __builtin_prefetch(first + j / SQUARE * stride, WRITE, 3);
  }
};

// What crosses to and from memory while the exponentials of a tile are computed, one line at a time. If all of it came
// in one burst, in the weight stage, memory could not follow. A pointer is null where there is nothing to do.
template <typename T>
struct Traffic {
  // Lines to ask for: the weights of the next tile, and the gradient that it will fill unless that passes the caches.
  const char *w = nullptr, *dw = nullptr;
  int64_t bytes = 0;  // of a weight
  // The same for the mirrored entries, a line a row
  Lines mirrored{}, mirrored_dw{};
  // The gradient of the tile before, `count` elements, which is written past the caches.
  const T* from = nullptr;
  T* to = nullptr;
  int64_t count = 0;

  __attribute__((always_inline)) void at(int64_t j) const {
    if (w) __builtin_prefetch(w + j * bytes, 0, 3);
    if (dw) __builtin_prefetch(dw + j * bytes, 1, 3);
    mirrored.ask<0>(j);
    mirrored_dw.ask<1>(j);
    if (j < count) stream_pack(to + j, load_pack<V<T>>(from + j));
  }
  // The method writes what is left of the gradient from column j on.
  void rest(int64_t j) const {
    for (; j < count; j += Pack<T>::LANES) stream_pack(to + j, load_pack<V<T>>(from + j));
  }
};

template <typename T, bool GRADS, typename Inhibitor>
inline void inhibitor_loop(const Inhibitor inhibitor, int64_t n, const Tile<T>& tile, const Traffic<T> traffic) {
  const T* s = tile.s;
  T *f = tile.f, *slope = tile.slope;
#pragma omp simd
  for (int64_t j = 0; j < n; j += Pack<T>::LANES) {
    if (Pack<T>::LANES > 1) traffic.at(j);
    V<T> value, change;
    inhibitor.eval(load_pack<V<T>>(s + j), value, change);
    store_pack(f + j, value);
    if (GRADS) store_pack(slope + j, change);
  }
}

// tile.f, and tile.slope if GRADS, from tile.s, for n columns
template <typename T, bool GRADS>
inline void inhibitor_stage(int64_t n, const Tile<T>& tile, const Traffic<T>& traffic) {
  const auto loop = [&](const auto& inhibitor)
                        __attribute__((always_inline)) { inhibitor_loop<T, GRADS>(inhibitor, n, tile, traffic); };
  tile.inhibitor.with(loop);
}

}  // namespace moduli::MODULI_NAMESPACE
