// The buffers of a tile, which is one row point against at most PenaltyProblem::tile column points. Each stage
// (distance_stage.h, inhibitor_stage.h, weight_stage.h) is one loop over buffers in the first-level cache, so that
// manifolds, inhibitors and powers add up instead of multiplying into hundreds of loops. Loops run over packs: buffers
// and points hold whole packs, and the number of columns n that a stage gets is a multiple of LANES.
#pragma once

#include "cpu/penalty/problem.h"
#include "inhibitors.h"

namespace moduli::MODULI_NAMESPACE {

template <typename T>
using V = typename Pack<T>::V;

template <typename T>
constexpr int64_t padded(int64_t n) {
  return (n + Pack<T>::LANES - 1) / Pack<T>::LANES * Pack<T>::LANES;
}

// The inhibitor of a problem, whichever member of the list it is. It is made once a task, since constructors divide and
// take roots.
template <typename T>
class AnyInhibitor {
 public:
  explicit AnyInhibitor(const PenaltyProblem<T>& p) {
    with_inhibitor<T>(p.inhibitor, p.inhibitor_arguments.parameters, [&](auto type) {
      using Inhibitor = typename decltype(type)::Member;
      static_assert(std::is_trivially_copyable_v<Inhibitor>);
      const Inhibitor made(p.inhibitor_arguments);
      __builtin_memcpy(memory_, &made, sizeof(made));
      position_ = position_of<Inhibitor>(Inhibitors<T>());
    });
  }

  // The method calls run(inhibitor).
  template <typename Run>
  __attribute__((always_inline)) void with(const Run& run) const {
    const auto is_it = [&](auto type) {
      return position_of<typename decltype(type)::Member>(Inhibitors<T>()) == position_;
    };
    with_first(Inhibitors<T>(), is_it, [&](auto type) __attribute__((always_inline)) {
      run(*reinterpret_cast<const typename decltype(type)::Member*>(memory_));
    });
  }

 private:
  int position_ = 0;
  alignas(8) unsigned char memory_[largest_size(Inhibitors<T>())];
};

// Buffers of T, `stride` elements each. Those of coordinate c are g + c * stride and g_column + c * stride.
template <typename T>
struct Tile {
  T* s;            // squared distances
  T *f, *slope;    // the inhibitor's value and df/ds
  T* t;            // df/ds |w|^l
  T *w, *dw;       // weights and their gradients, if those in memory cannot be used in place
  T *minus, *plus; // |x - y|^2 and |x + y|^2; later f and slope of an entry that is not masked
  T* g;            // (coordinates): (1/2) ds/dx
  T* g_column;     // (coordinates): (1/2) ds/dy, written only if it isn't -g
  int64_t stride;
  AnyInhibitor<T> inhibitor;

  Tile(T* scratch, const PenaltyProblem<T>& p) : Tile(scratch, buffer_stride(p.tile), p) {}

 private:
  Tile(T* scratch, int64_t stride, const PenaltyProblem<T>& p)
      : s(scratch), f(s + stride), slope(f + stride), t(slope + stride), w(t + stride), dw(w + stride), minus(dw + stride),
        plus(minus + stride), g(plus + stride), g_column(g + p.coordinates * stride), stride(stride), inhibitor(p) {}
};

}  // namespace moduli::MODULI_NAMESPACE
