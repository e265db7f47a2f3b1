// What element j of direction k of image b is. One text for host and device.
//
// rademacher: bit (k % 32) of the word of element j at counter (j / 4, b, k / 32, step), 10 rounds; set means minus.
// the others: a normal made from half a word of element j at counter (j / 8, b, k, step), 7 rounds: word j % 4, its low
// half where j % 8 < 4, its high half elsewhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "normal.h"

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

// Where the directions of one call come from.
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

// What the integer normals of a gaussian direction are divided by.
BIDFMKD_BOTH double gaussian_length(std::int64_t n_elements) {
  return kNormalUnit * std::sqrt(static_cast<double>(n_elements));
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
