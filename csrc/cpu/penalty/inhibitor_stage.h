// Second stage of a tile: f and its slope df/ds from s.
#pragma once

#include "tile.h"

namespace moduli::MODULI_NAMESPACE {

// Of a column of squares (penalty_mirrored.h): `count` lines, one each SQUARE columns of the tile.
struct Lines {
  const char* first;
  int64_t stride, count;

  template <int WRITE>
  __attribute__((always_inline)) void ask(int64_t j) const {
    if (j / SQUARE < count) __builtin_prefetch(first + j / SQUARE * stride, WRITE, 3);
  }
};

// What crosses to and from memory while the exponentials of a tile are worked out, one line at a time: met in one
// burst, as the weight stage would, memory could not follow. Asked for: the weights of the tile after this (w) and,
// where the gradient stays in the caches, the lines it will fill (dw). Sent off: `count` elements of the gradient of
// the tile before (from), past the caches (to). The same for the mirrored entries, which come a
// line a row. Null where there is nothing to do.
template <typename T>
struct Traffic {
  const char *w, *dw;
  int64_t bytes;  // a weight
  Lines mirrored, mirrored_dw;
  const T* from;
  T* to;
  int64_t count;

  __attribute__((always_inline)) void at(int64_t j) const {
    if (w) __builtin_prefetch(w + j * bytes, 0, 3);
    if (dw) __builtin_prefetch(dw + j * bytes, 1, 3);
    mirrored.ask<0>(j);
    mirrored_dw.ask<1>(j);
    if (j < count) stream_pack(to + j, load_pack<V<T>>(from + j));
  }
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

template <typename T, bool GRADS>
inline void inhibitor_stage(const PenaltyProblem<T>& p, int64_t n, const Tile<T>& tile, const Traffic<T>& traffic) {
  const AnyInhibitor<T>& any = tile.inhibitor;
  switch (p.inhibitor) {
    case DIFFERENCE_OF_GAUSSIANS: return inhibitor_loop<T, GRADS>(any.difference_of_gaussians, n, tile, traffic);
    case DIFFUSION:
      if (p.inhibitor_parameters[1] == 2) return inhibitor_loop<T, GRADS>(any.diffusion_2, n, tile, traffic);
      if (p.inhibitor_parameters[1] == 1) return inhibitor_loop<T, GRADS>(any.diffusion_1, n, tile, traffic);
      return inhibitor_loop<T, GRADS>(any.diffusion, n, tile, traffic);
    case SINUSOID: return inhibitor_loop<T, GRADS>(any.sinusoid, n, tile, traffic);
    case RICKER: return inhibitor_loop<T, GRADS>(any.ricker, n, tile, traffic);
    case CONSTANT: return inhibitor_loop<T, GRADS>(any.constant, n, tile, traffic);
    default: return inhibitor_loop<T, GRADS>(any.tabulated, n, tile, traffic);
  }
}

}  // namespace moduli::MODULI_NAMESPACE
