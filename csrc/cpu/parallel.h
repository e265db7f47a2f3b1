// One parallel region per call: the caller's thread and n_threads - 1 more take contiguous ranges until none is left.
// No pool: it would spin beside torch's, and starting a thread costs 20 us against the milliseconds of a call. A thread
// that comes late, since torch's own still spin on its core, finds nothing to do; nobody waits for it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

namespace bidfmkd {

// What the threads of one call share; the last of them to end frees it.
class Ranges {
 public:
  Ranges(std::int64_t n_items, std::int64_t n_ranges) : n_items_(n_items), n_ranges_(n_ranges) {}

  // Calls function(first, last) for ranges that no other thread has taken. `function` is gone once wait() is over, so it
  // is not touched unless there is one.
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
        (*function)(n_items_ * range / n_ranges_, n_items_ * (range + 1) / n_ranges_);
      } catch (...) {
        error = std::current_exception();
      }
      const std::lock_guard<std::mutex> lock(mutex_);
      if (error && !error_) error_ = error;
      if (++done_ == n_ranges_) all_done_.notify_one();
    }
  }

  // Until all ranges are done; throws what one of them has thrown.
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_ == n_ranges_; });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  const std::int64_t n_items_, n_ranges_;
  std::mutex mutex_;  // of all below
  std::condition_variable all_done_;
  std::int64_t taken_ = 0, done_ = 0;
  std::exception_ptr error_;
};

template <class Function>
void parallel_ranges(std::int64_t n_items, int n_threads, const Function& function) {
  constexpr std::int64_t kRangesPerThread = 4;  // what a late thread leaves undone, the others share
  if (n_threads <= 1 || n_items <= 1) {
    if (n_items > 0) function(std::int64_t{0}, n_items);
    return;
  }
  const std::int64_t most = kRangesPerThread * n_threads;
  const auto ranges = std::make_shared<Ranges>(n_items, most < n_items ? most : n_items);
  for (int i = 1; i < n_threads; ++i) {
    try {
      std::thread([ranges, one = &function] { ranges->work(one); }).detach();
    } catch (const std::exception&) {  // no more threads or memory to be had: those there are do it
      break;
    }
  }
  ranges->work(&function);
  ranges->wait();
}

}  // namespace bidfmkd
