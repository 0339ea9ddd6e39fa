// Work on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

namespace moduli {
namespace {

// run(task) for tasks 0 .. count, each handed out as a thread comes free: one that is held up takes fewer.
template <typename Run>
void each_task(int64_t count, Run run) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < count; task = next++) run(task);
  });
}

}  // namespace
}  // namespace moduli
