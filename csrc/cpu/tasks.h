// Work on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace moduli {
namespace {

// run(task) for tasks 0 .. count, handed out in this order as threads come free: one that is held up takes fewer. work:
// about how many numbers they go through in all; few are not worth waking other threads for, which takes some microseconds.
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

// run(step, group, task) for tasks 0 .. count of each group, step after step: one begins when all of its group have ended
// the step before. Threads are woken once, not for each step, and look out for each other, which takes a tenth of a
// microsecond. A task is taken after all those it waits for, so that it cannot wait for itself, on however many threads.
template <typename Run>
void each_task_of_steps(int64_t steps, int64_t groups, int64_t count, int64_t work, Run run) {
  constexpr int PATIENCE = 1 << 12;  // looks; then others may have the processor
  const int64_t a_step = groups * count;
  const std::unique_ptr<std::atomic<int64_t>[]> ended(new std::atomic<int64_t>[groups]());
  each_task(steps * a_step, work, [&](int64_t i) {
    const int64_t step = i / a_step, group = i % a_step / count;
    for (int looks = 0; ended[group].load(std::memory_order_acquire) < step * count; ++looks)
      if (looks > PATIENCE) std::this_thread::yield();
    run(step, group, i % count);
    ended[group].fetch_add(1, std::memory_order_release);
  });
}

}  // namespace
}  // namespace moduli
