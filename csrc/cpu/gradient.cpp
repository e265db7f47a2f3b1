// Computes gradient[b] = s / (q mu) * sum_k differences[k, b] u_kb. The directions are drawn again,
// since reading them back would cost q B d floats of memory traffic.
#include <cmath>
#include <vector>

#include "lengths.h"
#include "level.h"
#include "parallel.h"
#include "rows.h"

namespace bidfmkd {
namespace BIDFMKD_LEVEL {
namespace {

constexpr std::int64_t kTile = 2048;

// The sum over 32 signs is a sum of table look-ups. For each group of kTableBits directions, a
// table holds the signed sum of their coefficients for every pattern of sign bits: 32 signs then
// cost 8 (AVX2: 11, portable: 4) look-ups and additions instead of 32. Where the instruction set
// has a permute, a table is one register.
#if defined(__AVX512F__)
constexpr int kTableBits = 4;  // 16 entries fill one register, and one permute looks them up
#elif defined(__AVX2__)
constexpr int kTableBits = 3;
#else
constexpr int kTableBits = 8;  // no variable permute: the table lies in the first-level cache
#endif
constexpr int kTables = (32 + kTableBits - 1) / kTableBits;
constexpr int kEntries = 1 << kTableBits;

// Fill tables[t][pattern] with the sum of +-coefficients of group t, minus where the pattern's bit
// is set. Each bit doubles the table: its new half subtracts the coefficient, the old half adds it.
void make_tables(const float (&coefficients)[32], float (&tables)[kTables][kEntries]) {
  for (int t = 0; t < kTables; ++t) {
    tables[t][0] = 0.0f;
    for (int bit = 0, size = 1; bit < kTableBits; ++bit, size *= 2) {
      const int k = t * kTableBits + bit;
      const float c = k < 32 ? coefficients[k] : 0.0f;
      for (int entry = 0; entry < size; ++entry) {
        tables[t][entry + size] = tables[t][entry] - c;
        tables[t][entry] += c;
      }
    }
  }
}

// Add to sums[i] the signed coefficients that the bits of words[i] select.
void add_signs(const std::uint32_t* words, const float (&tables)[kTables][kEntries], std::int64_t n,
               float* sums) {
#if defined(__AVX2__)
  Floats table[kTables];
  for (int t = 0; t < kTables; ++t) table[t] = load<Floats>(tables[t]);
  for (std::int64_t i = 0; i < n; i += kLanes) {  // both arrays are padded to whole vectors
    const Words word = load<Words>(words + i);
    Floats a = load<Floats>(sums + i), b = {};
    for (int t = 0; t < kTables; t += 2) {
      a += look_up(table[t], word >> (t * kTableBits));
      if (t + 1 < kTables) b += look_up(table[t + 1], word >> ((t + 1) * kTableBits));
    }
    store(sums + i, a + b);
  }
#else
  for (std::int64_t i = 0; i < n; ++i) {
    float sum = 0.0f;
    for (int t = 0; t < kTables; ++t)
      sum += tables[t][(words[i] >> (t * kTableBits)) & (kEntries - 1)];
    sums[i] += sum;
  }
#endif
}

void rademacher(const Drawing& drawing, const float* differences, double scale, float* gradient,
                std::int64_t first_item, std::int64_t last_item) {
  const RandomState random = random_state(drawing.state);
  const std::int64_t n_images = drawing.geometry.n_images, d = drawing.geometry.n_elements;
  const std::int64_t tiles = (d + kTile - 1) / kTile;
  const std::int64_t first = drawing.first_direction, last = first + drawing.num_directions;
  const float factor = static_cast<float>(scale / std::sqrt(static_cast<double>(d)));
  alignas(64) std::uint32_t words[kTile];
  alignas(64) float sums[kTile];
  alignas(64) float tables[kTables][kEntries];
  for (std::int64_t item = first_item; item < last_item; ++item) {
    const std::int64_t image = item / tiles, start = item % tiles * kTile;
    const std::int64_t n = d - start < kTile ? d - start : kTile;
    for (float& sum : sums) sum = 0.0f;
    for (std::int64_t group = first / 32; group * 32 < last; ++group) {
      float coefficients[32];
      for (std::int64_t bit = 0; bit < 32; ++bit) {
        const std::int64_t k = group * 32 + bit;
        coefficients[bit] =
            k >= first && k < last ? differences[(k - first) * n_images + image] : 0.0f;
      }
      make_tables(coefficients, tables);
      fill_words<kSignRounds>(random, start, n,
                              static_cast<std::uint32_t>(drawing.first_image + image),
                              static_cast<std::uint32_t>(group), words);
      add_signs(words, tables, n, sums);
    }
    float* to = gradient + image * d + start;
    for (std::int64_t i = 0; i < n; ++i) to[i] = factor * sums[i];
  }
}

// Return the lengths that the directions are divided by, as doubles [q, n_images]: what perturb
// kept, or measured again by drawing every direction once more.
std::vector<double> lengths_of(const Drawing& drawing, int n_threads) {
  const std::int64_t n_images = drawing.geometry.n_images, q = drawing.num_directions;
  std::vector<double> lengths(static_cast<std::size_t>(q * n_images),
                              gaussian_length(drawing.geometry.n_elements));
  if (drawing.geometry.directions == Directions::kGaussian ||
      recall_lengths(drawing, lengths.data()))
    return lengths;
  parallel_ranges(q * n_images, n_threads, [&](std::int64_t first, std::int64_t last) {
    NormalRow row(drawing);
    for (std::int64_t item = first; item < last; ++item)
      lengths[static_cast<std::size_t>(item)] = row.make(
          static_cast<std::uint32_t>(drawing.first_image + item % n_images),
          static_cast<std::uint32_t>(drawing.first_direction + item / n_images), ignore_lost);
  });
  return lengths;
}

// Sphere and gaussian directions: the normals of one batch of elements are drawn for all directions
// in turn, so their sums stay in registers.
void normals(const Drawing& drawing, const float* differences, const double* lengths, double scale,
             float* gradient, std::int64_t first_item, std::int64_t last_item) {
  const RandomState random = random_state(drawing.state);
  const std::int64_t n_images = drawing.geometry.n_images, d = drawing.geometry.n_elements,
                     q = drawing.num_directions;
  const std::int64_t tiles = (d + kTile - 1) / kTile;
  const double small = scale / 65536.0;  // low_halves and high_halves return 2^16 times a normal
  std::vector<float> coefficients(static_cast<std::size_t>(q));
  for (std::int64_t item = first_item; item < last_item; ++item) {
    const std::int64_t image = item / tiles, start = item % tiles * kTile;
    const std::int64_t end = d < start + kTile ? d : start + kTile;
    for (std::int64_t k = 0; k < q; ++k)
      coefficients[static_cast<std::size_t>(k)] = static_cast<float>(
          small * differences[k * n_images + image] / lengths[k * n_images + image]);
    for (std::int64_t i = start; i < end; i += kNormalBatch) {
      Floats sums[4][2] = {};
      const auto block = static_cast<std::uint32_t>(i / 8);
      const auto of_image = static_cast<std::uint32_t>(drawing.first_image + image);
      draw_all(
          random, 0, q,
          [&](std::int64_t k) {
            return Batch{block, of_image, static_cast<std::uint32_t>(drawing.first_direction + k)};
          },
          [&](std::int64_t k, const Words(&drawn)[4]) {
            const float c = coefficients[static_cast<std::size_t>(k)];
            for (int part = 0; part < 4; ++part) {
              sums[part][0] += low_halves(drawn[part]) * c;
              sums[part][1] += high_halves(drawn[part]) * c;
            }
          });
      alignas(64) float batch[kNormalBatch];
      for (int part = 0; part < 4; ++part)
        store_in_turns(batch + part * 2 * kLanes, sums[part][0], sums[part][1]);
      const std::int64_t n = end - i < kNormalBatch ? end - i : kNormalBatch;
      std::memcpy(gradient + image * d + i, batch, sizeof(float) * static_cast<std::size_t>(n));
    }
  }
}

// Lowres directions: every interpolated row is added to the gradient.
void upsampled(const Drawing& drawing, const float* differences, double scale, float* gradient,
               std::int64_t first_image, std::int64_t last_image) {
  const std::int64_t n_images = drawing.geometry.n_images, d = drawing.geometry.n_elements;
  FieldRow row(drawing);
  for (std::int64_t image = first_image; image < last_image; ++image) {
    float* sums = gradient + image * d;
    for (std::int64_t i = 0; i < d; ++i) sums[i] = 0.0f;
    for (std::int64_t k = 0; k < drawing.num_directions; ++k) {
      const double length =
          row.make(static_cast<std::uint32_t>(drawing.first_image + image),
                   static_cast<std::uint32_t>(drawing.first_direction + k), ignore_lost);
      const float c = static_cast<float>(scale * differences[k * n_images + image] / length);
      for (std::int64_t i = 0; i < d; ++i) sums[i] += c * row.single(i);
    }
  }
}

}  // namespace

void estimate_gradient(const Drawing& drawing, const float* differences, float* gradient,
                       int n_threads) {
  const Geometry& geometry = drawing.geometry;
  const std::int64_t d = geometry.n_elements;
  if (geometry.n_images == 0 || d == 0) return;
  const double span = static_cast<double>(geometry.n_random());
  const double scale = drawing.num_directions
                           ? span / (static_cast<double>(drawing.num_directions) * drawing.mu)
                           : 0.0;
  if (geometry.directions == Directions::kLowres) {
    parallel_ranges(geometry.n_images, n_threads, [&](std::int64_t first, std::int64_t last) {
      upsampled(drawing, differences, scale, gradient, first, last);
    });
    return;
  }
  const bool signs = geometry.directions == Directions::kRademacher;
  const std::vector<double> lengths =
      signs ? std::vector<double>{} : lengths_of(drawing, n_threads);
  parallel_ranges(geometry.n_images * ((d + kTile - 1) / kTile), n_threads,
                  [&](std::int64_t first, std::int64_t last) {
                    if (signs)
                      rademacher(drawing, differences, scale, gradient, first, last);
                    else
                      normals(drawing, differences, lengths.data(), scale, gradient, first, last);
                  });
}

}  // namespace BIDFMKD_LEVEL
}  // namespace bidfmkd
