// Philox4x32 (Salmon et al., SC 2011): the counter-based random generator behind every direction. A
// block of four random words is a pure function of a 128-bit counter and a 64-bit key, so any
// element can be computed on its own, in any order and on any device.
//
// This file is compiled for CPU and GPU; the vector version for the CPU in cpu/simd.h follows the
// same rounds.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BIDFMKD_BOTH __host__ __device__ __forceinline__
#define BIDFMKD_UNROLL _Pragma("unroll")
#define BIDFMKD_ROLLED _Pragma("unroll 1")  // unrolled, these loops spill registers
#else
#define BIDFMKD_BOTH inline
#define BIDFMKD_UNROLL
#define BIDFMKD_ROLLED
#endif

namespace bidfmkd {

constexpr std::uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr std::uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr std::uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kSignRounds = 10;
constexpr int kNormalRounds = 7;  // the fewest that pass BigCrush, in the paper above

struct PhiloxWords {
  std::uint32_t word[4];
};

// The key and counter word of one call; `state` is int64 [seed, step].
struct RandomState {
  std::uint32_t key0, key1, step;
};

BIDFMKD_BOTH RandomState random_state(const std::int64_t* state) {
  const auto seed = static_cast<std::uint64_t>(state[0]);
  return {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32),
          static_cast<std::uint32_t>(static_cast<std::uint64_t>(state[1]))};
}

struct Product {
  std::uint32_t low, high;
};

// Return the 64-bit product of two words as two words. On a GPU this is one instruction. It is
// written as assembly, since the compiler makes two additions more out of 64-bit arithmetic.
BIDFMKD_BOTH Product product(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__)
  Product p;
  asm("{ .reg .u64 wide; mul.wide.u32 wide, %2, %3; mov.b64 {%0, %1}, wide; }"
      : "=r"(p.low), "=r"(p.high)
      : "r"(a), "r"(b));
  return p;
#else
  const std::uint64_t wide = static_cast<std::uint64_t>(a) * b;
  return {static_cast<std::uint32_t>(wide), static_cast<std::uint32_t>(wide >> 32)};
#endif
}

// Return the four random words of counter `c`.
template <int kRounds>
BIDFMKD_BOTH PhiloxWords philox4x32(PhiloxWords c, std::uint32_t key0, std::uint32_t key1) {
  BIDFMKD_UNROLL
  for (int r = 0; r < kRounds; ++r) {
    const Product p0 = product(kPhiloxMultiplier0, c.word[0]),
                  p1 = product(kPhiloxMultiplier1, c.word[2]);
    c = {{p1.high ^ c.word[1] ^ key0, p1.low, p0.high ^ c.word[3] ^ key1, p0.low}};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return c;
}

}  // namespace bidfmkd
