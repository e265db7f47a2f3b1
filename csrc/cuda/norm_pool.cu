// norm_pool and its derivatives (see norm/norm_pool.h) on images [N, C, H, W]. One block per
// channel; it reads the channel twice, once for the statistics and once for the values.
#include "block_sum.cuh"

namespace bidfmkd {
namespace cuda {
namespace {

constexpr const char* kOp = "norm_pool";

// Enumerates the pixels of the block's channel and its cells (the 2x2 squares that are pooled).
struct Channel {
  std::int64_t channel, channels;
  std::uint32_t n_images, height, width;

  explicit __device__ Channel(const NormPoolShape& shape)
      : channel(blockIdx.x),
        channels(shape.channels),
        n_images(static_cast<std::uint32_t>(shape.n_images)),
        height(static_cast<std::uint32_t>(shape.height)),
        width(static_cast<std::uint32_t>(shape.width)) {}

  __device__ __forceinline__ std::uint32_t n_pixels() const { return n_images * height * width; }
  __device__ __forceinline__ std::uint32_t n_cells() const {
    return n_images * (height / 2) * (width / 2);
  }
  __device__ __forceinline__ double count() const { return static_cast<double>(n_pixels()); }
  __device__ __forceinline__ std::int64_t pixel(std::uint32_t image, std::uint32_t y,
                                                std::uint32_t x) const {
    return ((image * channels + channel) * height + y) * width + x;
  }
  __device__ __forceinline__ std::int64_t cell(std::uint32_t image, std::uint32_t y,
                                               std::uint32_t x) const {
    return ((image * channels + channel) * (height / 2) + y) * (width / 2) + x;
  }

  // Call body(offset of the pixel, offset of its cell or -1, its place in the cell), the pixels
  // divided among all threads. -1: an odd last row or column belongs to no cell.
  template <class Body>
  __device__ __forceinline__ void pixels(const Body& body) const {
    const std::uint32_t plane = height * width, n = n_pixels();
#pragma unroll 2
    for (std::uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
      const std::uint32_t image = i / plane, y = i % plane / width, x = i % plane % width;
      const bool pooled = y / 2 < height / 2 && x / 2 < width / 2;
      body(pixel(image, y, x), pooled ? cell(image, y / 2, x / 2) : -1,
           static_cast<std::int32_t>(y % 2 * 2 + x % 2));
    }
  }

  // Call body(offset of the cell, offset of its first pixel), the cells divided among all threads.
  template <class Body>
  __device__ __forceinline__ void cells(const Body& body) const {
    const std::uint32_t cell_width = width / 2, plane = height / 2 * cell_width, n = n_cells();
#pragma unroll 2
    for (std::uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
      const std::uint32_t image = i / plane, y = i % plane / cell_width, x = i % plane % cell_width;
      body(cell(image, y, x), pixel(image, 2 * y, 2 * x));
    }
  }
};

// Add up each of the n values over the block.
template <int n>
__device__ __forceinline__ void sum_over_block(const float (&own)[n], double (&sums)[n]) {
  __shared__ double partial[n][kWarp];
#pragma unroll
  for (int i = 0; i < n; ++i) sums[i] = block_sum(static_cast<double>(own[i]), partial[i]);
}

// Add this thread's part of G = sum g and K = sum g x^ to `g` and `k` (norm/norm_pool.h).
__device__ __forceinline__ void add_upstream(const Channel& channel, const float* grad,
                                             const NormPoolSaved& saved, float& g, float& k) {
  channel.cells([&](std::int64_t cell, std::int64_t) {
    const float through = saved.place[cell] == kInactive ? 0.0f : grad[cell];
    g += through;
    k += through * saved.normalised[cell];
  });
}

__global__ void __launch_bounds__(kMostThreads)
    pool(NormPoolShape shape, const float* __restrict__ x, const float* __restrict__ weight,
         const float* __restrict__ bias, double eps, float* __restrict__ out, NormPoolSaved saved) {
  const Channel channel(shape);
  // Sum differences to the first pixel: a mean much larger than the deviation would cost digits.
  const float origin = channel.n_pixels() == 0 ? 0.0f : x[channel.pixel(0, 0, 0)];
  float own[2] = {};
  channel.pixels([&](std::int64_t pixel, std::int64_t, std::int32_t) {
    const float v = x[pixel] - origin;
    own[0] += v;
    own[1] += v * v;
  });
  double sums[2];
  sum_over_block(own, sums);
  const double offset = sums[0] / channel.count(),
               variance = sums[1] / channel.count() - offset * offset;
  const auto mean = static_cast<float>(offset + static_cast<double>(origin));
  const auto r =
      static_cast<float>(1.0 / sqrt((variance < 0.0 ? 0.0 : variance) + eps));  // NaN stays NaN
  if (threadIdx.x == 0) saved.mean[channel.channel] = mean, saved.r[channel.channel] = r;
  const float scale = weight[channel.channel], shift = bias[channel.channel];
  channel.cells([&](std::int64_t cell, std::int64_t first) {
    float best = 0.0f, winner = 0.0f;
    std::int32_t place = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // the first on a tie
      const float normalised = (x[first + i / 2 * shape.width + i % 2] - mean) * r,
                  value = normalised * scale + shift;
      const bool wins = i == 0 || value > best;
      best = wins ? value : best;
      winner = wins ? normalised : winner;
      place = wins ? i : place;
    }
    out[cell] = best < 0.0f ? 0.0f : best;  // NaN stays NaN
    saved.place[cell] = best > 0.0f ? place : kInactive;
    saved.normalised[cell] = winner;
  });
}

__global__ void __launch_bounds__(kMostThreads)
    pool_backward(NormPoolShape shape, const float* __restrict__ grad, const float* __restrict__ x,
                  const float* __restrict__ weight, NormPoolSaved saved, float* __restrict__ grad_x,
                  float* __restrict__ grad_weight, float* __restrict__ grad_bias) {
  const Channel channel(shape);
  float own[2] = {};
  add_upstream(channel, grad, saved, own[0], own[1]);
  double sums[2];
  sum_over_block(own, sums);
  const float mean = saved.mean[channel.channel], r = saved.r[channel.channel];
  const NormPoolSlopes slopes =
      norm_pool_slopes(weight[channel.channel], r, sums[0], sums[1], channel.count());
  if (threadIdx.x == 0) {
    grad_bias[channel.channel] = static_cast<float>(sums[0]);
    grad_weight[channel.channel] = static_cast<float>(sums[1]);
  }
  channel.pixels([&](std::int64_t pixel, std::int64_t cell, std::int32_t place) {
    const bool won = cell >= 0 && saved.place[cell] == place;
    grad_x[pixel] = (x[pixel] - mean) * r * slopes.slope + slopes.shift +
                    (won ? slopes.direct * grad[cell] : 0.0f);
  });
}

__global__ void __launch_bounds__(kMostThreads)
    pool_double_backward(NormPoolShape shape, const float* __restrict__ v,
                         const float* __restrict__ p, const float* __restrict__ s,
                         const float* __restrict__ grad, const float* __restrict__ x,
                         const float* __restrict__ weight, NormPoolSaved saved,
                         float* __restrict__ grad_grad, float* __restrict__ grad_x,
                         float* __restrict__ grad_weight) {
  const Channel channel(shape);
  const float mean = saved.mean[channel.channel], r = saved.r[channel.channel];
  float own[5] = {};
  add_upstream(channel, grad, saved, own[0], own[1]);
  channel.pixels([&](std::int64_t pixel, std::int64_t cell, std::int32_t place) {
    const bool won = cell >= 0 && saved.place[cell] == place;
    own[2] += v[pixel];
    own[3] += v[pixel] * ((x[pixel] - mean) * r);
    own[4] += won ? v[pixel] * grad[cell] : 0.0f;
  });
  double sums[5];
  sum_over_block(own, sums);
  const NormPoolCurvature curve =
      norm_pool_curvature(weight[channel.channel], r, p[channel.channel], s[channel.channel],
                          {sums[0], sums[1], sums[2], sums[3], sums[4]}, channel.count());
  if (threadIdx.x == 0) grad_weight[channel.channel] = curve.grad_weight;
  channel.pixels([&](std::int64_t pixel, std::int64_t cell, std::int32_t place) {
    const bool won = cell >= 0 && saved.place[cell] == place;
    grad_x[pixel] = curve.a * v[pixel] + (x[pixel] - mean) * r * curve.slope + curve.shift +
                    (won ? curve.b * grad[cell] : 0.0f);
  });
  channel.cells([&](std::int64_t cell, std::int64_t first) {
    const std::int32_t place = saved.place[cell];
    float value = 0.0f;
    if (place != kInactive)
      value = curve.direct * v[first + place / 2 * shape.width + place % 2] +
              curve.tilt * saved.normalised[cell] + curve.level;
    grad_grad[cell] = value;
  });
}

Grid grid_of(const NormPoolShape& shape) {
  const std::int64_t count = shape.n_images * shape.height * shape.width;
  if (count > 0x7FFFFFFF)
    throw std::runtime_error("norm_pool: too many pixels of a channel for one call on a GPU");
  return {shape.channels,
          dim3(count < kMostThreads ? whole_warps(count > 0 ? count : 1) : kMostThreads)};
}

}  // namespace

void norm_pool(const NormPoolShape& shape, const float* x, const float* weight, const float* bias,
               double eps, float* y, const NormPoolSaved& saved, const Queue& queue) {
  const DeviceGuard guard(kOp, queue.device);
  launch(kOp, queue, pool, grid_of(shape), shape, x, weight, bias, eps, y, saved);
}

void norm_pool_backward(const NormPoolShape& shape, const float* grad, const float* x,
                        const float* weight, const NormPoolSaved& saved, float* grad_x,
                        float* grad_weight, float* grad_bias, const Queue& queue) {
  const DeviceGuard guard(kOp, queue.device);
  launch(kOp, queue, pool_backward, grid_of(shape), shape, grad, x, weight, saved, grad_x,
         grad_weight, grad_bias);
}

void norm_pool_double_backward(const NormPoolShape& shape, const float* v, const float* p,
                               const float* s, const float* grad, const float* x,
                               const float* weight, const NormPoolSaved& saved, float* grad_grad,
                               float* grad_x, float* grad_weight, const Queue& queue) {
  const DeviceGuard guard(kOp, queue.device);
  launch(kOp, queue, pool_double_backward, grid_of(shape), shape, v, p, s, grad, x, weight, saved,
         grad_grad, grad_x, grad_weight);
}

}  // namespace cuda
}  // namespace bidfmkd
