// A sum over the threads of a block, in one order.
#pragma once

#include "launch.cuh"

namespace bidfmkd {
namespace cuda {

// The sum over all threads of a one-dimensional block of whole warps, known to all of them. `partial`: one a warp; a
// barrier has to pass before it is used again.
template <class Number>
__device__ Number block_sum(Number value, Number (&partial)[kWarp]) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kEveryLane, value, distance);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = threadIdx.x % kWarp < blockDim.x / kWarp ? partial[threadIdx.x % kWarp] : Number{0};
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kEveryLane, value, distance);
  return value;
}

}  // namespace cuda
}  // namespace bidfmkd
