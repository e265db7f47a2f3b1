// Turns random bits into normals by table look-up. A normal has one of 2^15 sizes
// (random/normal.h), so the table takes 64 KB. Blocks that draw many normals copy it into shared
// memory first: a normal then takes 7 instructions, against about 30 when its cubic is evaluated as
// on the CPU.
#pragma once

#include "launch.cuh"

namespace bidfmkd {
namespace cuda {

// The size of a normal, indexed by the low 15 bits of a half word; the top bit is the sign.
struct alignas(16) Sizes {
  std::uint16_t of[1 << 15];
};

constexpr Sizes every_size() {
  Sizes sizes{};
  for (std::uint32_t half = 0; half < 1u << 15; ++half)
    sizes.of[half] = static_cast<std::uint16_t>(normal_from_half(half));
  return sizes;
}

static __device__ const Sizes kSizes = every_size();

// Copy the table into shared memory. All threads of a one-dimensional block call this together, and
// a barrier must follow before the table is read.
__device__ inline void copy_sizes(Sizes& to) {
  constexpr unsigned n = sizeof(Sizes) / sizeof(uint4), kAtOnce = 8;
  const auto* from = reinterpret_cast<const uint4*>(&kSizes);
  for (unsigned first = threadIdx.x; first < n; first += kAtOnce * blockDim.x) {
    uint4 loaded[kAtOnce];  // all loads are issued before the first result is needed
#pragma unroll
    for (unsigned i = 0; i < kAtOnce; ++i)
      if (first + i * blockDim.x < n) loaded[i] = from[first + i * blockDim.x];
#pragma unroll
    for (unsigned i = 0; i < kAtOnce; ++i)
      if (first + i * blockDim.x < n)
        reinterpret_cast<uint4*>(&to)[first + i * blockDim.x] = loaded[i];
  }
}

struct Octet {
  float value[8];
};

// Return the normal of the low 16 bits of `half`, as a float in units of 2^-23.
//
// The integer size s < 2^15 is used as the bit pattern of a denormal float, whose value is s
// 2^-149; multiplying by 2^126 gives s 2^-23 exactly. This one multiplication replaces the
// integer-to-float conversion, which runs at a quarter of the rate. The sign bit is put in its
// place beforehand.
__device__ __forceinline__ float float_normal(const Sizes& sizes, std::uint32_t half) {
  return bits_to_float(((half << 16) & 0x80000000u) | sizes.of[half & 0x7FFFu]) *
         8.507059173023462e37f;
}

// Return the divisor that gives float_normal's values variance 1 / n_elements (gaussian
// directions).
BIDFMKD_BOTH double float_gaussian_length(std::int64_t n_elements) {
  return gaussian_length(n_elements) / 8388608.0;
}

// Draw the four random words of normals 8 index, ..., 8 index + 7: the first four normals come from
// the low halves, the other four from the high halves.
__device__ __forceinline__ PhiloxWords normal_words(const RandomState& random, std::uint32_t index,
                                                    std::uint32_t image, std::uint32_t direction) {
  return philox4x32<kNormalRounds>({{index, image, direction, random.step}}, random.key0,
                                   random.key1);
}

// Return normals 8 index, ..., 8 index + 7 of one direction of one image.
__device__ __forceinline__ Octet normal_octet(const Sizes& sizes, const RandomState& random,
                                              std::uint32_t index, std::uint32_t image,
                                              std::uint32_t direction) {
  const PhiloxWords words = normal_words(random, index, image, direction);
  Octet octet;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    octet.value[i] = float_normal(sizes, words.word[i]);
    octet.value[4 + i] = float_normal(sizes, words.word[i] >> 16);
  }
  return octet;
}

// Set the elements beyond the row's `n` normals to 0, so that they add nothing to its length.
__device__ __forceinline__ void cut_octet(Octet& octet, std::int64_t index, std::int64_t n) {
  if (8 * index + 8 <= n) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) octet.value[i] = 8 * index + i < n ? octet.value[i] : 0.0f;
}

__device__ __forceinline__ float sum_of_squares(const Octet& octet) {
  float sum = 0.0f;
#pragma unroll
  for (float value : octet.value) sum += value * value;
  return sum;
}

}  // namespace cuda
}  // namespace bidfmkd
