// Writes points[0] = x and points[1 + k] = x + mu u_k. The lower bound on the time is the bandwidth
// of the stores.
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "lengths.h"
#include "level.h"
#include "parallel.h"
#include "rows.h"

namespace bidfmkd {
namespace BIDFMKD_LEVEL {
namespace {

constexpr std::int64_t kTile = 2048;  // elements whose words stay in the first-level cache
constexpr std::int64_t kStreamFromBytes =
    4ll << 20;  // larger outputs would evict all else from the cache
constexpr std::int64_t kStreamFromUnaligned =
    512;  // shorter pieces lose at their ends what streaming gains

// Write to[i] for i in [0, n): single elements up to the first aligned vector (if streaming), whole
// vectors, single elements at the end.
template <class Vector, class Single>
inline void write(float* to, std::int64_t n, bool streaming, const Vector& vector,
                  const Single& single) {
  std::int64_t i = 0;
  const std::int64_t past = reinterpret_cast<std::uintptr_t>(to) / sizeof(float) % kLanes;
  if (streaming && (past == 0 || n >= kStreamFromUnaligned)) {
    for (const std::int64_t head = past == 0 ? 0 : kLanes - past; i < head && i < n; ++i)
      to[i] = single(i);
    for (; i + kLanes <= n; i += kLanes) stream(to + i, vector(i));
  } else {
    for (; i + kLanes <= n; i += kLanes) store(to + i, vector(i));
  }
  for (; i < n; ++i) to[i] = single(i);
}

void copy_images(const float* x, std::int64_t n, float* out, bool streaming) {
  write(
      out, n, streaming, [&](std::int64_t i) { return load<Floats>(x + i); },
      [&](std::int64_t i) { return x[i]; });
}

// Rademacher directions. One word per element serves 32 directions (bit k % 32 is the sign of
// direction k), so the words are drawn once per tile and group and then read 32 times from the
// first-level cache. Each direction costs one pass of shift, mask, XOR, add and store.
void rademacher(const Drawing& drawing, const float* x, float* out, bool streaming,
                std::int64_t first_item, std::int64_t last_item) {
  const RandomState random = random_state(drawing.state);
  const std::int64_t d = drawing.geometry.n_elements, row = drawing.geometry.n_images * d;
  const std::int64_t tiles = (d + kTile - 1) / kTile;
  const float step = static_cast<float>(drawing.mu / std::sqrt(static_cast<double>(d)));
  const std::uint32_t step_bits = float_to_bits(step);
  const std::int64_t first = drawing.first_direction, last = first + drawing.num_directions;
  alignas(64) std::uint32_t words[kTile];
  for (std::int64_t item = first_item; item < last_item; ++item) {
    const std::int64_t image = item / tiles, start = item % tiles * kTile;
    const std::int64_t n = d - start < kTile ? d - start : kTile;
    const std::int64_t offset = image * d + start;
    const float* from = x + offset;
    copy_images(from, n, out + offset, streaming);
    for (std::int64_t group = first / 32; group * 32 < last; ++group) {
      fill_words<kSignRounds>(random, start, n,
                              static_cast<std::uint32_t>(drawing.first_image + image),
                              static_cast<std::uint32_t>(group), words);
      const std::int64_t from_k = group * 32 < first ? first : group * 32;
      const std::int64_t to_k = group * 32 + 32 < last ? group * 32 + 32 : last;
      for (std::int64_t k = from_k; k < to_k; ++k) {
        const int shift = 31 - static_cast<int>(k % 32);  // moves the direction's bit to the sign
        float* to = out + (1 + k - first) * row + offset;
        write(
            to, n, streaming,
            [&](std::int64_t i) {
              const Words sign = (load<Words>(words + i) << shift) & 0x80000000u;
              const Words moved = sign ^ step_bits;
              return load<Floats>(from + i) + as<Floats>(moved);
            },
            [&](std::int64_t i) {
              return from[i] + bits_to_float(((words[i] << shift) & 0x80000000u) ^ step_bits);
            });
      }
    }
  }
  finish_streaming();
}

// Directions made of normals. A direction's length is known only after it has been drawn whole, so
// each row is written while the next one is drawn: stores and arithmetic overlap.
template <class Row>
void rows(const Drawing& drawing, const float* x, float* out, double* lengths, bool streaming,
          std::int64_t first_item, std::int64_t last_item) {
  const std::int64_t n_images = drawing.geometry.n_images, d = drawing.geometry.n_elements;
  Row row(drawing);
  const float* from = nullptr;  // the image of the row that is drawn but not yet written
  float* to = nullptr;
  float scale = 0.0f;
  const auto write_part = [&](std::int64_t first, std::int64_t last) {
    if (to == nullptr) return;
    write(
        to + first, last - first, streaming,
        [&](std::int64_t i) {
          const Floats moved = row.vector(first + i) * scale;
          return load<Floats>(from + first + i) + moved;
        },
        [&](std::int64_t i) { return from[first + i] + row.single(first + i) * scale; });
  };
  for (std::int64_t item = first_item; item < last_item; ++item) {
    const std::int64_t image = item % n_images, k = item / n_images - 1;
    if (k < 0) {
      copy_images(x + image * d, d, out + item * d, streaming);
      continue;
    }
    const double length =
        row.make(static_cast<std::uint32_t>(drawing.first_image + image),
                 static_cast<std::uint32_t>(drawing.first_direction + k), write_part);
    from = x + image * d;
    to = out + item * d;
    scale = static_cast<float>(drawing.mu / length);
    lengths[k * n_images + image] = length;
  }
  write_part(0, d);
  finish_streaming();
}

}  // namespace

void perturb(const Drawing& drawing, const float* x, float* out, int n_threads) {
  const std::int64_t n_images = drawing.geometry.n_images, d = drawing.geometry.n_elements;
  const std::int64_t n_rows = n_images * (1 + drawing.num_directions);
  if (n_rows == 0 || d == 0) return;
  const bool streaming = n_rows * d * 4 >= kStreamFromBytes;
  const bool signs = drawing.geometry.directions == Directions::kRademacher;
  if (signs) {
    parallel_ranges(n_images * ((d + kTile - 1) / kTile), n_threads,
                    [&](std::int64_t first, std::int64_t last) {
                      rademacher(drawing, x, out, streaming, first, last);
                    });
    return;
  }
  std::vector<double> lengths(static_cast<std::size_t>(n_rows - n_images));
  const bool lowres = drawing.geometry.directions == Directions::kLowres;
  parallel_ranges(n_rows, n_threads, [&](std::int64_t first, std::int64_t last) {
    (lowres ? rows<FieldRow> : rows<NormalRow>)(drawing, x, out, lengths.data(), streaming, first,
                                                last);
  });
  if (drawing.geometry.directions == Directions::kSphere) keep_lengths(drawing, std::move(lengths));
}

void stream_fill(float value, std::int64_t n, float* out, int n_threads) {
  constexpr std::int64_t kBlock = 4096;  // whole vectors: every block is as aligned as `out`
  const Floats values = Floats{} + value;
  parallel_ranges((n + kBlock - 1) / kBlock, n_threads, [&](std::int64_t first, std::int64_t last) {
    const std::int64_t start = first * kBlock, end = last * kBlock < n ? last * kBlock : n;
    write(
        out + start, end - start, true, [&](std::int64_t) { return values; },
        [&](std::int64_t) { return value; });
    finish_streaming();
  });
}

}  // namespace BIDFMKD_LEVEL
}  // namespace bidfmkd
