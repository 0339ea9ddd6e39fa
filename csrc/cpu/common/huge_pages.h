// Huge pages for large memory.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace moduli {
namespace {

// The function asks Linux for huge pages in memory that nobody has written yet. A result of many megabytes is new memory
// at each call, and each of its pages is mapped when it is first written, which takes longer than to write it: huge pages
// are 512 times fewer. What the system can't give is no error.
inline void ask_for_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::size_t HUGE = std::size_t{2} << 20, PAGE = std::size_t{4} << 10;
  if (bytes < 2 * HUGE) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(memory), first = (begin + PAGE - 1) / PAGE * PAGE;
  madvise(reinterpret_cast<void*>(first), (begin + bytes - first) / PAGE * PAGE, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace moduli
