// Tensors as ops get them, through LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/common/huge_pages.h"

namespace moduli {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}
template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// A tensor for a result, whose elements have no value yet.
inline Tensor new_result(const std::vector<int64_t>& sizes, ScalarType type) {
  Tensor result = torch::stable::empty(sizes, type);
  ask_for_huge_pages(result.mutable_data_ptr(), static_cast<std::size_t>(result.numel() * result.element_size()));
  return result;
}

}  // namespace
}  // namespace moduli
