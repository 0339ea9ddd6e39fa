// Memory that begins at a line of the cache, with whatever lay there.
#pragma once

#include <cstdint>
#include <memory>

namespace moduli {
namespace {

template <typename T>
class Aligned {
 public:
  explicit Aligned(int64_t size) : memory_(new T[size + LINE / sizeof(T)]) {
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + LINE - 1) / LINE * LINE);
  }
  T* data() const { return data_; }

 private:
  static constexpr uintptr_t LINE = 64;
  std::unique_ptr<T[]> memory_;
  T* data_;
};

}  // namespace
}  // namespace moduli
