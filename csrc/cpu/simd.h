// Vectors of one instruction set. The files that include this are compiled once for each: BIDFMKD_LEVEL names it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../random/directions.h"

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

typedef std::uint64_t Longs __attribute__((vector_size(kLanes * 4)));

// The 64-bit products of the low halves of every lane with `m`.
inline Longs multiply_low(const Longs& a, std::uint32_t m) {
#if defined(__AVX512F__)
  // With a full mask: the plain form trips over GCC's warning for its own undefined operand.
  return as<Longs>(_mm512_maskz_mul_epu32(0xFF, as<__m512i>(a), _mm512_set1_epi64(m)));
#elif defined(__AVX2__)
  return as<Longs>(_mm256_mul_epu32(as<__m256i>(a), _mm256_set1_epi64x(m)));
#elif defined(__SSE2__)
  return as<Longs>(_mm_mul_epu32(as<__m128i>(a), _mm_set1_epi64x(m)));
#else
  return (a & 0xFFFFFFFFu) * static_cast<std::uint64_t>(m);
#endif
}

// Four vectors as rows of 4x4 squares of words, one square in every 128 bits; each square is transposed.
inline void transpose_squares(Words (&v)[4]) {
#if defined(__AVX512F__)
  constexpr __mmask16 kAll = 0xFFFF;
  constexpr __mmask8 kAll64 = 0xFF;
  const __m512i a = as<__m512i>(v[0]), b = as<__m512i>(v[1]), c = as<__m512i>(v[2]), d = as<__m512i>(v[3]);
  const __m512i ab_low = _mm512_maskz_unpacklo_epi32(kAll, a, b), ab_high = _mm512_maskz_unpackhi_epi32(kAll, a, b);
  const __m512i cd_low = _mm512_maskz_unpacklo_epi32(kAll, c, d), cd_high = _mm512_maskz_unpackhi_epi32(kAll, c, d);
  v[0] = as<Words>(_mm512_maskz_unpacklo_epi64(kAll64, ab_low, cd_low));
  v[1] = as<Words>(_mm512_maskz_unpackhi_epi64(kAll64, ab_low, cd_low));
  v[2] = as<Words>(_mm512_maskz_unpacklo_epi64(kAll64, ab_high, cd_high));
  v[3] = as<Words>(_mm512_maskz_unpackhi_epi64(kAll64, ab_high, cd_high));
#elif defined(__AVX2__)
  const __m256i a = as<__m256i>(v[0]), b = as<__m256i>(v[1]), c = as<__m256i>(v[2]), d = as<__m256i>(v[3]);
  const __m256i ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
  const __m256i cd_low = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
  v[0] = as<Words>(_mm256_unpacklo_epi64(ab_low, cd_low));
  v[1] = as<Words>(_mm256_unpackhi_epi64(ab_low, cd_low));
  v[2] = as<Words>(_mm256_unpacklo_epi64(ab_high, cd_high));
  v[3] = as<Words>(_mm256_unpackhi_epi64(ab_high, cd_high));
#else
  const Words a = v[0], b = v[1], c = v[2], d = v[3];
  for (int row = 0; row < 4; ++row) v[row] = Words{a[row], b[row], c[row], d[row]};
#endif
}

// Words that one batch of philox makes: kLanes counters of 4.
constexpr std::int64_t kWordBatch = 4 * kLanes;

// Counters as the transposition at the end of a batch wants them: kLanes / 4 * (p % 4) + p / 4 at position p. Odd positions
// are the second half of the 64-bit lanes.
struct CounterOrder {
  std::uint64_t offset[2][kLanes / 2];
  constexpr CounterOrder() : offset{} {
    for (int p = 0; p < kLanes; ++p) offset[p % 2][p / 2] = static_cast<std::uint64_t>(kLanes / 4 * (p % 4) + p / 4);
  }
};
constexpr CounterOrder kCounterOrder;

// The words of counters first_block, ..., first_block + kLanes - 1, in order: four vectors, each of kLanes / 4 counters.
template <int rounds>
inline void philox_batch(const RandomState& random, std::uint32_t first_block, std::uint32_t image, std::uint32_t third,
                         Words (&words)[4]) {
  // A counter fills a 64-bit lane, whose high half is never read: products need no taking apart.
  Longs c0[2], c1[2], c2[2], c3[2];
  for (int half = 0; half < 2; ++half) {
    c0[half] = load<Longs>(kCounterOrder.offset[half]) + first_block;
    c1[half] = Longs{} + image;
    c2[half] = Longs{} + third;
    c3[half] = Longs{} + random.step;
  }
  std::uint32_t key0 = random.key0, key1 = random.key1;
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 10
#endif
  for (int r = 0; r < rounds; ++r) {
    for (int half = 0; half < 2; ++half) {
      const Longs p0 = multiply_low(c0[half], kPhiloxMultiplier0), p1 = multiply_low(c2[half], kPhiloxMultiplier1);
      c0[half] = (p1 >> 32) ^ c1[half] ^ (Longs{} + key0);
      c1[half] = p1;
      c2[half] = (p0 >> 32) ^ c3[half] ^ (Longs{} + key1);
      c3[half] = p0;
    }
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  const auto merge = [](const Longs& even, const Longs& odd) { return as<Words>((even & 0xFFFFFFFFu) | (odd << 32)); };
  words[0] = merge(c0[0], c0[1]);
  words[1] = merge(c1[0], c1[1]);
  words[2] = merge(c2[0], c2[1]);
  words[3] = merge(c3[0], c3[1]);
  transpose_squares(words);
}

// Fills words[0, n) rounded up to whole batches; n starts at element `first`, a multiple of 4.
template <int rounds>
inline void fill_words(const RandomState& random, std::int64_t first, std::int64_t n, std::uint32_t image,
                       std::uint32_t third, std::uint32_t* words) {
  for (std::int64_t i = 0; i < n; i += kWordBatch) {
    Words batch[4];
    philox_batch<rounds>(random, static_cast<std::uint32_t>((first + i) / 4), image, third, batch);
    for (int part = 0; part < 4; ++part) store(words + i + part * kLanes, batch[part]);
  }
}

// normal_from_half of every lane, its sign in the top bit of `sign` and its other bits, doubled, in `twice`.
inline Floats quantile(const Words& twice, const Words& sign) {
  typedef std::int32_t Integers __attribute__((vector_size(kLanes * 4)));
  const Floats y = __builtin_convertvector(as<Integers>((twice & 0xFFFEu) | 1u), Floats);
  const Words column = as<Words>(y) >> 23;
#if defined(__AVX512F__)
  const auto coefficients = [&](int term) { return __builtin_shuffle(load<Floats>(kQuantile[term]), column); };
#elif defined(__AVX2__)
  const auto coefficients = [&](int term) {
    return __builtin_shuffle(load<Floats>(kQuantile[term]), load<Floats>(kQuantile[term] + 8), column);
  };
#else
  const auto coefficients = [&](int term) {
    Floats chosen;
    for (int lane = 0; lane < kLanes; ++lane) chosen[lane] = kQuantile[term][column[lane] % 16];
    return chosen;
  };
#endif
  Floats p = coefficients(0);
  for (int term = 1; term < kQuantileTerms; ++term) p = p * y + coefficients(term);
  return as<Floats>(as<Words>(p) ^ (sign & 0x80000000u));
}

// Stores a and b in turns of four lanes: a[0..3], b[0..3], a[4..7], ...
inline void store_in_turns(float* to, const Floats& a, const Floats& b) {
#if defined(__AVX512F__)
  const __m512d pairs_a = as<__m512d>(a), pairs_b = as<__m512d>(b);
  const __m512i first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), last = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  store(to, _mm512_permutex2var_pd(pairs_a, first, pairs_b));
  store(to + kLanes, _mm512_permutex2var_pd(pairs_a, last, pairs_b));
#elif defined(__AVX2__)
  store(to, _mm256_permute2f128_ps(as<__m256>(a), as<__m256>(b), 0x20));
  store(to + kLanes, _mm256_permute2f128_ps(as<__m256>(a), as<__m256>(b), 0x31));
#else
  store(to, a);
  store(to + kLanes, b);
#endif
}

// Normals that one batch of philox makes: two a word.
constexpr std::int64_t kNormalBatch = 2 * kWordBatch;

inline double lane_sum(const Floats& v) {
  double total = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) total += static_cast<double>(v[lane]);
  return total;
}

// Hands the normals of elements first, ..., first + kNormalBatch - 1 (first a multiple of 8) to take(part, low, high) in
// four parts, each of 2 kLanes elements in the order of store_in_turns.
template <class Take>
inline void draw_batch(const RandomState& random, std::int64_t first, std::uint32_t image, std::uint32_t direction,
                       const Take& take) {
  Words words[4];
  philox_batch<kNormalRounds>(random, static_cast<std::uint32_t>(first / 8), image, direction, words);
  for (int part = 0; part < 4; ++part) {
    const Words& word = words[part];
    take(part, quantile(word << 1, word << 16), quantile(word >> 15, word));
  }
}

// Fills to[0, n) rounded up to whole batches with normals, from the first element on; the sum of the squares of to[0, n).
// before(i) is called before to[i, i + kNormalBatch) is written.
template <class Before>
inline double fill_normals(const RandomState& random, std::int64_t n, std::uint32_t image, std::uint32_t direction,
                           float* to, const Before& before) {
  constexpr std::int64_t kSummed = 4096;  // added up in float before they go into the double
  double total = 0.0;
  Floats squares[2] = {};
  for (std::int64_t i = 0; i < n; i += kNormalBatch) {
    const bool whole = i + kNormalBatch <= n;
    before(i);
    draw_batch(random, i, image, direction, [&](int part, const Floats& low, const Floats& high) {
      store_in_turns(to + i + part * 2 * kLanes, low, high);
      if (!whole) return;
      squares[0] += low * low;
      squares[1] += high * high;
    });
    if (!whole)
      for (std::int64_t j = i; j < n; ++j) total += static_cast<double>(to[j]) * static_cast<double>(to[j]);
    if (!whole || (i + kNormalBatch) % kSummed == 0) {
      total += lane_sum(squares[0] + squares[1]);
      squares[0] = squares[1] = Floats{};
    }
  }
  total += lane_sum(squares[0] + squares[1]);
  return total;
}

}  // namespace BIDFMKD_LEVEL
}  // namespace bidfmkd
