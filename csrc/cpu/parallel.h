// One parallel region per call: the caller's thread and n_threads - 1 more, each on one contiguous range, then a join.
// No pool: it would spin beside torch's, and starting a thread costs 20 us against the milliseconds of a call.
#pragma once

#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace bidfmkd {

template <class Function>
void parallel_ranges(std::int64_t n_items, int n_threads, const Function& function) {
  const std::int64_t n_parts = n_threads < n_items ? n_threads : n_items;
  if (n_parts <= 1) {
    if (n_items > 0) function(std::int64_t{0}, n_items);
    return;
  }
  std::vector<std::thread> threads;
  threads.reserve(static_cast<std::size_t>(n_parts - 1));
  for (std::int64_t part = 1; part < n_parts; ++part) {
    const auto run = [&function, n_items, n_parts, part] {
      function(n_items * part / n_parts, n_items * (part + 1) / n_parts);
    };
    try {
      threads.emplace_back(run);
    } catch (const std::system_error&) {  // no more threads to be had: the work is done here instead
      run();
    }
  }
  function(std::int64_t{0}, n_items / n_parts);
  for (auto& thread : threads) thread.join();
}

}  // namespace bidfmkd
