// Defines the random directions: how element j of direction k for image b is computed from the
// Philox counter. This file is compiled for CPU and GPU so that both give the same bits.
//
// rademacher: the sign is bit (k % 32) of the word of element j at counter (j / 4, b, k / 32,
// step), after 10 rounds; a set bit means minus.
//
// sphere, gaussian, lowres: element j is a normal made from half a word at counter (j / 8, b, k,
// step), after 7 rounds: word j % 4, its low half where j % 8 < 4 and its high half elsewhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "normal.h"

namespace bidfmkd {

enum class Directions : int { kRademacher = 0, kSphere = 1, kGaussian = 2, kLowres = 3 };

// The shape of the images [B, *S] and the kind of directions drawn for them.
struct Geometry {
  std::int64_t n_images;
  std::int64_t n_elements;  // d
  Directions directions;
  std::int64_t channels, height, width;  // used by kLowres only
  std::int64_t grid;

  // Return the number of random numbers per direction: channels * grid^2 for lowres, d otherwise.
  // This is also s, the dimension of the space that the directions span.
  BIDFMKD_BOTH std::int64_t n_random() const {
    return directions == Directions::kLowres ? channels * grid * grid : n_elements;
  }
};

// Says which directions one call draws.
struct Drawing {
  Geometry geometry;
  const std::int64_t* state;  // [seed, step], in the memory of the device that draws
  std::int64_t num_directions;
  double mu;
  std::int64_t first_direction, first_image;
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

// Return the divisor that gives the integer normals of random/normal.h variance 1 / d.
BIDFMKD_BOTH double gaussian_length(std::int64_t n_elements) {
  return kNormalUnit * std::sqrt(static_cast<double>(n_elements));
}

// Says between which two of `grid` points output position `i` of `size` is interpolated (bilinear,
// align_corners = false).
struct LinearTap {
  std::int32_t low, high;
  float weight_high;
};

BIDFMKD_BOTH LinearTap linear_tap(std::int64_t i, std::int64_t size, std::int64_t grid) {
  const double position =
      (static_cast<double>(i) + 0.5) * static_cast<double>(grid) / static_cast<double>(size) - 0.5;
  const double clamped = position < 0.0 ? 0.0 : position;
  const auto low = static_cast<std::int32_t>(clamped);
  const std::int32_t high = low + 1 < grid ? low + 1 : low;
  return {low, high, static_cast<float>(clamped - low)};
}

}  // namespace bidfmkd
