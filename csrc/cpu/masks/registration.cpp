// Registration of the ops on masked entries. They share the entries out on torch's threads. Schemas and contracts stand
// in moduli_kernels/ops/masked_entries.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>

#include "cpu/common/dispatch.h"
#include "cpu/common/tasks.h"
#include "cpu/common/tensors.h"

namespace moduli {
namespace {

constexpr int64_t TASK = int64_t{1} << 16;  // entries of a task

// The function calls run(loops, bits of the weight, mask, count) for parts of the weight, each part on one thread, and
// returns as a 0-d bool tensor whether one of the calls returned true.
template <typename Bits, typename Run>
Tensor any_of_parts(const Tensor& weight, const Tensor& mask, Run run) {
  std::atomic<bool> any{false};
  const auto* kept = data<uint8_t>(mask);
  const auto& loops = mask_loops<Bits>();
  const int64_t size = weight.numel();
  each_task((size + TASK - 1) / TASK, size, [&](int64_t task) {
    const int64_t begin = task * TASK;
    if (run(loops, begin, kept + begin, std::min(TASK, size - begin))) any.store(true, std::memory_order_relaxed);
  });
  Tensor result = torch::stable::empty({}, ScalarType::Bool);
  *mutable_data<bool>(result) = any.load();
  return result;
}

template <typename Visit>
Tensor with_bits_of(const Tensor& weight, Visit visit) {
  switch (weight.element_size()) {
    case 2: return visit(uint16_t{});
    case 4: return visit(uint32_t{});
    default: return visit(uint64_t{});
  }
}

void check(const Tensor& weight, const Tensor& mask) {
  STD_TORCH_CHECK(weight.is_contiguous() && mask.is_contiguous() && weight.numel() == mask.numel() &&
                      mask.scalar_type() == ScalarType::Bool && weight.element_size() != 1,
                  "weight and its bool mask must be contiguous and of one shape on the CPU; call .contiguous()");
}

Tensor any_masked_nonzero(Tensor weight, Tensor mask) {
  check(weight, mask);
  return with_bits_of(weight, [&](auto bits) {
    using Bits = decltype(bits);
    const auto* entries = data<Bits>(weight);
    return any_of_parts<Bits>(weight, mask, [&](const auto& loops, int64_t begin, const uint8_t* kept, int64_t count) {
      return loops.any_masked_nonzero(entries + begin, kept, count);
    });
  });
}

Tensor zero_masked_(Tensor weight, Tensor mask) {
  check(weight, mask);
  return with_bits_of(weight, [&](auto bits) {
    using Bits = decltype(bits);
    auto* entries = mutable_data<Bits>(weight);
    return any_of_parts<Bits>(weight, mask, [&](const auto& loops, int64_t begin, const uint8_t* kept, int64_t count) {
      return loops.zero_masked(entries + begin, kept, count);
    });
  });
}

}  // namespace
}  // namespace moduli

STABLE_TORCH_LIBRARY_IMPL(moduli_kernels, CPU, m) {
  m.impl("any_masked_nonzero", TORCH_BOX(&moduli::any_masked_nonzero));
  m.impl("zero_masked_", TORCH_BOX(&moduli::zero_masked_));
}
