// Launching: the device of the call made current, the grid's limits, the check after every launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace bidfmkd {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kEveryLane = 0xFFFFFFFFu;

inline void check(cudaError_t status, const char* op) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(status));
}

class DeviceGuard {
 public:
  DeviceGuard(const char* op, int device) {
    check(cudaGetDevice(&before_), op);
    if (device == before_) return;
    check(cudaSetDevice(device), op);
    moved_ = true;
  }
  ~DeviceGuard() {
    if (moved_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool moved_ = false;
};

struct Grid {
  std::int64_t blocks;
  dim3 threads;
  unsigned rows = 1;
};

template <class... Wanted, class... Given>
void launch(const char* op, const Queue& queue, void (*kernel)(Wanted...), const Grid& grid, Given... given) {
  if (grid.blocks == 0) return;
  if (grid.blocks > 0x7FFFFFFF) throw std::runtime_error(std::string(op) + ": too many elements for one call on a GPU");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks), grid.rows);
  config.blockDim = grid.threads;
  config.stream = static_cast<cudaStream_t>(queue.stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Wanted>(given)...), op);
}

inline std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline unsigned whole_warps(std::int64_t threads) { return static_cast<unsigned>(ceil_divide(threads, kWarp)) * kWarp; }

inline bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

}  // namespace cuda
}  // namespace bidfmkd
