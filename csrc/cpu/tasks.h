// Work on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

namespace moduli {
namespace {

// run(task) for tasks 0 .. count, each handed out as a thread comes free: one that is held up takes fewer. work: about how
// many numbers they go through in all; few are not worth waking other threads for, which takes some microseconds.
// own(): what a thread has to itself, for run(task, own).
constexpr int64_t WORTH_SHARING = int64_t{1} << 15;
template <typename Own, typename Run>
void each_task(int64_t count, int64_t work, Own own, Run run) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, work < WORTH_SHARING ? count : 1, [&](int64_t, int64_t) {
    const auto its = own();
    for (int64_t task = next++; task < count; task = next++) run(task, its);
  });
}
template <typename Run>
void each_task(int64_t count, int64_t work, Run run) {
  each_task(count, work, [] { return 0; }, [&](int64_t task, int) { run(task); });
}

}  // namespace
}  // namespace moduli
