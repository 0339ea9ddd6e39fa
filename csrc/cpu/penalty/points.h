// The points of one side of the penalty. They are prepared for the loops, and their gradient is put together.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/common/tensors.h"
#include "cpu/penalty/problem.h"
#include "manifolds.h"

namespace moduli {
namespace {

// A manifold as an op gets it: the code and the columns of each factor, and the parameters of all factors in turn.
struct Factors {
  std::vector<Factor> factors;
  std::unique_ptr<bool[]> opposite;  // (coordinates), see PenaltyProblem
  int64_t coordinates = 0;
  bool flat = true;  // no factor is curved, and all coordinates are opposite

  Factors(const std::vector<int64_t>& codes_and_columns, const std::vector<double>& parameters) {
    const size_t numbers = codes_and_columns.size();
    size_t used = 0;
    for (size_t q = 0; q + 1 < numbers; q += 2) {
      factors.push_back({.code = codes_and_columns[q],
                         .first = coordinates,
                         .columns = codes_and_columns[q + 1],
                         .parameters = parameters.data() + used});
      coordinates += factors.back().columns;
      used += parameter_count(factors.back());
      STD_TORCH_CHECK(used <= parameters.size(), "factor_parameters must have ", used, " numbers or more, got ",
                      parameters.size(), "; take factors and factor_parameters from one manifold.");
    }
    opposite.reset(new bool[std::max<int64_t>(1, coordinates)]);
    for (const Factor& factor : factors)
      portable::with_manifold<float>(factor.code, [&](auto type) {
        using Manifold = typename decltype(type)::Member;
        flat = flat && !Manifold::CURVED;
        for (int64_t c = 0; c < factor.columns; ++c) {
          opposite[factor.first + c] = Manifold::opposite(c);
          flat = flat && Manifold::opposite(c);
        }
      });
  }

 private:
  static size_t parameter_count(const Factor& factor) {
    int64_t count = 0;
    const bool known = portable::with_manifold<float>(factor.code, [&](auto type) {
      using Manifold = typename decltype(type)::Member;
      STD_TORCH_CHECK(Manifold::COLUMNS == 0 || Manifold::COLUMNS == factor.columns, "a factor of code ", factor.code,
                      " must have ", Manifold::COLUMNS, " columns, got ", factor.columns, ".");
      count = Manifold::parameter_count(factor.columns);
    });
    STD_TORCH_CHECK(known, "factors must hold codes of manifolds that the kernels know, got ", factor.code, ".");
    return static_cast<size_t>(count);
  }
};

template <typename T>
struct Points {
  const std::vector<Factor>& factors;
  const T* raw;  // (count, coordinates)
  int64_t count, coordinates, stride;
  std::unique_ptr<T[]> ready;  // ready[c * stride + i], see PenaltyProblem

  Points(const Tensor& points, const Factors& of)
      : factors(of.factors), raw(data<T>(points)), count(points.size(0)), coordinates(points.size(1)),
        stride((count + MAX_LANES - 1) / MAX_LANES * MAX_LANES),
        ready(new T[std::max<int64_t>(1, stride * coordinates)]()) {
    STD_TORCH_CHECK(coordinates == of.coordinates, "points must have ", of.coordinates,
                    " columns, those of all factors together, got ", coordinates, ".");
    for (const Factor& factor : factors)
      portable::with_manifold<T>(factor.code, [&](auto type) {
        const typename decltype(type)::Member manifold(factor.parameters);
        for (int64_t c = 0; c < factor.columns; ++c)
          for (int64_t i = 0; i < count; ++i)
            ready[(factor.first + c) * stride + i] = manifold.prepared(point(i, factor), factor.columns, c);
      });
    spread_non_finite();
  }

  // 0, and NaN for points that aren't finite, to (count, coordinates)
  void zero_gradient(T* to) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < coordinates; ++c) {
        const T x = ready[c * stride + i];
        to[i * coordinates + c] = x == x ? T(0) : x;
      }
  }

  // The method writes the gradient, or adds it, to `to` (count, coordinates). The gradient is 2 scale times the sum of
  // `chunks` parts (chunk, coordinate, part_stride), which each curved factor finishes.
  void add_gradient(const T* parts, int64_t chunks, int64_t part_stride, double scale, bool add, T* to) const {
    const int64_t additions = std::max<int64_t>(1, chunks * coordinates);  // of a point; few aren't worth more threads
    torch::stable::parallel_for(0, count, std::max<int64_t>(256, (1 << 16) / additions), [&](int64_t begin, int64_t end) {
      std::vector<double> g(coordinates);
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t c = 0; c < coordinates; ++c) {
          double sum = 0;
          for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += parts[(chunk * coordinates + c) * part_stride + i];
          g[c] = 2 * scale * sum;
        }
        for (const Factor& factor : factors) finish(i, factor, g.data() + factor.first);
        for (int64_t c = 0; c < coordinates; ++c) {
          T& out = to[i * coordinates + c];
          out = T(add ? out + g[c] : g[c]);
        }
      }
    });
  }

 private:
  const T* point(int64_t i, const Factor& factor) const { return raw + i * coordinates + factor.first; }

  void finish(int64_t i, const Factor& factor, double* g) const {
    portable::with_manifold<T>(factor.code, [&](auto type) {
      using Manifold = typename decltype(type)::Member;
      if constexpr (Manifold::CURVED)
        Manifold(factor.parameters)
            .finish(point(i, factor), ready.get() + factor.first * stride + i, stride, factor.columns, g);
    });
  }

  // A point with one coordinate that isn't finite becomes NaN in all of them.
  void spread_non_finite() {
    for (int64_t i = 0; i < count; ++i) {
      bool finite = true;
      for (int64_t c = 0; c < coordinates; ++c) finite = finite && std::isfinite(raw[i * coordinates + c]);
      if (!finite)
        for (int64_t c = 0; c < coordinates; ++c) ready[c * stride + i] = std::numeric_limits<T>::quiet_NaN();
    }
  }
};

}  // namespace
}  // namespace moduli
