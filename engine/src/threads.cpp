#include "threads.h"

#include "float_mode.h"

namespace lowbit {
namespace {

constexpr int kSpins =
    4000;  // some tens of microseconds: longer than the gap between two ops, shorter than a wake-up costs

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  try {
    for (int thread = 1; thread < threads; ++thread) helpers_.emplace_back(&ThreadPool::help, this, thread);
  } catch (const std::exception&) {
    // There are no more threads, or no memory for them: those that started are enough, for results do not depend on
    // their number.
  }
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    ++generation_;
  }
  generation_.notify_all();
  for (auto& helper : helpers_) helper.join();
}

void ThreadPool::take_items(const Job& job, int thread) {
  for (size_t item = next_++; item < job.items; item = next_++) job.call(job.work, item, thread);
}

void ThreadPool::run_job(const Job& job) {
  {
    const std::lock_guard lock(mutex_);
    job_ = job;
    open_ = true;
    next_ = 0;
    ++generation_;
  }
  generation_.notify_all();
  take_items(job, 0);
  {
    const std::lock_guard lock(mutex_);
    open_ = false;  // from here on no helper joins, so that `job` may go out of scope once those inside have left
  }
  for (int spins = 0; busy_ != 0; ++spins) {
    if (spins < kSpins)
      pause();
    else
      std::this_thread::yield();
  }
}

void ThreadPool::help(int thread) {
  const DefaultFloatMode mode;
  uint32_t seen = 0;
  for (;;) {
    for (int spins = 0; spins < kSpins && generation_ == seen; ++spins) pause();
    generation_.wait(seen);
    Job job;
    {
      const std::lock_guard lock(mutex_);
      seen = generation_;
      if (stop_) return;
      if (!open_) continue;
      job = job_;
      ++busy_;
    }
    take_items(job, thread);
    --busy_;
  }
}

}  // namespace lowbit
