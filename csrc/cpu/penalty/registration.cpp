// Registration of the CPU penalty. The ops unpack tensors, prepare points, run the tasks on torch's threads and add
// their parts in fixed order. Schemas and contracts stand in moduli_kernels/ops/penalty.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common/aligned.h"
#include "cpu/common/dispatch.h"
#include "cpu/common/tasks.h"
#include "cpu/common/tensors.h"
#include "cpu/penalty/points.h"

namespace moduli {
namespace {

// From this size on, a gradient would only push other data out of the caches on its way.
constexpr int64_t STREAM_BYTES = int64_t{1} << 24;

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

// Row chunks of at least 144 rows keep all parts of the points under 1 % x coordinates of the weight, and a multiple of
// 4 chunks can be shared out evenly. If rows are few, column chunks give the threads something to do.
TaskGrid task_grid(int64_t rows, int64_t columns) {
  const int64_t most = std::min<int64_t>(rows / 144, 128);
  const int64_t row_chunks = most >= 4 ? most / 4 * 4 : floor_power_of_two(most);
  const int64_t column_chunks =
      row_chunks >= 8 ? 1 : floor_power_of_two(std::min<int64_t>(columns / tile_width(columns), 8 / row_chunks));
  return {row_chunks, column_chunks};
}

// The bands of a mirrored matrix have 192 rows on average, to limit the memory for their parts of the points. Their
// number is a multiple of 4 in a large matrix; in a small one there are enough for the threads to share.
TaskGrid band_grid(int64_t size) {
  const int64_t least = size < 128 ? 1 : size < 384 ? 2 : 4;
  return {std::max(least, std::min<int64_t>(size / 192 / 4 * 4, 128)), 1};
}

// Whether a square matrix over one set of points is computed as a mirrored problem. Mirrored entries come and go a line
// at a time. That slows down a problem which memory limits anyway, that is a gradient too large for the caches which is
// added to, or which comes with few flat coordinates and no gradient of the points.
template <typename T>
bool worth_mirroring(const PenaltyProblem<T>& p, const Factors& factors, bool past_caches) {
  const bool cheap = p.factor_count == 1 && factors.flat && p.coordinates <= 2;
  const bool memory_bound = past_caches && p.dweight && (p.accumulate || (cheap && !p.need_points));
  return p.blocks == 1 && p.inner == 1 && !p.mask && !p.crow && !p.constant_inhibitor && !memory_bound;
}

// The arguments that all ops share; moduli_kernels/ops/penalty.py describes them.
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

// The points of both sides, which are the same if cols isn't given, and the problem over them.
template <typename T>
struct Prepared {
  Factors factors;
  Points<T> row_points;
  std::optional<Points<T>> own_columns;
  PenaltyProblem<T> p{};

  explicit Prepared(const Arguments& a) : factors(a.factors, a.factor_parameters), row_points(a.rows, factors) {
    if (a.cols) own_columns.emplace(*a.cols, factors);
    p.weight = a.weight.const_data_ptr();
    p.weight_type = weight_type(a.weight);
    p.weight_size = static_cast<int64_t>(a.weight.element_size());
    p.mask = data_or_null<uint8_t>(a.mask);
    p.crow = data_or_null<int64_t>(a.crow);
    p.col = data_or_null<int64_t>(a.col);
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
    p.factors = factors.factors.data();
    p.factor_count = static_cast<int64_t>(factors.factors.size());
    p.opposite = factors.opposite.get();
    p.plane = p.blocks == 1 && p.factor_count == 1 && factors.flat && p.coordinates == 2;
    set_inhibitor(a);
    p.power = a.power;
    p.scale = a.scale;
    p.grid = p.crow ? TaskGrid{task_grid(p.rows, p.columns).row_chunks, 1} : task_grid(p.rows, p.columns);
    p.tile = std::max<int64_t>(tile_width(p.columns), p.mask ? MASK_STEP : 0);  // room for the entries of a whole step
  }
  const Points<T>& columns() const { return own_columns ? *own_columns : row_points; }

 private:
  void set_inhibitor(const Arguments& a) {
    p.inhibitor = a.inhibitor;
    p.inhibitor_arguments = {.parameters = a.inhibitor_parameters.data(),
                             .table = data_or_null<T>(a.table),
                             .samples = a.table ? a.table->size(0) : 0};
    const auto has_code = [&](auto type) { return decltype(type)::Member::CODE == a.inhibitor; };
    const bool known = portable::with_first(portable::Inhibitors<T>(), has_code, [&](auto type) {
      using Inhibitor = typename decltype(type)::Member;
      const size_t count = std::size(Inhibitor::PARAMETERS), got = a.inhibitor_parameters.size();
      STD_TORCH_CHECK(got == count, "an inhibitor of code ", a.inhibitor, " must have ", count, " parameters, got ", got,
                      ".");
      STD_TORCH_CHECK(!Inhibitor::TABULATED || a.table, "an inhibitor of code ", a.inhibitor, " needs its table.");
      p.constant_inhibitor = Inhibitor::CONSTANT;
    });
    STD_TORCH_CHECK(known, "inhibitor must be a code that the kernels know, got ", a.inhibitor, ".");
  }
};

// The function runs all tasks on torch's threads, each of which has its own scratch.
template <typename T, typename Run>
void run_tasks(const PenaltyProblem<T>& p, Run run) {
  const int64_t tasks = p.grid.row_chunks * p.grid.column_chunks;
  each_task(tasks, WORTH_SHARING, [&] { return Aligned<T>(scratch_size(p)); },
            [&](int64_t task, const Aligned<T>& scratch) { run(p, task, scratch.data()); });
}

struct Result {
  Tensor value, dweight, drows, dcols;
};

// dW is added to accumulate_into, which is contiguous and has the weight's shape. If that isn't given, dW is a new
// tensor, or empty if it isn't needed.
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
  result.dweight = new_result(
      need_weight && !accumulate_into ? std::vector<int64_t>(sizes.begin(), sizes.end()) : none, a.weight.scalar_type());
  const auto points_like = [&](const Tensor& points, bool need) {
    return torch::stable::empty(need ? std::vector<int64_t>{points.size(0), points.size(1)} : none, type);
  };
  result.drows = points_like(a.rows, need_points);
  result.dcols = points_like(a.cols ? *a.cols : a.rows, need_points && a.cols);
  p.dweight = accumulate_into ? accumulate_into->mutable_data_ptr()
              : need_weight   ? result.dweight.mutable_data_ptr()
                              : nullptr;
  p.accumulate = accumulate_into.has_value();
  p.need_points = need_points && !p.constant_inhibitor;  // its slope is 0 everywhere
  const bool past_caches = a.weight.numel() * p.weight_size >= STREAM_BYTES;
  p.stream = past_caches && need_weight && !p.accumulate && !p.mask && !p.crow && p.weight_type == WeightType::FLOAT32 &&
             p.blocks == 1 && p.inner == 1 && p.columns % MAX_LANES == 0 &&
             reinterpret_cast<uintptr_t>(p.dweight) % (MAX_LANES * sizeof(float)) == 0;
  p.mirrored = !a.cols && worth_mirroring(p, prepared.factors, past_caches);
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
  run_tasks(p, loops<T>().penalty.penalty);

  double value = 0;
  for (const double part : value_parts) value += part;
  *mutable_data<T>(result.value) = T(value * p.scale);
  if (p.need_points) {
    T* const drows = mutable_data<T>(result.drows);
    if (!p.mirrored) row_points.add_gradient(p.row_parts, p.grid.column_chunks, p.rows, p.scale, false, drows);
    T* const dcols = a.cols ? mutable_data<T>(result.dcols) : drows;
    column_points.add_gradient(p.column_parts, p.grid.row_chunks, p.column_stride, p.scale, !a.cols && !p.mirrored, dcols);
  } else if (need_points) {
    row_points.zero_gradient(mutable_data<T>(result.drows));
    if (a.cols) column_points.zero_gradient(mutable_data<T>(result.dcols));
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
  run_tasks(prepared.p, loops<T>().penalty.proximal);
}

double read_scalar(const Tensor& scalar) {
  return scalar.scalar_type() == ScalarType::Double ? *data<double>(scalar) : double(*data<float>(scalar));
}

// The boxing of an op reads its schema from the C++ signature, so that each op must list all arguments.
#define MODULI_PENALTY_ARGUMENTS                                                                                     \
  Tensor weight, Tensor rows, OptionalTensor cols, OptionalTensor mask, OptionalTensor crow, OptionalTensor col,     \
      OptionalTensor table, std::vector<int64_t> factors, std::vector<double> factor_parameters, int64_t inhibitor,  \
      std::vector<double> inhibitor_parameters, double power, int64_t blocks, double scale
#define MODULI_ARGUMENTS(factor)                                                                                    \
  Arguments {                                                                                                       \
    weight, rows, cols, mask, crow, col, table, factors, factor_parameters, inhibitor, inhibitor_parameters, power, \
        blocks, scale*(factor)                                                                                      \
  }

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
    char* const first = mutable_data<char>(tensor);
    const int64_t size = static_cast<int64_t>(tensor.element_size());
    torch::stable::parallel_for(0, tensor.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
      loops<double>().penalty.scale(first + begin * size, type, end - begin, factor);
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
