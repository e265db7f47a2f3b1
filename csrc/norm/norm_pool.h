// y = relu(max_pool2(batch_norm(x))) with the batch's own statistics: what host and device share of it. With
// x^ = (x - mean) r, g = the upstream gradient at the positions that won, M = N H W:
//   grad_x = weight r (g - G / M - x^ K / M),   G = sum g = grad_bias,   K = sum g x^ = grad_weight.
#pragma once

#include <cstdint>

#include "../random/philox.h"

namespace bidfmkd {

// Images of N, H, W, C: in that order on the CPU (channels-last memory), as [N, C, H, W] on CUDA; cells [H / 2, W / 2].
struct NormPoolShape {
  std::int64_t n_images, height, width, channels;
};

// What norm_pool leaves for its derivatives.
struct NormPoolSaved {
  std::int32_t* place;  // of each cell: which of its four pixels won, row by row; 4 for none
  float* normalised;    // of each cell: that pixel, normalised
  float *mean, *r;      // [C]: r is 1 / sqrt(variance + eps)
};

constexpr std::int32_t kInactive = 4;  // the cell's maximum was cut off by ReLU

// grad_x = direct g + slope x^ + shift.
struct NormPoolSlopes {
  float direct, slope, shift;
};

BIDFMKD_BOTH NormPoolSlopes norm_pool_slopes(double weight, double r, double g, double k, double count) {
  const double direct = weight * r;
  return {static_cast<float>(direct), static_cast<float>(-direct * k / count), static_cast<float>(-direct * g / count)};
}

// Sums over a channel, with v upstream of grad_x: of v, v x^ and v g beside G and K.
struct NormPoolSums {
  double g, k, v, u, w;
};

// grad_x = a v + b g + slope x^ + shift; grad_grad = direct v + tilt x^ + level at the winners.
struct NormPoolCurvature {
  float a, b, slope, shift, direct, tilt, level, grad_weight;
};

// With p, s upstream of grad_weight, grad_bias and V, U, W the sums above, it differentiates
//   weight r (W - V G / M - U K / M) + p K + s G.
BIDFMKD_BOTH NormPoolCurvature norm_pool_curvature(double weight, double r, double p, double s, const NormPoolSums& sums,
                                                   double count) {
  const double direct = weight * r, inner = sums.w - sums.v * sums.g / count - sums.u * sums.k / count;
  const double sum_q = -direct * (sums.k * sums.v + sums.u * sums.g) / count + p * sums.g;  // q: derivative by x^
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
