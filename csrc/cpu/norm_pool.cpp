// norm_pool and its first and second derivatives (see norm/norm_pool.h), each in two passes over x
// [N, H, W, C]. Threads divide the channels among them, and every sum belongs to one channel, so
// the result does not depend on the number of threads.
#include <cmath>
#include <vector>

#include "level.h"
#include "parallel.h"
#include "simd.h"

namespace bidfmkd {
namespace BIDFMKD_LEVEL {
namespace {

using Int = std::int64_t;
constexpr Int kChannelBlock = 16;

// Per-channel sums: one row of the image is added in float (a vector per step), row totals in
// double.
class Sums {
 public:
  explicit Sums(Int n)
      : row(static_cast<std::size_t>(n), 0.0f), total(static_cast<std::size_t>(n), 0.0) {}
  void finish_row() {
    for (std::size_t c = 0; c < row.size(); ++c) {
      total[c] += static_cast<double>(row[c]);
      row[c] = 0.0f;
    }
  }
  std::vector<float> row;
  std::vector<double> total;
};

// Some of the channels of images [N, H, W, C] and of their cells [N, H / 2, W / 2, C] (a cell is a
// 2x2 square that is pooled).
struct Slice {
  NormPoolShape shape;
  Int first, n;

  Int count() const { return shape.n_images * shape.height * shape.width; }

  // Call body(offset of the pixel, offset of its cell or -1, its place in the cell) for every
  // pixel, and end_of_row() after each row. -1: an odd last row or column belongs to no cell.
  template <class Body, class End>
  void pixels(const Body& body, const End& end_of_row) const {
    const Int cell_height = shape.height / 2, cell_width = shape.width / 2;
    for (Int image = 0; image < shape.n_images; ++image)
      for (Int y = 0; y < shape.height; ++y) {
        const Int row = (image * shape.height + y) * shape.width;
        const Int cell_row = (image * cell_height + y / 2) * cell_width;
        for (Int x = 0; x < shape.width; ++x) {
          const bool pooled = y / 2 < cell_height && x / 2 < cell_width;
          body((row + x) * shape.channels + first,
               pooled ? (cell_row + x / 2) * shape.channels + first : Int{-1},
               static_cast<std::int32_t>(y % 2 * 2 + x % 2));
        }
        end_of_row();
      }
  }

  // Call body(offset of the cell, offsets of its four pixels) for every cell, and end_of_row()
  // after each row of cells.
  template <class Body, class End>
  void cells(const Body& body, const End& end_of_row) const {
    const Int cell_height = shape.height / 2, cell_width = shape.width / 2;
    for (Int image = 0; image < shape.n_images; ++image)
      for (Int y = 0; y < cell_height; ++y) {
        for (Int x = 0; x < cell_width; ++x) {
          const Int corner =
              ((image * shape.height + 2 * y) * shape.width + 2 * x) * shape.channels + first;
          const Int below = corner + shape.width * shape.channels;
          const Int at[4] = {corner, corner + shape.channels, below, below + shape.channels};
          body(((image * cell_height + y) * cell_width + x) * shape.channels + first, at);
        }
        end_of_row();
      }
  }
};

template <class Function>
void over_channels(const NormPoolShape& shape, int n_threads, const Function& function) {
  const Int blocks = (shape.channels + kChannelBlock - 1) / kChannelBlock;
  parallel_ranges(blocks, n_threads, [&](Int first, Int last) {
    const Int start = first * kChannelBlock, end = last * kChannelBlock;
    function(Slice{shape, start, (end < shape.channels ? end : shape.channels) - start});
  });
}

// Compute G = sum g and K = sum g x^: sums over the cells that let the upstream gradient through.
void upstream_sums(const Slice& slice, const float* grad, const NormPoolSaved& saved, Sums& g,
                   Sums& k) {
  float *g_row = g.row.data(), *k_row = k.row.data();
  const std::int32_t* places = saved.place;
  const float* normalised = saved.normalised;
  slice.cells(
      [&](Int cell, const Int(&)[4]) {
        for (Int c = 0; c < slice.n; ++c) {
          const float upstream = grad[cell + c],
                      through = places[cell + c] == kInactive ? 0.0f : upstream;
          g_row[c] += through;
          k_row[c] += through * normalised[cell + c];
        }
      },
      [&] { g.finish_row(), k.finish_row(); });
}

// The addresses that pool_cell reads and writes, each at the first of its channels.
struct Cell {
  const float *p0, *p1, *p2, *p3;  // its four pixels
  const float *mean, *r, *scale, *shift;
  float* output;
  std::int32_t* place;
  float* normalised;
};

// Find the largest of four normalised pixels (the first on a tie) and its place, and apply ReLU,
// for one channel or a vector of channels at `c`.
template <class Float, class Integer>
inline void pool_lanes(const Cell& cell, Int c) {
  const Float mean = load<Float>(cell.mean + c), r = load<Float>(cell.r + c);
  const Float scale = load<Float>(cell.scale + c), shift = load<Float>(cell.shift + c);
  const Float n0 = (load<Float>(cell.p0 + c) - mean) * r,
              n1 = (load<Float>(cell.p1 + c) - mean) * r;
  const Float n2 = (load<Float>(cell.p2 + c) - mean) * r,
              n3 = (load<Float>(cell.p3 + c) - mean) * r;
  const Float y0 = n0 * scale + shift, y1 = n1 * scale + shift, y2 = n2 * scale + shift,
              y3 = n3 * scale + shift;
  const auto second = y1 > y0, fourth = y3 > y2;
  const Float upper = second ? y1 : y0, lower = fourth ? y3 : y2;
  const auto below = lower > upper;
  const Float best = below ? lower : upper;
  const Float upper_winner = second ? n1 : n0, lower_winner = fourth ? n3 : n2;
  const Integer none = Integer{} + kInactive, zero{};
  const Integer upper_place = second ? zero + 1 : zero, lower_place = fourth ? zero + 3 : zero + 2;
  const Integer place = below ? lower_place : upper_place;
  store(cell.output + c, best < 0.0f ? Float{} : best);  // NaN stays NaN
  store(cell.place + c, best > 0.0f ? place : none);
  store(cell.normalised + c, below ? lower_winner : upper_winner);
}

inline void pool_cell(const Cell& cell, Int n) {
  typedef std::int32_t Integers __attribute__((vector_size(kLanes * 4)));
  Int c = 0;
  for (; c + kLanes <= n; c += kLanes) pool_lanes<Floats, Integers>(cell, c);
  for (; c < n; ++c) pool_lanes<float, std::int32_t>(cell, c);
}

}  // namespace

void norm_pool(const NormPoolShape& shape, const float* x, const float* weight, const float* bias,
               double eps, float* y, const NormPoolSaved& saved, int n_threads) {
  over_channels(shape, n_threads, [&](const Slice& slice) {
    const Int n = slice.n, first = slice.first;
    const double count = static_cast<double>(slice.count());
    const float* origin =
        x + first;  // the first pixel: sums of differences to it lose no digits to a large mean
    Sums sum(n), square(n);
    float *sum_row = sum.row.data(), *square_row = square.row.data();
    slice.pixels(
        [&](Int pixel, Int, std::int32_t) {
          for (Int c = 0; c < n; ++c) {
            const float v = x[pixel + c] - origin[c];
            sum_row[c] += v;
            square_row[c] += v * v;
          }
        },
        [&] { sum.finish_row(), square.finish_row(); });
    std::vector<float> scale_of(static_cast<std::size_t>(n)), shift_of(scale_of), mean_of(scale_of),
        r_of(scale_of);
    for (Int c = 0; c < n; ++c) {
      const auto i = static_cast<std::size_t>(c);
      const double offset = sum.total[i] / count,
                   variance = square.total[i] / count - offset * offset;
      const double mean = offset + static_cast<double>(origin[c]);
      const double r = 1.0 / std::sqrt((variance < 0.0 ? 0.0 : variance) + eps);  // NaN stays NaN
      saved.mean[first + c] = mean_of[i] = static_cast<float>(mean);
      saved.r[first + c] = r_of[i] = static_cast<float>(r);
      scale_of[i] = weight[first + c];
      shift_of[i] = bias[first + c];
    }
    const float *scale = scale_of.data(), *shift = shift_of.data(), *mean = mean_of.data(),
                *r = r_of.data();
    slice.cells(
        [&](Int cell, const Int(&at)[4]) {
          pool_cell({x + at[0], x + at[1], x + at[2], x + at[3], mean, r, scale, shift, y + cell,
                     saved.place + cell, saved.normalised + cell},
                    n);
        },
        [] {});
  });
}

void norm_pool_backward(const NormPoolShape& shape, const float* grad, const float* x,
                        const float* weight, const NormPoolSaved& saved, float* grad_x,
                        float* grad_weight, float* grad_bias, int n_threads) {
  over_channels(shape, n_threads, [&](const Slice& slice) {
    const Int n = slice.n, first = slice.first;
    const double count = static_cast<double>(slice.count());
    Sums g(n), k(n);
    upstream_sums(slice, grad, saved, g, k);
    std::vector<float> direct_of(static_cast<std::size_t>(n)), slope_of(direct_of),
        shift_of(direct_of);
    for (Int c = 0; c < n; ++c) {
      const auto i = static_cast<std::size_t>(c);
      grad_bias[first + c] = static_cast<float>(g.total[i]);
      grad_weight[first + c] = static_cast<float>(k.total[i]);
      const NormPoolSlopes slopes =
          norm_pool_slopes(weight[first + c], saved.r[first + c], g.total[i], k.total[i], count);
      direct_of[i] = slopes.direct;
      slope_of[i] = slopes.slope;
      shift_of[i] = slopes.shift;
    }
    const float *direct = direct_of.data(), *slope = slope_of.data(), *shift = shift_of.data();
    const float *mean = saved.mean + first, *r = saved.r + first;
    const std::int32_t* places = saved.place;
    slice.pixels(
        [&](Int pixel, Int cell, std::int32_t place) {
          for (Int c = 0; c < n; ++c)
            grad_x[pixel + c] = (x[pixel + c] - mean[c]) * r[c] * slope[c] + shift[c];
          if (cell < 0) return;
          for (Int c = 0; c < n; ++c) {
            const float through =
                direct[c] * grad[cell + c];  // loaded in any case, so that the loop vectorises
            grad_x[pixel + c] += places[cell + c] == place ? through : 0.0f;
          }
        },
        [] {});
  });
}

void norm_pool_double_backward(const NormPoolShape& shape, const float* v, const float* p,
                               const float* s, const float* grad, const float* x,
                               const float* weight, const NormPoolSaved& saved, float* grad_grad,
                               float* grad_x, float* grad_weight, int n_threads) {
  over_channels(shape, n_threads, [&](const Slice& slice) {
    const Int n = slice.n, first = slice.first;
    const double count = static_cast<double>(slice.count());
    const float *mean = saved.mean + first, *r = saved.r + first;
    Sums g(n), k(n), sum_v(n), sum_u(n), sum_w(n);
    upstream_sums(slice, grad, saved, g, k);
    const std::int32_t* places = saved.place;
    float *v_row = sum_v.row.data(), *u_row = sum_u.row.data(), *w_row = sum_w.row.data();
    slice.pixels(
        [&](Int pixel, Int cell, std::int32_t place) {
          for (Int c = 0; c < n; ++c) {
            v_row[c] += v[pixel + c];
            u_row[c] += v[pixel + c] * ((x[pixel + c] - mean[c]) * r[c]);
          }
          if (cell < 0) return;
          for (Int c = 0; c < n; ++c) {
            const float through = v[pixel + c] * grad[cell + c];
            w_row[c] += places[cell + c] == place ? through : 0.0f;
          }
        },
        [&] { sum_v.finish_row(), sum_u.finish_row(), sum_w.finish_row(); });
    std::vector<float> a_of(static_cast<std::size_t>(n)), b_of(a_of), slope_of(a_of),
        shift_of(a_of), direct_of(a_of), tilt_of(a_of), level_of(a_of);
    for (Int c = 0; c < n; ++c) {
      const auto i = static_cast<std::size_t>(c);
      const NormPoolCurvature curve = norm_pool_curvature(
          weight[first + c], r[c], p[first + c], s[first + c],
          {g.total[i], k.total[i], sum_v.total[i], sum_u.total[i], sum_w.total[i]}, count);
      grad_weight[first + c] = curve.grad_weight;
      a_of[i] = curve.a;
      b_of[i] = curve.b;
      slope_of[i] = curve.slope;
      shift_of[i] = curve.shift;
      direct_of[i] = curve.direct;
      tilt_of[i] = curve.tilt;
      level_of[i] = curve.level;
    }
    const float *a = a_of.data(), *b = b_of.data(), *slope = slope_of.data(),
                *shift = shift_of.data();
    const float *direct = direct_of.data(), *tilt = tilt_of.data(), *level = level_of.data();
    slice.pixels(
        [&](Int pixel, Int cell, std::int32_t place) {
          for (Int c = 0; c < n; ++c)
            grad_x[pixel + c] =
                a[c] * v[pixel + c] + (x[pixel + c] - mean[c]) * r[c] * slope[c] + shift[c];
          if (cell < 0) return;
          for (Int c = 0; c < n; ++c) {
            const float through = b[c] * grad[cell + c];
            grad_x[pixel + c] += places[cell + c] == place ? through : 0.0f;
          }
        },
        [] {});
    float* __restrict result = grad_grad;
    const float* normalised = saved.normalised;
    slice.cells(
        [&](Int cell, const Int(&at)[4]) {
          for (Int c = 0; c < n; ++c) {
            const std::int32_t place = places[cell + c];
            const float v1 = v[at[1] + c], v2 = v[at[2] + c], v3 = v[at[3] + c];
            float winner = v[at[0] + c];
            winner = place == 1 ? v1 : winner;
            winner = place == 2 ? v2 : winner;
            winner = place == 3 ? v3 : winner;
            const float value = direct[c] * winner + tilt[c] * normalised[cell + c] + level[c];
            result[cell + c] = place == kInactive ? 0.0f : value;
          }
        },
        [] {});
  });
}

}  // namespace BIDFMKD_LEVEL
}  // namespace bidfmkd
