// Defines what host and device share of norm_pool: y = relu(max_pool2(batch_norm(x))) with the
// statistics of the batch itself.
//
// First derivative. Let x^ = (x - mean) r with r = 1 / sqrt(variance + eps), g the upstream
// gradient, placed at the pixels that won the pooling and survived ReLU, and M = N H W. Then
//
//   grad_bias   = G = sum g
//   grad_weight = K = sum g x^
//   grad_x      = weight r (g - G / M - x^ K / M)
//
// The last two terms are what the batch statistics contribute: mean and variance depend on every x.
#pragma once

#include <cstdint>

#include "../random/philox.h"

namespace bidfmkd {

// The size of the images, [N, H, W, C] in memory on the CPU (channels-last) and [N, C, H, W] on
// CUDA; cells are [H / 2, W / 2].
struct NormPoolShape {
  std::int64_t n_images, height, width, channels;
};

// What the forward pass keeps for the derivatives.
struct NormPoolSaved {
  std::int32_t* place;  // per cell: which of its four pixels won, row by row; kInactive for none
  float* normalised;    // per cell: x^ of that pixel
  float *mean, *r;      // [C]: r is 1 / sqrt(variance + eps)
};

constexpr std::int32_t kInactive = 4;  // the cell's maximum was negative: ReLU cut it off

// The coefficients of the first derivative: grad_x = direct g + slope x^ + shift.
struct NormPoolSlopes {
  float direct, slope, shift;
};

BIDFMKD_BOTH NormPoolSlopes norm_pool_slopes(double weight, double r, double g, double k,
                                             double count) {
  const double direct = weight * r;
  return {static_cast<float>(direct), static_cast<float>(-direct * k / count),
          static_cast<float>(-direct * g / count)};
}

// The sums over a channel that the second derivative needs. v is the upstream gradient of grad_x: V
// = sum v, U = sum v x^, W = sum v g.
struct NormPoolSums {
  double g, k, v, u, w;
};

// The coefficients of the second derivative: grad_x = a v + b g + slope x^ + shift at every pixel,
// and grad_grad = direct v + tilt x^ + level at the pixels that won.
struct NormPoolCurvature {
  float a, b, slope, shift, direct, tilt, level, grad_weight;
};

// Return the second derivative. With p and s the upstream gradients of grad_weight and grad_bias,
// it differentiates
//
//   weight r (W - V G / M - U K / M) + p K + s G
//
// once more in x, g and weight; x enters through x^ and r.
BIDFMKD_BOTH NormPoolCurvature norm_pool_curvature(double weight, double r, double p, double s,
                                                   const NormPoolSums& sums, double count) {
  const double direct = weight * r,
               inner = sums.w - sums.v * sums.g / count - sums.u * sums.k / count;
  const double sum_q =
      -direct * (sums.k * sums.v + sums.u * sums.g) / count + p * sums.g;  // q: derivative by x^
  const double sum_q_x = -2.0 * direct * sums.u * sums.k / count + p * sums.k;
  NormPoolCurvature curvature;
  curvature.a = static_cast<float>(-r * direct * sums.k / count);
  curvature.b = static_cast<float>(r * (p - direct * sums.u / count));
  curvature.slope = static_cast<float>(-r * (direct * inner + sum_q_x) / count);
  curvature.shift = static_cast<float>(-r * sum_q / count);
  curvature.direct = static_cast<float>(direct);
  curvature.tilt = static_cast<float>(p - direct * sums.u / count);
  curvature.level = static_cast<float>(s - direct * sums.v / count);
  curvature.grad_weight = static_cast<float>(r * inner);
  return curvature;
}

}  // namespace bidfmkd
