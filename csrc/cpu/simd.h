// Vectors of one instruction set. The files that include this are compiled once for each: BIDFMKD_LEVEL names it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../random/philox.h"

namespace bidfmkd {
namespace BIDFMKD_LEVEL {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t Words __attribute__((vector_size(kLanes * 4)));

template <class Vector, class Scalar>
inline Vector load(const Scalar* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class Vector, class Scalar>
inline void store(Scalar* to, const Vector& v) {
  std::memcpy(to, &v, sizeof v);
}

// The same bits as another type.
template <class To, class From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as: sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// A store that leaves the cache alone; `to` must be aligned to the vector.
inline void stream(float* to, const Floats& v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, as<__m512>(v));
#elif defined(__AVX2__)
  _mm256_stream_ps(to, as<__m256>(v));
#elif defined(__SSE2__)
  _mm_stream_ps(to, as<__m128>(v));
#else
  store(to, v);
#endif
}

inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

inline Words broadcast(std::uint32_t value) { return Words{} + value; }

// The two halves of the 64-bit products of every lane with `m`.
inline void multiply_wide(const Words& a, std::uint32_t m, Words& high, Words& low) {
#if defined(__AVX512F__)
  // With a full mask: the plain forms trip over GCC's warning for its own undefined operand.
  constexpr __mmask8 kAll = 0xFF;
  const __m512i v = as<__m512i>(a), factor = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_maskz_mul_epu32(kAll, v, factor);
  const __m512i odd = _mm512_maskz_mul_epu32(kAll, _mm512_maskz_srli_epi64(kAll, v, 32), factor);
  low = as<Words>(_mm512_mask_blend_epi32(0xAAAA, even, _mm512_maskz_slli_epi64(kAll, odd, 32)));
  high = as<Words>(_mm512_mask_blend_epi32(0xAAAA, _mm512_maskz_srli_epi64(kAll, even, 32), odd));
#elif defined(__AVX2__)
  const __m256i v = as<__m256i>(a), factor = _mm256_set1_epi32(static_cast<int>(m));
  const __m256i even = _mm256_mul_epu32(v, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), factor);
  low = as<Words>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
  high = as<Words>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    const std::uint64_t product = static_cast<std::uint64_t>(a[lane]) * m;
    low[lane] = static_cast<std::uint32_t>(product);
    high[lane] = static_cast<std::uint32_t>(product >> 32);
  }
#endif
}

// Words a batch of philox makes at once: kLanes counters of 4 words.
constexpr std::int64_t kWordBatch = 4 * kLanes;

// The words of elements [4 * first_block, 4 * first_block + kWordBatch) in element order.
template <int rounds>
inline void philox_batch(const RandomState& random, std::uint32_t first_block, std::uint32_t image, std::uint32_t third,
                         std::uint32_t* words) {
  Words c0 = broadcast(first_block), c1 = broadcast(image), c2 = broadcast(third), c3 = broadcast(random.step);
  for (int lane = 0; lane < kLanes; ++lane) c0[lane] += static_cast<std::uint32_t>(lane);
  std::uint32_t key0 = random.key0, key1 = random.key1;
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 10
#endif
  for (int r = 0; r < rounds; ++r) {
    Words high0, low0, high1, low1;
    multiply_wide(c0, kPhiloxMultiplier0, high0, low0);
    multiply_wide(c2, kPhiloxMultiplier1, high1, low1);
    c0 = high1 ^ c1 ^ broadcast(key0);
    c1 = low1;
    c2 = high0 ^ c3 ^ broadcast(key1);
    c3 = low0;
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  std::uint32_t part[4][kLanes];
  store(part[0], c0);
  store(part[1], c1);
  store(part[2], c2);
  store(part[3], c3);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) words[4 * lane + i] = part[i][lane];
}

// Fills words[0, n) rounded up to whole batches; n starts at element `first`, a multiple of 4.
template <int rounds>
inline void fill_words(const RandomState& random, std::int64_t first, std::int64_t n, std::uint32_t image,
                       std::uint32_t third, std::uint32_t* words) {
  for (std::int64_t i = 0; i < n; i += kWordBatch)
    philox_batch<rounds>(random, static_cast<std::uint32_t>((first + i) / 4), image, third, words + i);
}

}  // namespace BIDFMKD_LEVEL
}  // namespace bidfmkd
