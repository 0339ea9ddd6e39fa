// The buffers of a tile: one row point against n column points, n at most a tile. Each stage (stage_distance.h,
// stage_inhibitor.h, stage_weight.h) is one loop over buffers in the first-level cache, so that manifolds, inhibitors
// and powers add instead of multiplying. Loops run over packs; the buffers, the points and their padding hold whole packs,
// and n is a multiple of LANES.
#pragma once

#include "../inhibitor.h"
#include "penalty.h"

namespace moduli::MODULI_NAMESPACE {

template <typename T>
using V = typename Pack<T>::V;

// The functor of a problem, made once a task: constructors divide and take roots.
template <typename T>
union AnyInhibitor {
  DifferenceOfGaussians<T> difference_of_gaussians;
  Diffusion<T, 2> diffusion_2;
  Diffusion<T, 1> diffusion_1;
  Diffusion<T, 0> diffusion;
  Sinusoid<T> sinusoid;
  RickerWavelet<T> ricker;
  Constant<T> constant;
  Tabulated<T> tabulated;

  explicit AnyInhibitor(const PenaltyProblem<T>& p) : constant(p.inhibitor_parameters) {
    const double* q = p.inhibitor_parameters;
    switch (p.inhibitor) {
      case DIFFERENCE_OF_GAUSSIANS: difference_of_gaussians = DifferenceOfGaussians<T>(q); break;
      case DIFFUSION:
        if (q[1] == 2) diffusion_2 = Diffusion<T, 2>(q);
        else if (q[1] == 1) diffusion_1 = Diffusion<T, 1>(q);
        else diffusion = Diffusion<T, 0>(q);
        break;
      case SINUSOID: sinusoid = Sinusoid<T>(q); break;
      case RICKER: ricker = RickerWavelet<T>(q); break;
      case CONSTANT: break;
      default: tabulated = Tabulated<T>(q, p.table, p.table_samples);
    }
  }
};

// Buffers of a tile, `stride` elements apart; of coordinate c at c * stride.
template <typename T>
struct Tile {
  T *s, *f, *slope, *t, *w, *dw, *minus, *plus;
  T *g, *g_column;  // (1/2) ds/dx and, where it is not -g (the Klein bottle's second coordinate), (1/2) ds/dy

  int64_t stride;
  AnyInhibitor<T> inhibitor;

  Tile(T* scratch, const PenaltyProblem<T>& p) : Tile(scratch, p, p.coordinates, p.tile) {}

 private:
  Tile(T* scratch, const PenaltyProblem<T>& p, int64_t k, int64_t width)
      : s(scratch), f(s + buffer_stride(width)), slope(f + buffer_stride(width)), t(slope + buffer_stride(width)),
        w(t + buffer_stride(width)), dw(w + buffer_stride(width)), minus(dw + buffer_stride(width)),
        plus(minus + buffer_stride(width)), g(plus + buffer_stride(width)), g_column(g + k * buffer_stride(width)),
        stride(buffer_stride(width)), inhibitor(p) {}
};

}  // namespace moduli::MODULI_NAMESPACE
