// Work shared out on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace moduli {
namespace {

// Work counts roughly how many numbers are read or written. Less than this isn't worth waking other threads for, which
// takes some microseconds.
constexpr int64_t WORTH_SHARING = int64_t{1} << 15;

// The number of threads for `count` tasks of `work` in all.
inline int64_t threads_for(int64_t count, int64_t work) {
  return work < WORTH_SHARING ? std::min<int64_t>(count, 1) : std::min<int64_t>(count, torch::stable::get_num_threads());
}

// The function calls body(k) on each of `threads` threads, where k is the number of the thread.
template <typename Body>
void on_threads(int64_t threads, Body body) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) { body(begin); });
}

// The function calls run(task, own) for tasks 0 .. count, where `own` is what own() made for the calling thread alone.
// A thread begins with its share of the tasks, the same share at each call, since what it wrote before is in its own
// cache. Then it takes tasks that other threads have not reached.
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

// The function calls run(step, group, task) for tasks 0 .. count of each group, one step after the other. A step begins
// when all tasks of its group have ended the step before. Threads are woken once, not at each step, and watch each
// other, which takes a tenth of a microsecond. Tasks are taken in order, each after all those that it waits for, so
// that no number of threads can end up waiting for each other in a circle.
template <typename Run>
void each_task_of_steps(int64_t steps, int64_t groups, int64_t count, int64_t work, Run run) {
  constexpr int PATIENCE = 1 << 12;  // looks until the thread lets others have the processor
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
