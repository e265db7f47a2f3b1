// What element j of direction k of image b is. One text for host and device.
//
// rademacher: bit (k % 32) of the word of element j at counter (j / 4, b, k / 32, step), 10 rounds; set means minus.
// the others: a normal made from the word of element j at counter (j / 4, b, k, step), 7 rounds.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "philox.h"

namespace bidfmkd {

enum class Directions : int { kRademacher = 0, kSphere = 1, kGaussian = 2, kLowres = 3 };

// The images [B, *S] and the kind of directions drawn for them.
struct Geometry {
  std::int64_t n_images;
  std::int64_t n_elements;  // d
  Directions directions;
  std::int64_t channels, height, width;  // used by kLowres only
  std::int64_t grid;

  // Random numbers per direction: the grid's normals for kLowres, one an element otherwise.
  BIDFMKD_BOTH std::int64_t n_random() const {
    return directions == Directions::kLowres ? channels * grid * grid : n_elements;
  }
};

BIDFMKD_BOTH float bits_to_float(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

BIDFMKD_BOTH std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Natural logarithm of a normal positive float, to about 1e-7 absolute; branch-free, so that loops over it vectorise.
BIDFMKD_BOTH float fast_log(float y) {
  const std::uint32_t shifted = float_to_bits(y) - 0x3F3504F3u;  // of sqrt(1/2): the mantissa lands in [0.71, 1.41)
  const float exponent = static_cast<float>(static_cast<std::int32_t>(shifted) >> 23);
  const float f = bits_to_float((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  float p = -0.101340570f;  // log(1 + f) / f, least squares at Chebyshev nodes
  p = p * f + 0.162341893f;
  p = p * f - 0.172470137f;
  p = p * f + 0.198985651f;
  p = p * f - 0.249700710f;
  p = p * f + 0.333351135f;
  p = p * f - 0.500003606f;
  p = p * f + 0.999999940f;
  return exponent * 0.693147181f + f * p;
}

// Inverse of the normal distribution function at (word + 0.5) / 2^32, to 6e-7 relative.
// With x = 2p - 1 and w = -log(1 - x^2), z / x is a smooth function of sqrt(w + 5) over all words.
BIDFMKD_BOTH float normal_from_word(std::uint32_t word) {
  const auto centred = static_cast<std::int32_t>(word ^ 0x80000000u);
  const std::int32_t magnitude = centred ^ (centred >> 31);
  // |x| and 1 - |x| each from integers, so that neither loses digits near 0.
  const float x = (static_cast<float>(magnitude) + 0.5f) * 4.65661287e-10f;
  const float t = (static_cast<float>(0x7FFFFFFF - magnitude) + 0.5f) * 4.65661287e-10f;
  const float u = sqrtf(5.0f - fast_log(t * (2.0f - t))) * 0.671299991f - 2.50107241f;
  float p = -0.0293275435f;  // least squares at Chebyshev nodes, relative
  p = p * u - 0.0107796043f;
  p = p * u + 0.126234293f;
  p = p * u - 0.00247162301f;
  p = p * u - 0.208663628f;
  p = p * u + 0.102291085f;
  p = p * u + 0.0967378393f;
  p = p * u - 0.136806667f;
  p = p * u + 0.123955496f;
  p = p * u - 0.0928307150f;
  p = p * u + 0.0111643644f;
  p = p * u + 0.100154221f;
  p = p * u - 0.248293579f;
  p = p * u + 2.63717628f;
  p = p * u + 3.97824001f;
  return bits_to_float(float_to_bits(p * x) | (static_cast<std::uint32_t>(centred) & 0x80000000u));
}

// Where output position `i` of `size` reads a field of `grid` points: bilinear, align_corners = false.
struct LinearTap {
  std::int32_t low, high;
  float weight_high;
};

BIDFMKD_BOTH LinearTap linear_tap(std::int64_t i, std::int64_t size, std::int64_t grid) {
  const double position = (static_cast<double>(i) + 0.5) * static_cast<double>(grid) / static_cast<double>(size) - 0.5;
  const double clamped = position < 0.0 ? 0.0 : position;
  const auto low = static_cast<std::int32_t>(clamped);
  const std::int32_t high = low + 1 < grid ? low + 1 : low;
  return {low, high, static_cast<float>(clamped - low)};
}

}  // namespace bidfmkd
