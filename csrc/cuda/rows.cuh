// One direction of one image as a row made of normals (sphere, gaussian, lowres), eight elements at a time.
#pragma once

#include "launch.cuh"

namespace bidfmkd {
namespace cuda {

struct Octet {
  float value[8];
};

// The normal of the low 16 bits of `half` as a float. Adding to the bits of 1.5 * 2^23 converts faster than a conversion.
__device__ __forceinline__ float float_normal(std::uint32_t half) {
  return bits_to_float(0x4B400000u + static_cast<std::uint32_t>(normal_from_half(half))) - 12582912.0f;
}

// What normals 8 index, ..., 8 index + 7 of a direction are made from: four in the low halves, four in the high ones.
__device__ __forceinline__ PhiloxWords normal_words(const RandomState& random, std::int64_t index, std::uint32_t image,
                                                    std::uint32_t direction) {
  return philox4x32({{static_cast<std::uint32_t>(index), image, direction, random.step}}, random.key0, random.key1,
                    kNormalRounds);
}

__device__ __forceinline__ Octet normal_octet(const RandomState& random, std::int64_t index, std::uint32_t image,
                                              std::uint32_t direction) {
  const PhiloxWords words = normal_words(random, index, image, direction);
  Octet octet;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    octet.value[i] = float_normal(words.word[i]);
    octet.value[4 + i] = float_normal(words.word[i] >> 16);
  }
  return octet;
}

// A row that is the normals themselves.
class NormalRow {
 public:
  static constexpr int kHeld = 4;  // octets a thread may hold at once
  struct Staging {};

  __device__ NormalRow(const Drawing& drawing, std::int64_t image, std::int64_t k, Staging&)
      : random_(random_state(drawing.state)),
        image_(static_cast<std::uint32_t>(drawing.first_image + image)),
        direction_(static_cast<std::uint32_t>(drawing.first_direction + k)),
        n_(drawing.geometry.n_elements) {}

  // 0 beyond the row's end.
  __device__ Octet octet(std::int64_t index) const {
    Octet octet = normal_octet(random_, index, image_, direction_);
#pragma unroll
    for (int i = 0; i < 8; ++i) octet.value[i] = 8 * index + i < n_ ? octet.value[i] : 0.0f;
    return octet;
  }

 private:
  RandomState random_;
  std::uint32_t image_, direction_;
  std::int64_t n_;
};

// Bilinear between four normals of a field, given by their places in the row of normals.
template <class Normal>
__device__ __forceinline__ float upsampled(const LinearTap& column, const LinearTap& line, std::int64_t channel,
                                           std::int64_t grid, const Normal& normal) {
  const std::int64_t low = (channel * grid + line.low) * grid, high = (channel * grid + line.high) * grid;
  const float a = normal(low + column.low), b = normal(high + column.low);
  const float left = a + column.weight_high * (normal(low + column.high) - a);
  const float right = b + column.weight_high * (normal(high + column.high) - b);
  return left + line.weight_high * (right - left);
}

// A row upsampled from a field of normals in shared memory.
class FieldRow {
 public:
  static constexpr int kHeld = 4;
  static constexpr int kMostNormals = 2048, kMostTaps = 256;
  struct Staging {
    float field[kMostNormals];
    LinearTap columns[kMostTaps], lines[kMostTaps];
  };

  static bool fits(const Geometry& geometry) {
    return geometry.n_random() <= kMostNormals && geometry.width <= kMostTaps && geometry.height <= kMostTaps;
  }

  // All threads of the block together.
  __device__ FieldRow(const Drawing& drawing, std::int64_t image, std::int64_t k, Staging& staging)
      : n_(static_cast<std::uint32_t>(drawing.geometry.n_elements)),  // what fits has fewer than 2^27
        width_(static_cast<std::uint32_t>(drawing.geometry.width)),
        height_(static_cast<std::uint32_t>(drawing.geometry.height)),
        grid_(static_cast<std::uint32_t>(drawing.geometry.grid)),
        staging_(staging) {
    const RandomState random = random_state(drawing.state);
    const int n_normals = static_cast<int>(drawing.geometry.n_random());
    for (int i = threadIdx.x; 8 * i < n_normals; i += blockDim.x) {
      const Octet octet = normal_octet(random, i, static_cast<std::uint32_t>(drawing.first_image + image),
                                       static_cast<std::uint32_t>(drawing.first_direction + k));
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (8 * i + j < n_normals) staging.field[8 * i + j] = octet.value[j];
    }
    for (unsigned i = threadIdx.x; i < width_; i += blockDim.x) staging.columns[i] = linear_tap(i, width_, grid_);
    for (unsigned i = threadIdx.x; i < height_; i += blockDim.x) staging.lines[i] = linear_tap(i, height_, grid_);
    __syncthreads();
  }

  __device__ Octet octet(std::int64_t index) const {
    Octet octet;
#pragma unroll
    for (int i = 0; i < 8; ++i) octet.value[i] = element(8 * index + i);
    return octet;
  }

 private:
  __device__ float element(std::int64_t j) const {
    if (j >= n_) return 0.0f;
    const std::uint32_t line = static_cast<std::uint32_t>(j) / width_, x = static_cast<std::uint32_t>(j) % width_;
    return upsampled(staging_.columns[x], staging_.lines[line % height_], line / height_, grid_,
                     [&](std::int64_t i) { return staging_.field[i]; });
  }

  std::uint32_t n_, width_, height_, grid_;
  const Staging& staging_;
};

// The same for fields of any size: every tap draws its normal again, which is slow and small.
class DrawnFieldRow {
 public:
  static constexpr int kHeld = 0;
  struct Staging {};

  __device__ DrawnFieldRow(const Drawing& drawing, std::int64_t image, std::int64_t k, Staging&)
      : drawing_(drawing), image_(image), k_(k) {}

  __device__ Octet octet(std::int64_t index) const {
    Octet octet;
#pragma unroll
    for (int i = 0; i < 8; ++i) octet.value[i] = element(drawing_, image_, k_, 8 * index + i);
    return octet;
  }

 private:
  static __device__ __noinline__ float element(const Drawing& drawing, std::int64_t image, std::int64_t k,
                                               std::int64_t j) {
    const Geometry& geometry = drawing.geometry;
    if (j >= geometry.n_elements) return 0.0f;
    const std::int64_t line = j / geometry.width;
    return upsampled(linear_tap(j % geometry.width, geometry.width, geometry.grid),
                     linear_tap(line % geometry.height, geometry.height, geometry.grid), line / geometry.height,
                     geometry.grid, [&](std::int64_t i) { return normal(drawing, image, k, i); });
  }

  static __device__ __noinline__ float normal(const Drawing& drawing, std::int64_t image, std::int64_t k,
                                              std::int64_t i) {
    const PhiloxWords words = normal_words(random_state(drawing.state), i / 8,
                                           static_cast<std::uint32_t>(drawing.first_image + image),
                                           static_cast<std::uint32_t>(drawing.first_direction + k));
    std::uint32_t word = words.word[0];
#pragma unroll
    for (int j = 1; j < 4; ++j) word = i % 4 == j ? words.word[j] : word;
    return float_normal(i % 8 < 4 ? word : word >> 16);
  }

  const Drawing& drawing_;
  std::int64_t image_, k_;
};

__device__ __forceinline__ float sum_of_squares(const Octet& octet) {
  float sum = 0.0f;
#pragma unroll
  for (float value : octet.value) sum += value * value;
  return sum;
}

// The sum over all threads of a one-dimensional block of whole warps, known to all of them. `partial`: one a warp.
template <class Number>
__device__ Number block_sum(Number value, Number (&partial)[kWarp]) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kEveryLane, value, distance);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  Number sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += partial[warp];
  return sum;
}

}  // namespace cuda
}  // namespace bidfmkd
