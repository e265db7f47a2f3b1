// Wraps the vectors of one instruction set. The files that include this header are compiled once
// for each set, in the namespace BIDFMKD_LEVEL. Plain arithmetic uses GCC vector types; only wide
// multiplication, shuffles and streaming stores name an instruction.
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

// Return the same bits as another type of the same size.
template <class To, class From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as: sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Store a vector past the cache; `to` must be aligned to the vector.
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

#if defined(__AVX2__)
// Return table[index % kLanes] in every lane. The instruction is named, since GCC and Clang have no
// common built-in function for it.
inline Floats look_up(const Floats& table, const Words& index) {
#if defined(__AVX512F__)
  return as<Floats>(_mm512_maskz_permutexvar_ps(0xFFFF, as<__m512i>(index), as<__m512>(table)));
#else
  return as<Floats>(_mm256_permutevar8x32_ps(as<__m256>(table), as<__m256i>(index)));
#endif
}
#endif

inline Words broadcast(std::uint32_t value) { return Words{} + value; }

typedef std::uint64_t Longs __attribute__((vector_size(kLanes * 4)));

// Multiply the low 32 bits of every 64-bit lane by `m`; the products have 64 bits.
inline Longs multiply_low(const Longs& a, std::uint32_t m) {
#if defined(__AVX512F__)
  // The masked form: GCC warns about an undefined operand inside its own plain form.
  return as<Longs>(_mm512_maskz_mul_epu32(0xFF, as<__m512i>(a), _mm512_set1_epi64(m)));
#elif defined(__AVX2__)
  return as<Longs>(_mm256_mul_epu32(as<__m256i>(a), _mm256_set1_epi64x(m)));
#elif defined(__SSE2__)
  return as<Longs>(_mm_mul_epu32(as<__m128i>(a), _mm_set1_epi64x(m)));
#else
  return (a & 0xFFFFFFFFu) * static_cast<std::uint64_t>(m);
#endif
}

// Transpose 4x4 squares of words: the four vectors are the rows of the squares, and every 128 bits
// hold one square. Philox computes word i of many counters in vector i; after this the four words
// of a counter lie side by side.
inline void transpose_squares(Words (&v)[4]) {
#if defined(__AVX512F__)
  constexpr __mmask16 kAll = 0xFFFF;
  constexpr __mmask8 kAll64 = 0xFF;
  const __m512i a = as<__m512i>(v[0]), b = as<__m512i>(v[1]), c = as<__m512i>(v[2]),
                d = as<__m512i>(v[3]);
  const __m512i ab_low = _mm512_maskz_unpacklo_epi32(kAll, a, b),
                ab_high = _mm512_maskz_unpackhi_epi32(kAll, a, b);
  const __m512i cd_low = _mm512_maskz_unpacklo_epi32(kAll, c, d),
                cd_high = _mm512_maskz_unpackhi_epi32(kAll, c, d);
  v[0] = as<Words>(_mm512_maskz_unpacklo_epi64(kAll64, ab_low, cd_low));
  v[1] = as<Words>(_mm512_maskz_unpackhi_epi64(kAll64, ab_low, cd_low));
  v[2] = as<Words>(_mm512_maskz_unpacklo_epi64(kAll64, ab_high, cd_high));
  v[3] = as<Words>(_mm512_maskz_unpackhi_epi64(kAll64, ab_high, cd_high));
#elif defined(__AVX2__)
  const __m256i a = as<__m256i>(v[0]), b = as<__m256i>(v[1]), c = as<__m256i>(v[2]),
                d = as<__m256i>(v[3]);
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

// Number of words that one batch of Philox makes: kLanes counters with 4 words each.
constexpr std::int64_t kWordBatch = 4 * kLanes;

// The order in which a batch numbers its counters: position p has counter kLanes / 4 * (p % 4) + p
// / 4, so that the counters are in sequence after transpose_squares. Even positions form the first
// vector of 64-bit lanes and odd positions the second.
struct CounterOrder {
  std::uint64_t offset[2][kLanes / 2];
  constexpr CounterOrder() : offset{} {
    for (int p = 0; p < kLanes; ++p)
      offset[p % 2][p / 2] = static_cast<std::uint64_t>(kLanes / 4 * (p % 4) + p / 4);
  }
};
constexpr CounterOrder kCounterOrder;

// Batches computed side by side where there are registers for them: a single one would wait for the
// latency of its multiplications.
#if defined(__AVX512F__)
constexpr int kTogether = 2;
#else
constexpr int kTogether = 1;
#endif

// The counter words that a batch has in common, and its first counter.
struct Batch {
  std::uint32_t first_block, image, third;
};

// Compute, for each of n batches, the words of the counters first_block, ..., first_block + kLanes
// - 1, in order: four vectors with kLanes / 4 counters each.
template <int rounds, int n>
inline void philox_batches(const RandomState& random, const Batch (&batches)[n],
                           Words (&words)[n][4]) {
  // One counter word per 64-bit lane. multiply_low reads only the low half of a lane, so the halves
  // of a product serve as the next round's words without being separated.
  Longs c0[2 * n], c1[2 * n], c2[2 * n], c3[2 * n];
  for (int half = 0; half < 2 * n; ++half) {
    const Batch& batch = batches[half / 2];
    c0[half] = load<Longs>(kCounterOrder.offset[half % 2]) + batch.first_block;
    c1[half] = Longs{} + batch.image;
    c2[half] = Longs{} + batch.third;
    c3[half] = Longs{} + random.step;
  }
  std::uint32_t key0 = random.key0, key1 = random.key1;
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 10
#endif
  for (int r = 0; r < rounds; ++r) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 4
#endif
    for (int half = 0; half < 2 * n; ++half) {
      const Longs p0 = multiply_low(c0[half], kPhiloxMultiplier0),
                  p1 = multiply_low(c2[half], kPhiloxMultiplier1);
      c0[half] = (p1 >> 32) ^ c1[half] ^ (Longs{} + key0);
      c1[half] = p1;
      c2[half] = (p0 >> 32) ^ c3[half] ^ (Longs{} + key1);
      c3[half] = p0;
    }
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  const auto merge = [](const Longs(&c)[2 * n], int i) {
    return as<Words>((c[2 * i] & 0xFFFFFFFFu) | (c[2 * i + 1] << 32));
  };
  for (int i = 0; i < n; ++i) {
    words[i][0] = merge(c0, i);
    words[i][1] = merge(c1, i);
    words[i][2] = merge(c2, i);
    words[i][3] = merge(c3, i);
    transpose_squares(words[i]);
  }
}

// Fill words[0, n), rounded up to kTogether whole batches, with the words of the elements from
// `first` on. `first` must be a multiple of 4.
template <int rounds>
inline void fill_words(const RandomState& random, std::int64_t first, std::int64_t n,
                       std::uint32_t image, std::uint32_t third, std::uint32_t* words) {
  for (std::int64_t i = 0; i < n; i += kTogether * kWordBatch) {
    Batch batches[kTogether];
    for (int b = 0; b < kTogether; ++b)
      batches[b] = {static_cast<std::uint32_t>((first + i + b * kWordBatch) / 4), image, third};
    Words made[kTogether][4];
    philox_batches<rounds>(random, batches, made);
    std::memcpy(words + i, made, sizeof made);
  }
}

#if defined(__AVX512BW__)
// The tables of normal_from_half, one vector per coefficient: a permutation looks up 32 segments at
// once.
struct SizeTables {
  alignas(64) std::int16_t cube[64], square[64], linear[64], constant[64], outermost[32];
  constexpr SizeTables() : cube{}, square{}, linear{}, constant{}, outermost{} {
    for (int i = 0; i < 64; ++i) {
      cube[i] = kSizeSegments[i].cube;
      square[i] = kSizeSegments[i].square;
      linear[i] = kSizeSegments[i].linear;
      constant[i] = kSizeSegments[i].constant;
    }
    for (int i = 0; i < 32; ++i) outermost[i] = kOutermostSizes[i];
  }
};
constexpr SizeTables kSizeTables;

// Apply normal_from_half to both 16-bit halves of every word.
inline Words normals_from_halves(const Words& words) {
  const __m512i bits =
      as<__m512i>(words | 0x80008000u);  // with this bit, bits >> 10 is 32 + the coarse segment
  const __mmask32 fine =
      _mm512_cmplt_epu16_mask(bits, _mm512_set1_epi16(static_cast<short>(0x8000 + kFineBelow)));
  const __mmask32 outer =
      _mm512_cmplt_epu16_mask(bits, _mm512_set1_epi16(static_cast<short>(0x8000 + kOutermost)));
  const __m512i segment = _mm512_mask_srli_epi16(_mm512_srli_epi16(bits, 10), fine, bits, 5);
  const __m512i t = _mm512_mask_slli_epi16(_mm512_slli_epi16(bits, 6), fine, bits, 11);
  const auto of_segment =
      [&segment](const std::int16_t (&table)[64]) {  // fine: upper half of the table
        return _mm512_permutex2var_epi16(load<__m512i>(table + 32), segment, load<__m512i>(table));
      };
  __m512i size = of_segment(kSizeTables.cube);
  size = _mm512_add_epi16(_mm512_mulhi_epi16(size, t), of_segment(kSizeTables.square));
  size = _mm512_add_epi16(_mm512_mulhi_epi16(size, t), of_segment(kSizeTables.linear));
  size = _mm512_add_epi16(_mm512_mulhi_epi16(size, t), of_segment(kSizeTables.constant));
  size = _mm512_mask_permutexvar_epi16(size, outer, bits, load<__m512i>(kSizeTables.outermost));
  const __mmask32 minus = _mm512_movepi16_mask(as<__m512i>(words));
  return as<Words>(_mm512_mask_sub_epi16(size, minus, _mm512_setzero_si512(), size));
}
#else
// All sizes of normals as a table of 64 KB, for instruction sets that cannot look up numbers in
// registers.
struct NormalTable {
  std::uint16_t of[1 << 15];
  constexpr NormalTable() : of{} {
    for (std::uint32_t half = 0; half < 1u << 15; ++half)
      of[half] = static_cast<std::uint16_t>(normal_from_half(half));
  }
};
inline constexpr NormalTable kNormalTable;

inline Words normals_from_halves(const Words& words) {
  typedef std::int16_t Shorts __attribute__((vector_size(kLanes * 4)));
  const Words places = words & 0x7FFF7FFFu;
  Words sizes;
  for (int lane = 0; lane < kLanes; ++lane)
    sizes[lane] = kNormalTable.of[places[lane] & 0xFFFFu] |
                  static_cast<std::uint32_t>(kNormalTable.of[places[lane] >> 16]) << 16;
  const Shorts minus = as<Shorts>(words) >> 15;  // all ones where the sign bit is set, else 0
  return as<Words>((as<Shorts>(sizes) ^ minus) - minus);
}
#endif

typedef std::int32_t Integers __attribute__((vector_size(kLanes * 4)));

inline Floats to_floats(const Integers& v) { return __builtin_convertvector(v, Floats); }

// Return the signed low (high) halves of every lane, times 2^16: leaving the factor in saves a
// shift, and callers divide it out of their coefficients.
inline Floats low_halves(const Words& words) { return to_floats(as<Integers>(words << 16)); }
inline Floats high_halves(const Words& words) {
  return to_floats(as<Integers>(words & 0xFFFF0000u));
}

// Return the kLanes 16-bit integers at `from` as floats.
inline Floats widen(const std::int16_t* from) {
  typedef std::int16_t Shorts __attribute__((vector_size(kLanes * 2)));
  return to_floats(__builtin_convertvector(load<Shorts>(from), Integers));
}

// Store the halves of a vector in the order of their elements: of every four words first the low
// halves, then the high ones.
inline void store_halves(std::int16_t* to, const Words& words) {
#if defined(__AVX512BW__)
  const __m512i order = _mm512_set4_epi32(0x0F0E0B0A, 0x07060302, 0x0D0C0908, 0x05040100);
  store(to, _mm512_shuffle_epi8(as<__m512i>(words), order));
#elif defined(__AVX2__)
  const __m256i order = _mm256_set_epi32(0x0F0E0B0A, 0x07060302, 0x0D0C0908, 0x05040100, 0x0F0E0B0A,
                                         0x07060302, 0x0D0C0908, 0x05040100);
  store(to, _mm256_shuffle_epi8(as<__m256i>(words), order));
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    to[lane] = static_cast<std::int16_t>(words[lane] & 0xFFFFu);
    to[kLanes + lane] = static_cast<std::int16_t>(words[lane] >> 16);
  }
#endif
}

// Add the squares of all halves to `sum`, exactly: integers in any order give the same bits.
inline void add_squares(const Words& words, Longs& sum) {
#if defined(__AVX512BW__)
  const Longs pairs = as<Longs>(_mm512_madd_epi16(as<__m512i>(words), as<__m512i>(words)));
#elif defined(__AVX2__)
  const Longs pairs = as<Longs>(_mm256_madd_epi16(as<__m256i>(words), as<__m256i>(words)));
#else
  const Integers low = as<Integers>(words << 16) >> 16, high = as<Integers>(words) >> 16;
  const Longs pairs =
      as<Longs>(low * low + high * high);  // at most 2 * 32437^2, which 31 bits hold
#endif
  sum += (pairs & 0xFFFFFFFFu) + (pairs >> 32);
}

// Store a and b alternately, four lanes at a time: a[0..3], b[0..3], a[4..7], ...
inline void store_in_turns(float* to, const Floats& a, const Floats& b) {
#if defined(__AVX512F__)
  const __m512d pairs_a = as<__m512d>(a), pairs_b = as<__m512d>(b);
  const __m512i first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0),
                last = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
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

// Number of normals that one batch of Philox makes: two per word.
constexpr std::int64_t kNormalBatch = 2 * kWordBatch;

inline double lane_sum(const Floats& v) {
  double total = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) total += static_cast<double>(v[lane]);
  return total;
}

// Draw n batches of kNormalBatch normals and call take(b, normals) with each, as 16-bit halves of
// words.
template <int n, class Take>
inline void draw_batches(const RandomState& random, const Batch (&batches)[n], const Take& take) {
  Words words[n][4];
  philox_batches<kNormalRounds>(random, batches, words);
  for (int b = 0; b < n; ++b) {
    for (Words& part : words[b]) part = normals_from_halves(part);
    take(b, words[b]);
  }
}

// Call draw_batches for the batches `first`, ..., `last` - 1, kTogether at once while that many are
// left.
template <class Of, class Take>
inline void draw_all(const RandomState& random, std::int64_t first, std::int64_t last,
                     const Of& batch_of, const Take& take) {
  std::int64_t i = first;
  for (; i + kTogether <= last; i += kTogether) {
    Batch batches[kTogether];
    for (int b = 0; b < kTogether; ++b) batches[b] = batch_of(i + b);
    draw_batches(random, batches, [&](int b, const Words(&normals)[4]) { take(i + b, normals); });
  }
  for (; i < last; ++i) {
    const Batch batches[1] = {batch_of(i)};
    draw_batches(random, batches, [&](int, const Words(&normals)[4]) { take(i, normals); });
  }
}

// Fill to[0, n), rounded up to whole batches, with normals from the first element on, and return
// the sum of the squares of to[0, n). before(i) is called before to[i, i + kNormalBatch) is
// written.
template <class Before>
inline double fill_normals(const RandomState& random, std::int64_t n, std::uint32_t image,
                           std::uint32_t direction, std::int16_t* to, const Before& before) {
  Longs squares = {};
  std::uint64_t total = 0;
  draw_all(
      random, 0, (n + kNormalBatch - 1) / kNormalBatch,
      [&](std::int64_t batch) {
        return Batch{static_cast<std::uint32_t>(batch * (kNormalBatch / 8)), image, direction};
      },
      [&](std::int64_t batch, const Words(&normals)[4]) {
        const std::int64_t first = batch * kNormalBatch;
        const bool whole = first + kNormalBatch <= n;
        before(first);
        for (int part = 0; part < 4; ++part) {
          store_halves(to + first + part * 2 * kLanes, normals[part]);
          if (whole) add_squares(normals[part], squares);
        }
        for (std::int64_t j = whole ? n : first; j < n; ++j)
          total += static_cast<std::uint64_t>(std::int32_t{to[j]} * to[j]);
      });
  for (int lane = 0; lane < kLanes / 2; ++lane) total += squares[lane];
  return static_cast<double>(total);
}

}  // namespace BIDFMKD_LEVEL
}  // namespace bidfmkd
