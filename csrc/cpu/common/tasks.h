// Work on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace moduli {
namespace {

// body(k) on as many threads as there are, but not more than tasks; k: which of them. work: about how many numbers they go
// through in all; few are not worth waking other threads for, which takes some microseconds.
constexpr int64_t WORTH_SHARING = int64_t{1} << 15;
inline int64_t threads_for(int64_t count, int64_t work) {
  return work < WORTH_SHARING ? std::min<int64_t>(count, 1) : std::min<int64_t>(count, torch::stable::get_num_threads());
}
template <typename Body>
void on_threads(int64_t threads, Body body) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) { body(begin); });
}

// run(task) for tasks 0 .. count. A thread begins with its share of them, the same at each call, so that what it wrote is in
// its own cache; then it takes what others have not come to. own(): what a thread has to itself, for run(task, own).
template <typename Own, typename Run>
void each_task(int64_t count, int64_t work, Own own, Run run) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
  };
  const int64_t threads = threads_for(count, work);
  const std::unique_ptr<Share[]> shares(new Share[threads]);
  for (int64_t k = 0; k < threads; ++k) shares[k].next = count * k / threads;
  on_threads(threads, [&](int64_t first) {
    const auto its = own();
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t k = (first + i) % threads, end = count * (k + 1) / threads;
      for (int64_t task = shares[k].next++; task < end; task = shares[k].next++) run(task, its);
    }
  });
}
template <typename Run>
void each_task(int64_t count, int64_t work, Run run) {
  each_task(count, work, [] { return 0; }, [&](int64_t task, int) { run(task); });
}

// run(step, group, task) for tasks 0 .. count of each group, step after step: one begins when all of its group have ended
// the step before. Threads are woken once, not for each step, and look out for each other, which takes a tenth of a
// microsecond. Tasks are taken in order, each after all those it waits for, so that it cannot wait for itself, on however
// many threads.
template <typename Run>
void each_task_of_steps(int64_t steps, int64_t groups, int64_t count, int64_t work, Run run) {
  constexpr int PATIENCE = 1 << 12;  // looks; then others may have the processor
  const int64_t a_step = groups * count;
  const std::unique_ptr<std::atomic<int64_t>[]> ended(new std::atomic<int64_t>[groups]());
  std::atomic<int64_t> next{0};
  on_threads(threads_for(steps * a_step, work), [&](int64_t) {
    for (int64_t i = next++; i < steps * a_step; i = next++) {
      const int64_t step = i / a_step, group = i % a_step / count;
      for (int looks = 0; ended[group].load(std::memory_order_acquire) < step * count; ++looks)
        if (looks > PATIENCE) std::this_thread::yield();
      run(step, group, i % count);
      ended[group].fetch_add(1, std::memory_order_release);
    }
  });
}

}  // namespace
}  // namespace moduli
