// Runs one parallel region per call: the caller's thread and n_threads - 1 others claim contiguous
// ranges of the work until none is left.
//
// There is no thread pool: its threads would spin beside torch's, and starting a thread costs about
// 20 us against the milliseconds of a call. Worker threads may start late because torch's OpenMP
// threads still spin on the core. Work is claimed range by range, so a late worker does nothing,
// and the caller returns once all ranges are done.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

namespace bidfmkd {

// The state shared by the threads of one call. The last thread to end frees it.
class Ranges {
 public:
  Ranges(std::int64_t n_items, std::int64_t n_ranges) : n_items_(n_items), n_ranges_(n_ranges) {}

  // Call function(first, last) for ranges that no other thread has claimed. The caller's `function`
  // object is gone once wait() has returned, so a late thread must not touch it: it is used only
  // after a range has been claimed.
  template <class Function>
  void work(const Function* function) {
    for (;;) {
      std::int64_t range;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (taken_ == n_ranges_) return;
        range = taken_++;
      }
      std::exception_ptr error;
      try {
        (*function)(n_items_* range / n_ranges_, n_items_ * (range + 1) / n_ranges_);
      } catch (...) {
        error = std::current_exception();
      }
      const std::lock_guard<std::mutex> lock(mutex_);
      if (error && !error_) error_ = error;
      if (++done_ == n_ranges_) all_done_.notify_one();
    }
  }

  // Wait until all ranges are done; rethrow the first exception that one of them has thrown.
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_ == n_ranges_; });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  const std::int64_t n_items_, n_ranges_;
  std::mutex mutex_;  // guards the members below
  std::condition_variable all_done_;
  std::int64_t taken_ = 0, done_ = 0;
  std::exception_ptr error_;
};

template <class Function>
void parallel_ranges(std::int64_t n_items, int n_threads, const Function& function) {
  constexpr std::int64_t kRangesPerThread =
      4;  // small enough for the others to do a late thread's part
  if (n_threads <= 1 || n_items <= 1) {
    if (n_items > 0) function(std::int64_t{0}, n_items);
    return;
  }
  const std::int64_t most = kRangesPerThread * n_threads;
  const auto ranges = std::make_shared<Ranges>(n_items, most < n_items ? most : n_items);
  for (int i = 1; i < n_threads; ++i) {
    try {
      std::thread([ranges, one = &function] { ranges->work(one); }).detach();
    } catch (const std::exception&) {  // no thread or memory to be had: the existing threads do all
      break;
    }
  }
  ranges->work(&function);
  ranges->wait();
}

}  // namespace bidfmkd
