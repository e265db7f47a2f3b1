// What element j of direction k of image b is. One text for host and device.
//
// rademacher: bit (k % 32) of the word of element j at counter (j / 4, b, k / 32, step), 10 rounds; set means minus.
// the others: a normal made from half a word of element j at counter (j / 8, b, k, step), 7 rounds: word j % 4, its low
// half where j % 8 < 4, its high half elsewhere.
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

// The normal quantile -Phi^-1(t) at t = y / 2^17, y odd and below 2^16, is in each octave of y a polynomial of degree 6:
// minimax at these points, 1.4e-6 absolute in float32. Highest power first; the column is (float bits of y >> 23) % 16.
constexpr int kQuantileTerms = 7;
constexpr float kQuantile[kQuantileTerms][16] = {
        {0.0f, 0.0f, 0.0f, 2.22987212e-10f, 3.79423012e-12f, 6.25528682e-14f, 1.02850467e-15f, 1.68307928e-17f,
     2.76150422e-19f, 4.54709947e-21f, 7.52169407e-23f, 1.2512747e-24f, 2.09556493e-26f, 3.53623729e-28f,
     5.75423932e-30f, 0.0f},
        {0.0f, 0.0f, 0.0f, -3.85058279e-08f, -1.30564248e-09f, -4.30065983e-11f, -1.41312548e-12f, -4.6255856e-14f,
     -1.51809628e-15f, -5.0004097e-17f, -1.65474473e-18f, -5.50727094e-20f, -1.84534644e-21f, -6.23144958e-23f,
     -2.07042619e-24f, 0.0f},
        {0.0f, 0.0f, 0.0f, 2.86997169e-06f, 1.93579581e-07f, 1.27329116e-08f, 8.35898295e-10f, 5.47271291e-11f,
     3.5928747e-12f, 2.36758529e-13f, 1.56759286e-14f, 1.04395096e-15f, 6.99998086e-17f, 4.73010247e-18f,
     3.16649805e-19f, 0.0f},
        {0.0f, 0.0f, -4.62514909e-05f, -0.000121111894f, -1.62212964e-05f, -2.12963732e-06f, -2.79279959e-07f,
     -3.65738053e-08f, -4.80378715e-09f, -6.33441966e-10f, -8.3939973e-11f, -1.11897097e-11f, -1.50217068e-12f,
     -2.0332519e-13f, -2.75287859e-14f, 0.0f},
        {0.0f, 0.0f, 0.00251376769f, 0.00322771259f, 0.000857087376f, 0.000224541713f, 5.88295989e-05f,
     1.54161571e-05f, 4.05331048e-06f, 1.07029064e-06f, 2.84090817e-07f, 7.58704601e-08f, 2.04001314e-08f,
     5.52049606e-09f, 1.48858192e-09f, 0.0f},
        {0.0f, -0.040589679f, -0.0612884052f, -0.0620565526f, -0.0326687135f, -0.0171066597f, -0.00897602178f,
     -0.0047221221f, -0.00249607f, -0.00132736564f, -0.000711253611f, -0.000384830433f, -0.000210855098f,
     -0.000117482188f, -6.68198263e-05f, 0.0f},
        {4.07620668f, 4.15870142f, 4.19462776f, 4.17955971f, 4.02313662f, 3.85882425f, 3.68767405f, 3.5088613f,
     3.32179523f, 3.12539148f, 2.91829181f, 2.69879222f, 2.46473908f, 2.21340203f, 1.94029438f, 4.32491922f},
};

// A standard normal from 16 random bits: the top one is the sign, the rest choose among 2^15 equally likely sizes, the
// quantiles at their middles, up to 4.32. Few bits, so that one call of Philox makes eight.
inline float normal_from_half(std::uint32_t half) {
  const float y = static_cast<float>(((half << 1) & 0xFFFEu) | 1u);
  const std::uint32_t column = (float_to_bits(y) >> 23) & 15u;
  float p = kQuantile[0][column];
  for (int term = 1; term < kQuantileTerms; ++term) p = p * y + kQuantile[term][column];
  return bits_to_float(float_to_bits(p) ^ ((half << 16) & 0x80000000u));
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
