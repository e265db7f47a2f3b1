// Converts scores in 16 bits, as torch stores them, to float32 without rounding.
#pragma once

#include <cstdint>

#include "../random/directions.h"

namespace bidfmkd {

struct BFloat16 {
  std::uint16_t bits;
  BIDFMKD_BOTH operator float() const {
    return bits_to_float(static_cast<std::uint32_t>(bits) << 16);
  }
};

struct Float16 {
  std::uint16_t bits;
  BIDFMKD_BOTH operator float() const {
    const std::uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7FFFu;
    if (rest >= 0x7C00u)
      return bits_to_float(sign | 0x7F800000u | (rest & 0x3FFu) << 13);  // infinity or NaN
    if (rest >= 0x400u)
      return bits_to_float(sign |
                           ((rest << 13) + (112u << 23)));  // the exponents' biases: 127 - 15
    const float small = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -small : small;
  }
};

enum class ScoreType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

}  // namespace bidfmkd
