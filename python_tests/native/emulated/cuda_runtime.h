// A stand-in for CUDA's own header: the .cu files compiled with it run on the CPU, one block after
// another, its threads as fibers that take turns at barriers and warp shuffles. What CUDA leaves
// undefined ends the program: a barrier or shuffle that some threads do not reach, a launch beyond
// a device's limits, and, through the compiler's sanitizers, an access out of bounds or out of
// alignment. Shared memory is full of NaN when a block starts. The device runs 6 blocks at once.
#pragma once

#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("shared_memory")))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern char __start_shared_memory[], __stop_shared_memory[];
inline uint4* dynamic_memory = nullptr;  // exactly as much as the launch asks for

namespace emulated {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s\n", what);
  std::exit(1);
}

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };
constexpr unsigned kWarp = 32;
constexpr std::size_t kStackBytes = 256 << 10;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
  State state = State::kReady;
  dim3 index;
  double exchanged;  // what this lane shows to the others of its warp
};

// One block at a time.
struct Block {
  std::vector<Fiber> fibers;  // grows to the largest block; the first n_threads are in use
  unsigned n_threads = 0, current = 0;
  std::function<void()> kernel;
  std::size_t dynamic_bytes = 0;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_size = 0;
  unsigned seed = 0;  // threads run in their order, or, from 1 on, in a shuffled one
};
inline Block block;

inline void leave(State state) {
  Fiber& fiber = block.fibers[block.current];
  fiber.state = state;
  __sanitizer_start_switch_fiber(state == State::kDone ? nullptr : &fiber.fake_stack,
                                 block.scheduler_stack, block.scheduler_stack_size);
  swapcontext(&fiber.context, &block.scheduler);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
}

inline void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_size);
  block.kernel();
  leave(State::kDone);
}

inline void resume(unsigned i) {
  Fiber& fiber = block.fibers[i];
  block.current = i;
  threadIdx = fiber.index;
  __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fiber.stack.get(), kStackBytes);
  swapcontext(&block.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
}

// Frees those of [first, last) that wait at `barrier`, if all of them do.
inline bool release(State barrier, unsigned first, unsigned last) {
  for (unsigned i = first; i < last; ++i)
    if (block.fibers[i].state != barrier) return false;
  for (unsigned i = first; i < last; ++i) block.fibers[i].state = State::kReady;
  return true;
}

__attribute__((no_sanitize("address"))) inline void spoil_shared_memory() {
  for (volatile char* at = __start_shared_memory; at < __stop_shared_memory; ++at)
    *at = static_cast<char>(0xFF);
  if (block.dynamic_bytes > 0) std::memset(dynamic_memory, 0xFF, block.dynamic_bytes);
}

inline std::map<const void*, std::size_t>
    most_dynamic_bytes;  // of kernels that ask for more than 48 KB

// By itself, since getcontext may return twice as far as the compiler knows.
__noinline__ inline void prepare(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

inline void run_block() {
  spoil_shared_memory();
  const unsigned n = block.n_threads;
  while (block.fibers.size() < n) {
    block.fibers.emplace_back();
    block.fibers.back().stack.reset(new char[kStackBytes]);
  }
  std::vector<unsigned> order(n);
  for (unsigned i = 0; i < n; ++i) {
    Fiber& fiber = block.fibers[i];
    order[i] = i;
    fiber.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    fiber.state = State::kReady;
    prepare(fiber);
  }
  if (block.seed != 0) std::shuffle(order.begin(), order.end(), std::mt19937(block.seed));
  for (;;) {
    bool any = false, all_done = true;
    for (unsigned i : order) {
      if (block.fibers[i].state == State::kReady) {
        resume(i);
        any = true;
      }
    }
    for (unsigned i = 0; i < n; ++i) all_done = all_done && block.fibers[i].state == State::kDone;
    if (all_done) return;
    for (unsigned first = 0; first < n; first += kWarp)
      any = release(State::kAtWarpBarrier, first, std::min(first + kWarp, n)) || any;
    any = release(State::kAtBlockBarrier, 0, n) || any;
    if (!any) fail("some threads never reach the barrier or shuffle where the others wait");
  }
}

inline unsigned lane() { return block.current % kWarp; }

// What lane `from` of the warp shows, once all lanes show something.
template <class Value>
Value exchange(unsigned mask, Value value, unsigned from) {
  if (mask != 0xFFFFFFFFu || block.n_threads % kWarp != 0)
    fail("a shuffle among lanes that do not all exist");
  static_assert(sizeof(Value) <= sizeof(double), "exchange: one register or two");
  std::memcpy(&block.fibers[block.current].exchanged, &value, sizeof value);
  leave(State::kAtWarpBarrier);
  std::memcpy(&value, &block.fibers[block.current - lane() + from % kWarp].exchanged, sizeof value);
  leave(State::kAtWarpBarrier);
  return value;
}

}  // namespace emulated

inline void __syncthreads() { emulated::leave(emulated::State::kAtBlockBarrier); }
inline void __syncwarp() { emulated::leave(emulated::State::kAtWarpBarrier); }
template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int distance) {
  return emulated::exchange(mask, value, emulated::lane() ^ static_cast<unsigned>(distance));
}

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidConfiguration,
  cudaErrorInvalidDevice,
  cudaErrorInvalidValue
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
typedef void* cudaStream_t;
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal"
                                         : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : 227 << 10, cudaSuccess;
}
template <class... Wanted>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Wanted...), cudaFuncAttribute attribute,
                                 int bytes) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (bytes < 0 || bytes > 227 << 10) return cudaErrorInvalidValue;
  emulated::most_dynamic_bytes[reinterpret_cast<const void*>(kernel)] =
      static_cast<std::size_t>(bytes);
  return cudaSuccess;
}
template <class... Wanted>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Wanted...), int,
                                                          std::size_t) {
  return *blocks = 2, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, std::size_t bytes, cudaStream_t) {
  return std::memset(at, value, bytes), cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }

template <class... Wanted, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Wanted...),
                               Given&&... given) {
  const std::uint64_t n_threads =
      std::uint64_t{config->blockDim.x} * config->blockDim.y * config->blockDim.z;
  if (n_threads < 1 || n_threads > 1024 || config->blockDim.z > 64)
    return cudaErrorInvalidConfiguration;
  if (config->gridDim.x < 1 || config->gridDim.x > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
  if (config->gridDim.y < 1 || config->gridDim.y > 65535 || config->gridDim.z != 1)
    return cudaErrorInvalidConfiguration;
  const std::size_t dynamic_bytes = config->dynamicSmemBytes,
                    allowed = std::max<std::size_t>(
                        48 << 10,
                        emulated::most_dynamic_bytes[reinterpret_cast<const void*>(kernel)]);
  if (dynamic_bytes > allowed) return cudaErrorInvalidValue;
  const std::unique_ptr<uint4[]> dynamic(new uint4[(dynamic_bytes + 15) / 16]);
  dynamic_memory = dynamic.get();
  emulated::block.dynamic_bytes = dynamic_bytes;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulated::block.n_threads = static_cast<unsigned>(n_threads);
  emulated::block.kernel = [&] { kernel(static_cast<Wanted>(given)...); };
  for (unsigned y = 0; y < gridDim.y; ++y) {
    for (unsigned x = 0; x < gridDim.x; ++x) {
      blockIdx = dim3(x, y);
      emulated::run_block();
    }
  }
  return cudaSuccess;
}
