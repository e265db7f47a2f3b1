// Produces one direction of one image as a row of floats, for the kinds made of normals (sphere,
// gaussian, lowres).
#pragma once

#include <cmath>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace bidfmkd {
namespace BIDFMKD_LEVEL {

// The `before` argument of make() for callers that do not need the previous row any more.
constexpr auto ignore_lost = [](std::int64_t, std::int64_t) {};

inline std::size_t whole_batches(std::int64_t n) {
  return static_cast<std::size_t>((n + kNormalBatch - 1) / kNormalBatch * kNormalBatch);
}

// Sphere and gaussian: the row's elements are the normals themselves. The row is kept as 16-bit
// integers, so that half as many bytes move through the cache as with floats.
class NormalRow {
 public:
  explicit NormalRow(const Drawing& drawing)
      : geometry_(drawing.geometry),
        random_(random_state(drawing.state)),
        row_(whole_batches(geometry_.n_elements)) {}

  // Draw the row and return the divisor that turns it into a direction: its length, or the fixed
  // gaussian length. The row itself is left undivided.
  //
  // before(first, last) is called before the elements [first, last) of the previous row are
  // overwritten, for all of them in order: perturb writes the previous row there, so that its
  // stores overlap with the drawing.
  template <class Before>
  double make(std::uint32_t image, std::uint32_t direction, const Before& before) {
    const std::int64_t d = geometry_.n_elements;
    const double squares = fill_normals(
        random_, d, image, direction, row_.data(),
        [&](std::int64_t i) { before(i, i + kNormalBatch < d ? i + kNormalBatch : d); });
    return geometry_.directions == Directions::kGaussian ? gaussian_length(d) : std::sqrt(squares);
  }

  Floats vector(std::int64_t i) const { return widen(row_.data() + i); }
  float single(std::int64_t i) const { return row_[static_cast<std::size_t>(i)]; }

 private:
  const Geometry geometry_;
  const RandomState random_;
  std::vector<std::int16_t> row_;
};

// Lowres: the row is interpolated from a field of normals. The member functions do what those of
// NormalRow do.
class FieldRow {
 public:
  explicit FieldRow(const Drawing& drawing)
      : geometry_(drawing.geometry),
        random_(random_state(drawing.state)),
        field_(whole_batches(geometry_.n_random())),
        wide_(static_cast<std::size_t>(geometry_.grid * geometry_.width)),
        row_(static_cast<std::size_t>(geometry_.n_elements)) {
    for (std::int64_t i = 0; i < geometry_.width; ++i)
      columns_.push_back(linear_tap(i, geometry_.width, geometry_.grid));
    for (std::int64_t i = 0; i < geometry_.height; ++i)
      lines_.push_back(linear_tap(i, geometry_.height, geometry_.grid));
  }

  template <class Before>
  double make(std::uint32_t image, std::uint32_t direction, const Before& before) {
    before(std::int64_t{0}, geometry_.n_elements);
    fill_normals(random_, geometry_.n_random(), image, direction, field_.data(),
                 [](std::int64_t) {});
    upsample();
    return std::sqrt(sum_of_squares());
  }

  Floats vector(std::int64_t i) const { return load<Floats>(row_.data() + i); }
  float single(std::int64_t i) const { return row_[static_cast<std::size_t>(i)]; }

 private:
  static constexpr std::int64_t kTile =
      4096;  // this many squares are added in float, tiles in double

  double sum_of_squares() const {
    const std::int64_t d = geometry_.n_elements;
    double total = 0.0;
    for (std::int64_t first = 0; first < d; first += kTile) {
      const std::int64_t last = first + kTile < d ? first + kTile : d;
      Floats sum = {};
      std::int64_t i = first;
      for (; i + kLanes <= last; i += kLanes) sum += vector(i) * vector(i);
      total += lane_sum(sum);
      for (; i < last; ++i) total += static_cast<double>(single(i)) * single(i);
    }
    return total;
  }

  void upsample() {
    const std::int64_t grid = geometry_.grid, width = geometry_.width;
    float* to = row_.data();
    for (std::int64_t channel = 0; channel < geometry_.channels; ++channel) {
      const std::int16_t* field = field_.data() + channel * grid * grid;
      for (std::int64_t y = 0; y < grid; ++y)
        for (std::int64_t x = 0; x < width; ++x) {
          const LinearTap& tap = columns_[static_cast<std::size_t>(x)];
          const float low = field[y * grid + tap.low], high = field[y * grid + tap.high];
          wide_[static_cast<std::size_t>(y * width + x)] = low + tap.weight_high * (high - low);
        }
      for (const LinearTap& tap : lines_) {
        const float* low = wide_.data() + tap.low * width;
        const float* high = wide_.data() + tap.high * width;
        for (std::int64_t x = 0; x < width; ++x)
          to[x] = low[x] + tap.weight_high * (high[x] - low[x]);
        to += width;
      }
    }
  }

  const Geometry geometry_;
  const RandomState random_;
  std::vector<std::int16_t> field_;
  std::vector<float> wide_, row_;
  std::vector<LinearTap> columns_, lines_;
};

}  // namespace BIDFMKD_LEVEL
}  // namespace bidfmkd
