// Makes a standard normal from 16 random bits, as an integer: there is no rounding, so all machines
// give the same bits.
//
// The top bit is the sign, the other 15 are the rank r. The size is the quantile -Phi^-1((r + 1/2)
// / 2^16) in steps of 1/7500, for r = 0, ..., 2^15 - 1.
//
// The quantiles are approximated by cubics on 62 segments, fitted through the quantile at the four
// Chebyshev points of each; products are rounded down to 16 bits, so a vector unit computes 32
// normals at once. The 32 outermost quantiles are tabulated, since no cubic follows them.
//
// The approximation is within 2.5e-4 of the quantiles (root mean square 6e-5). All 2^16 normals
// together have mean 0, variance 1 and kurtosis 2.9993. ops/directions.py derives these
// tables.
#pragma once

#include <cstdint>

#include "philox.h"

namespace bidfmkd {

// Scale: root mean square of all 2^16 integer normals; dividing by it gives unit variance.
constexpr double kNormalUnit = 7499.925503867896;

// One cubic: size = constant + linear t / 2 + square t^2 / 4 + cube t^3 / 8 for t in [-1, 1].
struct alignas(8) SizeSegment {
  std::int16_t cube, square, linear, constant;
};

constexpr std::uint32_t kOutermost = 32;    // smaller ranks are tabulated
constexpr std::uint32_t kFineBelow = 1024;  // smaller ranks: segments of 2^5; others: of 2^10

constexpr std::int16_t kOutermostSizes[kOutermost] = {
    32437, 30572, 29668, 29059, 28597, 28223, 27908, 27636, 27396, 27181, 26986,
    26808, 26644, 26492, 26350, 26217, 26091, 25973, 25861, 25754, 25652, 25555,
    25461, 25372, 25286, 25203, 25123, 25046, 24972, 24900, 24830, 24762};

// The 32 coarse segments (2^10 ranks each), then the 32 fine ones (2^5 ranks each). The first of
// each is unused: the fine segments replace the first coarse one, and the table of outermost sizes
// replaces the first fine one.
constexpr SizeSegment kSizeSegments[64] = {
    {0, 0, 0, 0},
    {-267, 626, -2115, 14904},
    {-58, 230, -1386, 13212},
    {-22, 121, -1058, 12008},
    {-10, 75, -869, 11051},
    {-6, 51, -746, 10247},
    {-4, 38, -660, 9545},
    {-2, 29, -595, 8919},
    {-2, 23, -545, 8349},
    {-1, 18, -506, 7824},
    {-1, 15, -473, 7334},
    {-1, 13, -447, 6874},
    {-1, 11, -424, 6439},
    {0, 9, -405, 6024},
    {0, 8, -389, 5627},
    {0, 7, -375, 5245},
    {0, 6, -362, 4876},
    {0, 5, -352, 4519},
    {0, 5, -342, 4171},
    {0, 4, -334, 3833},
    {0, 4, -327, 3502},
    {0, 3, -321, 3177},
    {0, 3, -315, 2859},
    {0, 3, -311, 2545},
    {0, 2, -307, 2236},
    {0, 2, -303, 1931},
    {0, 2, -300, 1629},
    {0, 2, -298, 1329},
    {0, 1, -296, 1032},
    {0, 1, -295, 736},
    {0, 1, -294, 441},
    {0, 1, -293, 147},
    {0, 0, 0, 0},
    {-198, 461, -1434, 23839},
    {-43, 167, -900, 22715},
    {-16, 87, -663, 21946},
    {-8, 54, -528, 21355},
    {-4, 37, -441, 20873},
    {-3, 27, -379, 20464},
    {-2, 20, -333, 20108},
    {-1, 16, -298, 19793},
    {-1, 13, -270, 19509},
    {-1, 11, -247, 19250},
    {0, 9, -228, 19013},
    {0, 8, -211, 18793},
    {0, 7, -197, 18588},
    {0, 6, -185, 18396},
    {0, 5, -175, 18216},
    {0, 5, -165, 18045},
    {0, 4, -157, 17884},
    {0, 4, -150, 17730},
    {0, 4, -143, 17583},
    {0, 3, -137, 17443},
    {0, 3, -131, 17309},
    {0, 3, -126, 17180},
    {0, 3, -121, 17056},
    {0, 3, -117, 16936},
    {0, 2, -113, 16821},
    {0, 2, -109, 16709},
    {0, 2, -106, 16601},
    {0, 2, -103, 16496},
    {0, 2, -100, 16395},
    {0, 2, -97, 16296},
    {0, 2, -94, 16200},
};

// Return the normal of the low 16 bits of `half`.
//
// The last 10 (fine segments: 5) bits are read as a signed number t, the place in the segment.
// Signed means that the ranks are not in the order of the bits; this does not matter, since all are
// equally likely, and it saves a subtraction.
constexpr std::int32_t normal_from_half(std::uint32_t half) {
  const std::uint32_t bits = half & 0x7FFFu;
  const bool fine = bits < kFineBelow;
  const SizeSegment segment = kSizeSegments[fine ? 32 + (bits >> 5) : bits >> 10];
  const std::int32_t t =
      static_cast<std::int32_t>(bits << (fine ? 27 : 22)) >> 16;  // in units of 2^-15
  std::int32_t size = segment.cube;
  size = segment.square + ((size * t) >> 16);
  size = segment.linear + ((size * t) >> 16);
  size = segment.constant + ((size * t) >> 16);
  if (bits < kOutermost) size = kOutermostSizes[bits];
  return half & 0x8000u ? -size : size;
}

}  // namespace bidfmkd
