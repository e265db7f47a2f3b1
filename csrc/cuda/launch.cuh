// Launches kernels: makes the call's device current, sizes the grid, and checks for errors after
// every launch.
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
constexpr unsigned kMostThreads = 1024;

// The shared memory of a block whose size is chosen at launch (Grid::shared_bytes).
#if defined(__CUDACC__)
extern __shared__ uint4 dynamic_memory[];
#endif

// Throw std::runtime_error with the op's name unless `status` is success.
inline void check(cudaError_t status, const char* op) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(status));
}

// Makes a device current for the lifetime of the object and restores the previous one.
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
  std::size_t shared_bytes = 0;  // size of dynamic_memory
};

template <class... Wanted, class... Given>
void launch(const char* op, const Queue& queue, void (*kernel)(Wanted...), const Grid& grid,
            Given... given) {
  if (grid.blocks == 0) return;
  if (grid.blocks > 0x7FFFFFFF)
    throw std::runtime_error(std::string(op) + ": too many elements for one call on a GPU");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks), grid.rows);
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(queue.stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Wanted>(given)...), op);
}

inline std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline unsigned whole_warps(std::int64_t threads) {
  return static_cast<unsigned>(ceil_divide(threads, kWarp)) * kWarp;
}

// Return a grid of as many blocks as the device can run at the same time, at most `most`.
//
// Kernels that copy a table into shared memory use such a persistent grid: each block copies the
// table once and then works through its share, instead of copying it anew for every piece.
template <class... Wanted>
Grid resident_grid(const char* op, void (*kernel)(Wanted...), std::int64_t most, unsigned threads,
                   std::size_t shared_bytes) {
  int device = 0, processors = 0, blocks = 0;
  check(cudaGetDevice(&device), op);
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), op);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)),
        op);
  // Ask for the largest shared-memory carve-out: the occupancy computed below assumes it.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared),
        op);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, static_cast<int>(threads),
                                                      shared_bytes),
        op);
  const std::int64_t resident = static_cast<std::int64_t>(processors) * blocks;
  if (resident == 0)
    throw std::runtime_error(std::string(op) +
                             ": CUDA: a block takes more than a multiprocessor has");
  return {most < resident ? most : resident, dim3(threads), 1, shared_bytes};
}

inline bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

}  // namespace cuda
}  // namespace bidfmkd
