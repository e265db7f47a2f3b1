// Philox4x32 (Salmon et al., SC 2011): the counter-based generator behind every direction.
// One text for host and device; the CPU's vector version in cpu/simd.h follows the same rounds.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BIDFMKD_BOTH __host__ __device__ __forceinline__
#define BIDFMKD_UNROLL _Pragma("unroll")
#define BIDFMKD_ROLLED _Pragma("unroll 1")
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

// The seed and step a call draws from: `state` is int64 [seed, step].
struct RandomState {
  std::uint32_t key0, key1, step;
};

BIDFMKD_BOTH RandomState random_state(const std::int64_t* state) {
  const auto seed = static_cast<std::uint64_t>(state[0]);
  return {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32),
          static_cast<std::uint32_t>(static_cast<std::uint64_t>(state[1]))};
}

template <int kRounds>
BIDFMKD_BOTH PhiloxWords philox4x32(PhiloxWords c, std::uint32_t key0, std::uint32_t key1) {
  BIDFMKD_UNROLL
  for (int r = 0; r < kRounds; ++r) {
    const std::uint64_t p0 = static_cast<std::uint64_t>(kPhiloxMultiplier0) * c.word[0];
    const std::uint64_t p1 = static_cast<std::uint64_t>(kPhiloxMultiplier1) * c.word[2];
    c = {{static_cast<std::uint32_t>(p1 >> 32) ^ c.word[1] ^ key0, static_cast<std::uint32_t>(p1),
          static_cast<std::uint32_t>(p0 >> 32) ^ c.word[3] ^ key1, static_cast<std::uint32_t>(p0)}};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return c;
}

}  // namespace bidfmkd
