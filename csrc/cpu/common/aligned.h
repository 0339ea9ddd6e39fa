// Scratch memory that begins at a line of the cache. It isn't initialized.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "cpu/common/huge_pages.h"

namespace moduli {
namespace {

constexpr std::size_t LINE = 64;

// The blocks of memory that a thread gave back last, kept for its next call. Memory from the system comes as pages that
// must first be mapped, and a step of a small net would take hundreds of them.
class Spare {
 public:
  Spare() = default;
  Spare(const Spare&) = delete;
  Spare& operator=(const Spare&) = delete;
  ~Spare() {
    while (count_) release_oldest();
  }

  // The method returns a block of at least `bytes` bytes, and its size.
  std::pair<void*, std::size_t> take(std::size_t bytes) {
    for (Block* block = blocks_; block != blocks_ + count_; ++block)
      if (block->size >= bytes && block->size / 2 <= bytes) {
        const Block found = *block;
        remove(block);
        return {found.memory, found.size};
      }
    void* memory = ::operator new(bytes, std::align_val_t{LINE});
    ask_for_huge_pages(memory, bytes);
    return {memory, bytes};
  }

  void give(void* memory, std::size_t size) {
    if (poison()) std::memset(memory, 0x7f, size);
    if (size > MOST_BYTES || !KEEP) return release(memory);
    while (count_ == MOST_BLOCKS || kept_ + size > MOST_BYTES) release_oldest();
    blocks_[count_++] = {memory, size};
    kept_ += size;
  }

 private:
  struct Block {
    void* memory;
    std::size_t size;
  };
  static constexpr std::size_t MOST_BYTES = std::size_t{8} << 20;
  static constexpr int MOST_BLOCKS = 16;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr bool KEEP = false;  // so that the sanitizer sees the end of each use
#else
  static constexpr bool KEEP = true;
#endif
  // Tests ask for poison, which shows whether a result depends on memory that was never written.
  static bool poison() {
    static const bool asked = std::getenv("MODULI_KERNELS_POISON") != nullptr;
    return asked;
  }
  static void release(void* memory) { ::operator delete(memory, std::align_val_t{LINE}); }
  void remove(Block* block) {
    kept_ -= block->size;
    std::copy(block + 1, blocks_ + count_--, block);
  }
  void release_oldest() {
    release(blocks_[0].memory);
    remove(blocks_);
  }

  Block blocks_[MOST_BLOCKS];  // the oldest comes first
  int count_ = 0;
  std::size_t kept_ = 0;  // bytes of all blocks
};

// An array of `size` elements in such memory.
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
