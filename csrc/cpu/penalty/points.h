// The points of one side of the penalty on the CPU: made ready for the loops, and their gradient put together.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "../distance.h"
#include "penalty.h"

namespace moduli {
namespace {

using torch::stable::Tensor;

// Points of one side, ready for the loops: one array a coordinate.
template <typename T>
struct Points {
  const T* raw;  // (count, coordinates)
  int64_t count, coordinates, stride;
  std::unique_ptr<T[]> ready;  // ready[c * stride + i], padded with 0 to whole packs
  std::vector<std::pair<int64_t, int64_t>> spheres;  // (first coordinate, columns)

  Points(const Tensor& points, const std::vector<int64_t>& factors, const std::vector<double>& parameters)
      : raw(static_cast<const T*>(points.const_data_ptr())), count(points.size(0)), coordinates(points.size(1)),
        stride((count + MAX_LANES - 1) / MAX_LANES * MAX_LANES),
        ready(new T[std::max<int64_t>(1, stride * coordinates)]()) {
    int64_t first = 0;
    const double* parameter = parameters.data();
    for (size_t q = 0; q + 1 < factors.size(); q += 2) {
      const int64_t kind = factors[q], k = factors[q + 1];
      if (kind == SPHERE) spheres.emplace_back(first, k);
      for (int64_t c = 0; c < k; ++c) {
        const double period = kind == FLAT ? parameter[c] : kind == KLEIN ? (c ? parameter[1] : 2 * parameter[0]) : 0;
        const portable::FlatAxis<T> axis{T(period)};
        for (int64_t i = 0; i < count; ++i) {
          const T x = raw[i * coordinates + first + c];
          ready[(first + c) * stride + i] = kind == SPHERE ? x / norm(i, first, k) : axis.reduce(x);
        }
      }
      parameter += kind == SPHERE ? 1 : kind == KLEIN ? 2 : k;
      first += k;
    }
    poison();
  }

  T norm(int64_t i, int64_t first, int64_t k) const {
    T squares = 0;
    for (int64_t c = first; c < first + k; ++c) squares += raw[i * coordinates + c] * raw[i * coordinates + c];
    return std::sqrt(squares);
  }

  void poison() {
    for (int64_t i = 0; i < count; ++i) {
      bool finite = true;
      for (int64_t c = 0; c < coordinates; ++c) finite = finite && std::isfinite(raw[i * coordinates + c]);
      if (!finite)
        for (int64_t c = 0; c < coordinates; ++c) ready[c * stride + i] = std::numeric_limits<T>::quiet_NaN();
    }
  }

  // 0, and NaN for points that are not finite.
  void zero_gradient(T* to) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < coordinates; ++c) {
        const T x = ready[c * stride + i];
        to[i * coordinates + c] = x == x ? T(0) : x;
      }
  }

  // to (count, coordinates) (+)= 2 scale * the sum of `chunks` parts (chunk, coordinate, part_stride), on each sphere
  // projected on the tangent space and divided by |x|.
  void add_gradient(const T* parts, int64_t chunks, int64_t part_stride, double scale, bool add, T* to) const {
    const int64_t additions = std::max<int64_t>(1, chunks * coordinates);  // a point; threads wake for many only
    torch::stable::parallel_for(0, count, std::max<int64_t>(256, (1 << 16) / additions), [&](int64_t begin, int64_t end) {
      std::vector<double> g(coordinates);
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t c = 0; c < coordinates; ++c) {
          double sum = 0;
          for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += parts[(chunk * coordinates + c) * part_stride + i];
          g[c] = 2 * scale * sum;
        }
        for (const auto& [first, k] : spheres) {
          double radial = 0;
          for (int64_t c = first; c < first + k; ++c) radial += g[c] * ready[c * stride + i];
          const double length = norm(i, first, k);
          for (int64_t c = first; c < first + k; ++c) g[c] = (g[c] - radial * ready[c * stride + i]) / length;
        }
        for (int64_t c = 0; c < coordinates; ++c) {
          T& out = to[i * coordinates + c];
          out = T(add ? out + g[c] : g[c]);
        }
      }
    });
  }
};

}  // namespace
}  // namespace moduli
