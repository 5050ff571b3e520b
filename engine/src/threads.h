#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace lowbit {

// A few threads that wait for work. The caller of `run` works too, and takes all items itself when no helper comes.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(helpers_.size()) + 1; }

  // Calls work(item, thread) once for each item in 0..items-1, in any order; thread is in 0..size()-1. `work` must not
  // throw.
  template <class Work>
  void run(size_t items, const Work& work) {
    if (helpers_.empty() || items < 2) {
      for (size_t item = 0; item < items; ++item) work(item, 0);
      return;
    }
    run_job(
        {items, &work, [](const void* w, size_t item, int thread) { (*static_cast<const Work*>(w))(item, thread); }});
  }

 private:
  struct Job {
    size_t items = 0;
    const void* work = nullptr;
    void (*call)(const void*, size_t, int) = nullptr;
  };

  void run_job(const Job& job);
  void take_items(const Job& job, int thread);
  void help(int thread);

  std::vector<std::thread> helpers_;
  std::mutex mutex_;
  Job job_;                              // guarded by mutex_
  bool open_ = false, stop_ = false;     // guarded by mutex_
  std::atomic<uint32_t> generation_{0};  // changes with every job: helpers wait for that
  std::atomic<size_t> next_{0};          // first item that nobody has taken
  std::atomic<int> busy_{0};             // helpers inside the current job
};

}  // namespace lowbit
