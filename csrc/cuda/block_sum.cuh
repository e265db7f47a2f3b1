// Adds values over the threads of a block, always in the same order, so that equal inputs give
// equal bits.
#pragma once

#include "launch.cuh"

namespace bidfmkd {
namespace cuda {

// Return the sum of `value` over all threads of a one-dimensional block of whole warps; every
// thread gets it.
//
// Each warp adds its 32 values by exchanging registers (butterfly), writes one number to `partial`,
// and after the barrier every warp adds those numbers the same way. `partial` may be reused only
// after another barrier.
template <class Number>
__device__ Number block_sum(Number value, Number (&partial)[kWarp]) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kEveryLane, value, distance);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = threadIdx.x % kWarp < blockDim.x / kWarp ? partial[threadIdx.x % kWarp] : Number{0};
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kEveryLane, value, distance);
  return value;
}

// Replace both values by their sums over all threads, for the price of little more than one sum.
//
// In the first exchange the upper half of each warp takes over the second value and the lower half
// the first, so the remaining steps add both values at once, each in its half of the warp.
__device__ __forceinline__ void block_sums(float (&values)[2], float (&partial)[2][kWarp]) {
  constexpr unsigned kHalf = kWarp / 2;
  const unsigned lane = threadIdx.x % kWarp, at = lane % kHalf, n_warps = blockDim.x / kWarp;
  const bool upper = lane >= kHalf;
  float own = (upper ? values[1] : values[0]) +
              __shfl_xor_sync(kEveryLane, upper ? values[0] : values[1], kHalf);
#pragma unroll
  for (int distance = kHalf / 2; distance > 0; distance /= 2)
    own += __shfl_xor_sync(kEveryLane, own, distance);
  if (at == 0) partial[upper][threadIdx.x / kWarp] = own;
  __syncthreads();
  own = (at < n_warps ? partial[upper][at] : 0.0f) +
        (at + kHalf < n_warps ? partial[upper][at + kHalf] : 0.0f);
#pragma unroll
  for (int distance = kHalf / 2; distance > 0; distance /= 2)
    own += __shfl_xor_sync(kEveryLane, own, distance);
  const float other = __shfl_xor_sync(kEveryLane, own, kHalf);
  values[0] = upper ? other : own;
  values[1] = upper ? own : other;
}

}  // namespace cuda
}  // namespace bidfmkd
