// Scratch memory that begins at a line of the cache, with whatever lay there.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

namespace moduli {
namespace {

constexpr std::size_t LINE = 64;

// What a thread gave back last, for its next call: from the system it would come as pages that are not there yet, and
// a small net's step takes hundreds of them.
class Spare {
 public:
  Spare() = default;
  Spare(const Spare&) = delete;
  Spare& operator=(const Spare&) = delete;
  ~Spare() {
    for (const Block& block : blocks_) release(block.memory);
  }

  // At least `bytes`; (memory, its size).
  std::pair<void*, std::size_t> take(std::size_t bytes) {
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block)
      if (block->size >= bytes && block->size / 2 <= bytes) {
        const Block found = *block;
        blocks_.erase(block);
        kept_ -= found.size;
        return {found.memory, found.size};
      }
    return {::operator new(bytes, std::align_val_t{LINE}), bytes};
  }

  void give(void* memory, std::size_t size) {
    if (poison()) std::memset(memory, 0x7f, size);
    while (kept_ + size > MOST_BYTES && !blocks_.empty()) {
      kept_ -= blocks_.front().size;
      release(blocks_.front().memory);
      blocks_.erase(blocks_.begin());
    }
    if (size > MOST_BYTES || !KEEP) return release(memory);
    blocks_.push_back({memory, size});
    kept_ += size;
  }

 private:
  struct Block {
    void* memory;
    std::size_t size;
  };
  static constexpr std::size_t MOST_BYTES = std::size_t{8} << 20;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr bool KEEP = false;  // the sanitizer is to see the end of each use
#else
  static constexpr bool KEEP = true;
#endif
  // Of tests: nothing may depend on what lay there.
  static bool poison() {
    static const bool asked = std::getenv("MODULI_KERNELS_POISON") != nullptr;
    return asked;
  }
  static void release(void* memory) { ::operator delete(memory, std::align_val_t{LINE}); }

  std::vector<Block> blocks_;  // the oldest first
  std::size_t kept_ = 0;
};

template <typename T>
class Aligned {
 public:
  explicit Aligned(int64_t size) {
    const auto [memory, bytes] = spare().take((static_cast<std::size_t>(size) * sizeof(T) + LINE) / LINE * LINE);
    data_ = static_cast<T*>(memory);
    bytes_ = bytes;
  }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  ~Aligned() { spare().give(data_, bytes_); }
  T* data() const { return data_; }

 private:
  static Spare& spare() {
    static thread_local Spare its;
    return its;
  }
  T* data_;
  std::size_t bytes_;
};

}  // namespace
}  // namespace moduli
