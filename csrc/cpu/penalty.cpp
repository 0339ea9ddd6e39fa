// Registration of the CPU penalty: unpacks tensors, prepares points, runs the tasks on torch's threads and adds their
// parts in fixed order. Schemas and contracts: moduli_kernels/_library.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../distance.h"
#include "../inhibitor.h"
#include "penalty.h"

namespace moduli {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A gradient of this size would only push others out of the caches on its way.
constexpr int64_t STREAM_BYTES = int64_t{1} << 24;

struct Isa {
  RunTask<float> run_f32;
  RunTask<double> run_f64;
  Scale scale;
};

// The newest instruction set that the processor has; MODULI_KERNELS_ISA (portable, avx2, avx512) asks for a lesser one,
// so that every path can be tested on one machine.
Isa pick_isa() {
  const char* asked = std::getenv("MODULI_KERNELS_ISA");
  const std::string most = asked && *asked ? asked : "avx512";
  STD_TORCH_CHECK(most == "portable" || most == "avx2" || most == "avx512",
                  "MODULI_KERNELS_ISA must be portable, avx2 or avx512, got ", most, "; unset it to let the package pick.");
#ifdef MODULI_KERNELS_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (most == "avx512" && has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return {avx512::run_task_f32, avx512::run_task_f64, avx512::scale};
  if (most != "portable" && has_avx2) return {avx2::run_task_f32, avx2::run_task_f64, avx2::scale};
#endif
  return {portable::run_task_f32, portable::run_task_f64, portable::scale};
}

const Isa& isa() {
  static const Isa picked = pick_isa();
  return picked;
}

RunTask<float> run_of(float) { return isa().run_f32; }
RunTask<double> run_of(double) { return isa().run_f64; }

WeightType weight_type(const Tensor& weight) {
  switch (weight.scalar_type()) {
    case ScalarType::Float: return WeightType::FLOAT32;
    case ScalarType::Double: return WeightType::FLOAT64;
    case ScalarType::BFloat16: return WeightType::BFLOAT16;
    case ScalarType::Half: return WeightType::FLOAT16;
    default: STD_TORCH_CHECK(false, "weight must be float32, float64, bfloat16 or float16"); return WeightType::FLOAT32;
  }
}

int64_t floor_power_of_two(int64_t n) {
  int64_t p = 1;
  while (2 * p <= n) p *= 2;
  return p;
}

// Row chunks of at least 144 rows keep all that is allocated under 1 % x coordinates of the weight; a multiple of 4
// shares out evenly. Where rows are few, column chunks give the threads something to do.
TaskGrid task_grid(int64_t rows, int64_t columns) {
  const int64_t most = std::min<int64_t>(rows / 144, 128);
  const int64_t row_chunks = most >= 4 ? most / 4 * 4 : floor_power_of_two(most);
  const int64_t column_chunks =
      row_chunks >= 8 ? 1 : floor_power_of_two(std::min<int64_t>(columns / tile_width(columns), 8 / row_chunks));
  return {row_chunks, column_chunks};
}

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
    torch::stable::parallel_for(0, count, 256, [&](int64_t begin, int64_t end) {
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

struct Settings {
  const std::vector<int64_t>& factors;
  const std::vector<double>& factor_parameters;
  int64_t inhibitor;
  const std::vector<double>& inhibitor_parameters;
  double power;
  int64_t blocks;
  double scale;
};

struct Result {
  Tensor value, dweight, drows, dcols;
};

template <typename T>
Result compute(const Tensor& weight, const Tensor& rows, const OptionalTensor& cols, const OptionalTensor& mask,
               const OptionalTensor& table, const Settings& settings, bool need_weight, bool need_points) {
  const auto type = rows.scalar_type();
  Points<T> row_points(rows, settings.factors, settings.factor_parameters);
  std::optional<Points<T>> own_columns;
  if (cols) own_columns.emplace(*cols, settings.factors, settings.factor_parameters);
  const Points<T>& column_points = cols ? *own_columns : row_points;

  PenaltyProblem<T> p{};
  p.weight = weight.const_data_ptr();
  p.weight_type = weight_type(weight);
  p.mask = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
  p.rows = row_points.count;
  p.columns = column_points.count;
  p.blocks = settings.blocks;
  p.inner = 1;
  for (int64_t d = 2; d < weight.dim(); ++d) p.inner *= weight.size(d);
  p.row_stride = weight.stride(0);
  p.weight_size = static_cast<int64_t>(weight.element_size());
  p.row_points = row_points.ready.get();
  p.column_points = column_points.ready.get();
  p.coordinates = row_points.coordinates;
  p.row_point_stride = row_points.stride;
  p.column_stride = column_points.stride;
  p.factors = settings.factors.data();
  p.factor_count = static_cast<int64_t>(settings.factors.size() / 2);
  p.factor_parameters = settings.factor_parameters.data();
  p.inhibitor = settings.inhibitor;
  p.inhibitor_parameters = settings.inhibitor_parameters.data();
  p.table = table ? static_cast<const T*>(table->const_data_ptr()) : nullptr;
  p.table_samples = table ? table->size(0) : 0;
  p.power = settings.power;
  p.scale = settings.scale;
  p.need_points = need_points && p.inhibitor != CONSTANT;  // its slope is 0 everywhere
  p.grid = task_grid(p.rows, p.columns);
  p.tile = tile_width(p.columns);


  const std::vector<int64_t> none{0};
  Result result;
  result.value = torch::stable::empty({}, type);
  const auto sizes = weight.sizes();
  result.dweight = torch::stable::empty(need_weight ? std::vector<int64_t>(sizes.begin(), sizes.end()) : none,
                                        weight.scalar_type());
  const auto points_like = [&](const Tensor& points, bool need) {
    return torch::stable::empty(need ? std::vector<int64_t>{points.size(0), points.size(1)} : none, type);
  };
  result.drows = points_like(rows, need_points);
  result.dcols = points_like(cols ? *cols : rows, need_points && cols);
  p.dweight = need_weight ? result.dweight.mutable_data_ptr() : nullptr;
  p.stream = need_weight && p.weight_type == WeightType::FLOAT32 && p.blocks == 1 && p.inner == 1 &&
             weight.numel() * p.weight_size >= STREAM_BYTES && p.columns % MAX_LANES == 0 &&
             reinterpret_cast<uintptr_t>(p.dweight) % (MAX_LANES * sizeof(float)) == 0;

  const int64_t tasks = p.grid.row_chunks * p.grid.column_chunks;
  std::vector<double> value_parts(tasks);
  p.value_parts = value_parts.data();
  std::unique_ptr<T[]> row_parts, column_parts;
  if (p.need_points) {
    row_parts.reset(new T[std::max<int64_t>(1, p.grid.column_chunks * p.coordinates * p.rows)]);
    column_parts.reset(new T[std::max<int64_t>(1, p.grid.row_chunks * p.coordinates * p.column_stride)]);
  }
  p.row_parts = row_parts.get();
  p.column_parts = column_parts.get();

  const auto run = run_of(T());
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<T[]> scratch(new T[scratch_size<T>(p.coordinates, p.tile) + MAX_LANES]);
    auto aligned = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(scratch.get()) + 63) / 64 * 64);
    for (int64_t task = begin; task < end; ++task) run(p, task, aligned);
  });

  double value = 0;
  for (const double part : value_parts) value += part;
  *static_cast<T*>(result.value.mutable_data_ptr()) = T(value * p.scale);
  if (p.need_points) {
    auto drows = static_cast<T*>(result.drows.mutable_data_ptr());
    row_points.add_gradient(p.row_parts, p.grid.column_chunks, p.rows, p.scale, false, drows);
    auto dcols = cols ? static_cast<T*>(result.dcols.mutable_data_ptr()) : drows;
    column_points.add_gradient(p.column_parts, p.grid.row_chunks, p.column_stride, p.scale, !cols, dcols);
  } else if (need_points) {
    row_points.zero_gradient(static_cast<T*>(result.drows.mutable_data_ptr()));
    if (cols) column_points.zero_gradient(static_cast<T*>(result.dcols.mutable_data_ptr()));
  }
  return result;
}

Result dispatch(const Tensor& weight, const Tensor& rows, const OptionalTensor& cols, const OptionalTensor& mask,
                const OptionalTensor& table, const Settings& settings, bool need_weight, bool need_points) {
  const auto run = weight.scalar_type() == ScalarType::Double ? compute<double> : compute<float>;
  return run(weight, rows, cols, mask, table, settings, need_weight, need_points);
}

double read_scalar(const Tensor& scalar) {
  const void* data = scalar.const_data_ptr();
  return scalar.scalar_type() == ScalarType::Double ? *static_cast<const double*>(data)
                                                    : double(*static_cast<const float*>(data));
}

#define MODULI_PENALTY_ARGUMENTS                                                                                  \
  Tensor weight, Tensor rows, OptionalTensor cols, OptionalTensor mask, OptionalTensor table,                    \
      std::vector<int64_t> factors, std::vector<double> factor_parameters, int64_t inhibitor,                    \
      std::vector<double> inhibitor_parameters, double power, int64_t blocks, double scale

Tensor penalty(MODULI_PENALTY_ARGUMENTS) {
  const Settings settings{factors, factor_parameters, inhibitor, inhibitor_parameters, power, blocks, scale};
  return dispatch(weight, rows, cols, mask, table, settings, false, false).value;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> penalty_with_grads(MODULI_PENALTY_ARGUMENTS, bool need_weight,
                                                              bool need_points) {
  const Settings settings{factors, factor_parameters, inhibitor, inhibitor_parameters, power, blocks, scale};
  auto r = dispatch(weight, rows, cols, mask, table, settings, need_weight, need_points);
  return {r.value, r.dweight, r.drows, r.dcols};
}

std::tuple<Tensor, Tensor, Tensor> penalty_grads(Tensor grad, MODULI_PENALTY_ARGUMENTS, bool need_weight,
                                                 bool need_points) {
  const Settings settings{factors,  factor_parameters, inhibitor, inhibitor_parameters,
                          power,    blocks,            scale * read_scalar(grad)};
  auto r = dispatch(weight, rows, cols, mask, table, settings, need_weight, need_points);
  return {r.dweight, r.drows, r.dcols};
}

void scale_grads_(std::vector<Tensor> grads, Tensor grad) {
  const double factor = read_scalar(grad);
  if (factor == 1) return;
  for (const Tensor& tensor : grads) {
    const auto type = weight_type(tensor);
    auto data = static_cast<char*>(tensor.mutable_data_ptr());
    const int64_t size = static_cast<int64_t>(tensor.element_size());
    torch::stable::parallel_for(0, tensor.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
      isa().scale(data + begin * size, type, end - begin, factor);
    });
  }
}

}  // namespace
}  // namespace moduli

STABLE_TORCH_LIBRARY_IMPL(moduli_kernels, CPU, m) {
  m.impl("penalty", TORCH_BOX(&moduli::penalty));
  m.impl("penalty_with_grads", TORCH_BOX(&moduli::penalty_with_grads));
  m.impl("penalty_grads", TORCH_BOX(&moduli::penalty_grads));
  m.impl("scale_grads_", TORCH_BOX(&moduli::scale_grads_));
}
