// Registration of the CPU penalty: unpacks tensors, prepares points, runs the tasks on torch's threads and adds their
// parts in fixed order. Schemas and contracts: moduli_kernels/_library.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../inhibitor.h"
#include "aligned.h"
#include "isa.h"
#include "points.h"
#include "tasks.h"

namespace moduli {
namespace {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

// A gradient of this size would only push others out of the caches on its way.
constexpr int64_t STREAM_BYTES = int64_t{1} << 24;

struct Loops {
  RunTask<float> run_f32;
  RunTask<double> run_f64;
  RunTask<float> proximal_f32;
  RunTask<double> proximal_f64;
  Scale scale;
};

#define MODULI_LOOPS(isa) {isa::run_task_f32, isa::run_task_f64, isa::proximal_task_f32, isa::proximal_task_f64, isa::scale}

Loops pick_loops() {
  switch (pick_isa()) {
#if MODULI_KERNELS_X86
    case Isa::AVX512: return MODULI_LOOPS(avx512);
    case Isa::AVX2: return MODULI_LOOPS(avx2);
#endif
    default: return MODULI_LOOPS(portable);
  }
}

const Loops& loops() {
  static const Loops picked = pick_loops();
  return picked;
}

RunTask<float> run_of(float) { return loops().run_f32; }
RunTask<double> run_of(double) { return loops().run_f64; }
RunTask<float> proximal_of(float) { return loops().proximal_f32; }
RunTask<double> proximal_of(double) { return loops().proximal_f64; }

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

// Bands of a mirrored matrix: of 192 rows on average, for the memory of their parts of the points, a multiple of 4
// where they are many; at least what the threads of a small matrix can share.
TaskGrid band_grid(int64_t size) {
  const int64_t least = size < 128 ? 1 : size < 384 ? 2 : 4;
  return {std::max(least, std::min<int64_t>(size / 192 / 4 * 4, 128)), 1};
}

// Of a square matrix over one set of points. Mirrored entries come and go a line at a time, which would only slow down
// what memory limits anyway: a gradient too large for the caches that is added to, or that is all there is to do but for
// few flat coordinates.
template <typename T>
bool worth_mirroring(const PenaltyProblem<T>& p, bool past_caches) {
  const bool cheap = p.factor_count == 1 && p.factors[0] == FLAT && p.coordinates <= 2;
  const bool memory_bound = past_caches && p.dweight && (p.accumulate || (cheap && !p.need_points));
  return p.blocks == 1 && p.inner == 1 && !p.mask && !p.crow && p.inhibitor != CONSTANT && !memory_bound;
}

// What every op takes; contracts: moduli_kernels/_library.py.
struct Arguments {
  const Tensor& weight;
  const Tensor& rows;
  const OptionalTensor &cols, &mask, &crow, &col, &table;
  const std::vector<int64_t>& factors;
  const std::vector<double>& factor_parameters;
  int64_t inhibitor;
  const std::vector<double>& inhibitor_parameters;
  double power;
  int64_t blocks;
  double scale;
};

// The points of both sides, which are the same where cols is not given, and the problem over them.
template <typename T>
struct Prepared {
  Points<T> row_points;
  std::optional<Points<T>> own_columns;
  PenaltyProblem<T> p{};

  explicit Prepared(const Arguments& a) : row_points(a.rows, a.factors, a.factor_parameters) {
    if (a.cols) own_columns.emplace(*a.cols, a.factors, a.factor_parameters);
    p.weight = a.weight.const_data_ptr();
    p.weight_type = weight_type(a.weight);
    p.weight_size = static_cast<int64_t>(a.weight.element_size());
    p.mask = a.mask ? static_cast<const uint8_t*>(a.mask->const_data_ptr()) : nullptr;
    p.crow = a.crow ? static_cast<const int64_t*>(a.crow->const_data_ptr()) : nullptr;
    p.col = a.col ? static_cast<const int64_t*>(a.col->const_data_ptr()) : nullptr;
    p.rows = row_points.count;
    p.columns = columns().count;
    p.blocks = a.blocks;
    p.inner = 1;
    for (int64_t d = 2; d < a.weight.dim(); ++d) p.inner *= a.weight.size(d);
    p.row_stride = a.weight.stride(0);
    p.row_points = row_points.ready.get();
    p.column_points = columns().ready.get();
    p.coordinates = row_points.coordinates;
    p.row_point_stride = row_points.stride;
    p.column_stride = columns().stride;
    p.factors = a.factors.data();
    p.factor_count = static_cast<int64_t>(a.factors.size() / 2);
    p.factor_parameters = a.factor_parameters.data();
    p.inhibitor = a.inhibitor;
    p.inhibitor_parameters = a.inhibitor_parameters.data();
    p.table = a.table ? static_cast<const T*>(a.table->const_data_ptr()) : nullptr;
    p.table_samples = a.table ? a.table->size(0) : 0;
    p.power = a.power;
    p.scale = a.scale;
    p.grid = p.crow ? TaskGrid{task_grid(p.rows, p.columns).row_chunks, 1} : task_grid(p.rows, p.columns);
    p.tile = std::max<int64_t>(tile_width(p.columns), p.mask ? MASK_STEP : 0);  // a masked tile takes a whole step
  }
  const Points<T>& columns() const { return own_columns ? *own_columns : row_points; }
};

// All tasks on torch's threads, each with scratch of its own.
template <typename T>
void run_tasks(const PenaltyProblem<T>& p, RunTask<T> run) {
  const int64_t tasks = p.grid.row_chunks * p.grid.column_chunks;
  each_task(tasks, WORTH_SHARING, [&] { return Aligned<T>(scratch_size(p)); },
            [&](int64_t task, const Aligned<T>& scratch) { run(p, task, scratch.data()); });
}

struct Result {
  Tensor value, dweight, drows, dcols;
};

// accumulate_into: memory like the weight, contiguous, to which dW is added; else dW is new, if needed.
template <typename T>
Result compute(const Arguments& a, bool need_weight, bool need_points, const OptionalTensor& accumulate_into) {
  const auto type = a.rows.scalar_type();
  Prepared<T> prepared(a);
  const Points<T>&row_points = prepared.row_points, &column_points = prepared.columns();
  PenaltyProblem<T>& p = prepared.p;

  const std::vector<int64_t> none{0};
  Result result;
  result.value = torch::stable::empty({}, type);
  const auto sizes = a.weight.sizes();
  result.dweight = torch::stable::empty(
      need_weight && !accumulate_into ? std::vector<int64_t>(sizes.begin(), sizes.end()) : none, a.weight.scalar_type());
  const auto points_like = [&](const Tensor& points, bool need) {
    return torch::stable::empty(need ? std::vector<int64_t>{points.size(0), points.size(1)} : none, type);
  };
  result.drows = points_like(a.rows, need_points);
  result.dcols = points_like(a.cols ? *a.cols : a.rows, need_points && a.cols);
  p.dweight = accumulate_into ? accumulate_into->mutable_data_ptr() : need_weight ? result.dweight.mutable_data_ptr() : nullptr;
  p.accumulate = accumulate_into.has_value();
  p.need_points = need_points && p.inhibitor != CONSTANT;  // its slope is 0 everywhere
  const bool past_caches = a.weight.numel() * p.weight_size >= STREAM_BYTES;
  p.stream = past_caches && need_weight && !p.accumulate && !p.mask && !p.crow && p.weight_type == WeightType::FLOAT32 &&
             p.blocks == 1 && p.inner == 1 && p.columns % MAX_LANES == 0 &&
             reinterpret_cast<uintptr_t>(p.dweight) % (MAX_LANES * sizeof(float)) == 0;
  p.mirrored = !a.cols && worth_mirroring(p, past_caches);
  if (p.mirrored) {
    p.grid = band_grid(p.rows);
    p.tile = mirrored_tile_width(p.rows, p.stream);
  }

  std::vector<double> value_parts(p.grid.row_chunks * p.grid.column_chunks);
  p.value_parts = value_parts.data();
  std::unique_ptr<T[]> row_parts, column_parts;
  if (p.need_points) {
    if (!p.mirrored) row_parts.reset(new T[std::max<int64_t>(1, p.grid.column_chunks * p.coordinates * p.rows)]);
    column_parts.reset(new T[std::max<int64_t>(1, p.grid.row_chunks * p.coordinates * p.column_stride)]);
  }
  p.row_parts = row_parts.get();
  p.column_parts = column_parts.get();
  run_tasks(p, run_of(T()));

  double value = 0;
  for (const double part : value_parts) value += part;
  *static_cast<T*>(result.value.mutable_data_ptr()) = T(value * p.scale);
  if (p.need_points) {
    auto drows = static_cast<T*>(result.drows.mutable_data_ptr());
    if (!p.mirrored) row_points.add_gradient(p.row_parts, p.grid.column_chunks, p.rows, p.scale, false, drows);
    auto dcols = a.cols ? static_cast<T*>(result.dcols.mutable_data_ptr()) : drows;
    column_points.add_gradient(p.column_parts, p.grid.row_chunks, p.column_stride, p.scale, !a.cols && !p.mirrored, dcols);
  } else if (need_points) {
    row_points.zero_gradient(static_cast<T*>(result.drows.mutable_data_ptr()));
    if (a.cols) column_points.zero_gradient(static_cast<T*>(result.dcols.mutable_data_ptr()));
  }
  return result;
}

Result dispatch(const Arguments& a, bool need_weight, bool need_points, const OptionalTensor& accumulate_into = {}) {
  const auto run = a.weight.scalar_type() == ScalarType::Double ? compute<double> : compute<float>;
  return run(a, need_weight, need_points, accumulate_into);
}

template <typename T>
void proximal(const Arguments& a, Tensor& weight) {
  Prepared<T> prepared(a);
  prepared.p.dweight = weight.mutable_data_ptr();
  prepared.p.grid.column_chunks = 1;
  run_tasks(prepared.p, proximal_of(T()));
}

double read_scalar(const Tensor& scalar) {
  const void* data = scalar.const_data_ptr();
  return scalar.scalar_type() == ScalarType::Double ? *static_cast<const double*>(data)
                                                    : double(*static_cast<const float*>(data));
}

#define MODULI_PENALTY_ARGUMENTS                                                                                     \
  Tensor weight, Tensor rows, OptionalTensor cols, OptionalTensor mask, OptionalTensor crow, OptionalTensor col,     \
      OptionalTensor table, std::vector<int64_t> factors, std::vector<double> factor_parameters, int64_t inhibitor,  \
      std::vector<double> inhibitor_parameters, double power, int64_t blocks, double scale
#define MODULI_ARGUMENTS(factor)                                                                          \
  Arguments{weight, rows, cols, mask, crow, col, table, factors, factor_parameters, inhibitor, inhibitor_parameters, \
            power, blocks, scale * (factor)}

Tensor penalty(MODULI_PENALTY_ARGUMENTS) { return dispatch(MODULI_ARGUMENTS(1), false, false).value; }

std::tuple<Tensor, Tensor, Tensor, Tensor> penalty_with_grads(MODULI_PENALTY_ARGUMENTS, bool need_weight,
                                                              bool need_points) {
  auto r = dispatch(MODULI_ARGUMENTS(1), need_weight, need_points);
  return {r.value, r.dweight, r.drows, r.dcols};
}

std::tuple<Tensor, Tensor, Tensor> penalty_grads(Tensor grad, MODULI_PENALTY_ARGUMENTS, bool need_weight,
                                                 bool need_points) {
  auto r = dispatch(MODULI_ARGUMENTS(read_scalar(grad)), need_weight, need_points);
  return {r.dweight, r.drows, r.dcols};
}

std::tuple<Tensor, Tensor, Tensor> accumulate_penalty_grad_(Tensor dweight, MODULI_PENALTY_ARGUMENTS, bool need_points) {
  auto r = dispatch(MODULI_ARGUMENTS(1), true, need_points, dweight);
  return {r.value, r.drows, r.dcols};
}

void proximal_step_(MODULI_PENALTY_ARGUMENTS, double step) {
  const auto run = weight.scalar_type() == ScalarType::Double ? proximal<double> : proximal<float>;
  run(MODULI_ARGUMENTS(step), weight);
}

void scale_grads_(std::vector<Tensor> grads, Tensor grad) {
  const double factor = read_scalar(grad);
  if (factor == 1) return;
  for (const Tensor& tensor : grads) {
    const auto type = weight_type(tensor);
    auto data = static_cast<char*>(tensor.mutable_data_ptr());
    const int64_t size = static_cast<int64_t>(tensor.element_size());
    torch::stable::parallel_for(0, tensor.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
      loops().scale(data + begin * size, type, end - begin, factor);
    });
  }
}

}  // namespace
}  // namespace moduli

STABLE_TORCH_LIBRARY_IMPL(moduli_kernels, CPU, m) {
  m.impl("penalty", TORCH_BOX(&moduli::penalty));
  m.impl("penalty_with_grads", TORCH_BOX(&moduli::penalty_with_grads));
  m.impl("penalty_grads", TORCH_BOX(&moduli::penalty_grads));
  m.impl("accumulate_penalty_grad_", TORCH_BOX(&moduli::accumulate_penalty_grad_));
  m.impl("proximal_step_", TORCH_BOX(&moduli::proximal_step_));
  m.impl("scale_grads_", TORCH_BOX(&moduli::scale_grads_));
}
