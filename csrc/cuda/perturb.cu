// points[0] = x, points[1 + k] = x + mu u_k. The limit is the bandwidth of the stores: each thread makes its random numbers
// once and keeps them in registers.
#include <cmath>

#include "rows.cuh"

namespace bidfmkd {
namespace cuda {
namespace {

constexpr const char* kOp = "perturb";
constexpr int kMostThreads = 256;

// Stores value(0), ..., value(3) at to[0, n), at once if they are all there and the rows allow it.
template <class Value>
__device__ __forceinline__ void store_four(float* to, std::int64_t n, bool vectors, const Value& value) {
  if (vectors) {
    *reinterpret_cast<float4*>(to) = make_float4(value(0), value(1), value(2), value(3));
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < n) to[i] = value(i);
}

__device__ __forceinline__ void load_four(const float* from, std::int64_t n, bool vectors, float (&values)[4]) {
  if (vectors) {
    const float4 all = *reinterpret_cast<const float4*>(from);
    values[0] = all.x, values[1] = all.y, values[2] = all.z, values[3] = all.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = i < n ? from[i] : 0.0f;
}

// A thread has four neighbouring elements, whose words hold the signs of 32 directions: one call of Philox, 32 stores that
// are whole lines together with the neighbours'. Grid: (image, tile of elements) x groups of 32 directions.
__global__ void __launch_bounds__(kMostThreads)
    perturb_signs(Drawing drawing, std::int64_t tiles, float step, bool vectors, const float* __restrict__ x,
                  float* __restrict__ out) {
  const std::int64_t d = drawing.geometry.n_elements, row = drawing.geometry.n_images * d;
  const std::int64_t image = blockIdx.x / tiles, quad = blockIdx.x % tiles * blockDim.x + threadIdx.x;
  const std::int64_t n = d - 4 * quad;
  if (n <= 0) return;
  const std::int64_t offset = image * d + 4 * quad;
  float from[4];
  load_four(x + offset, n, vectors, from);
  if (blockIdx.y == 0) store_four(out + offset, n, vectors, [&](int i) { return from[i]; });
  const RandomState random = random_state(drawing.state);
  const std::uint32_t step_bits = float_to_bits(step);
  const std::int64_t first = drawing.first_direction, last = first + drawing.num_directions;
  for (std::int64_t group = first / 32 + blockIdx.y; 32 * group < last; group += gridDim.y) {
    const PhiloxWords words =
        philox4x32({{static_cast<std::uint32_t>(quad), static_cast<std::uint32_t>(drawing.first_image + image),
                     static_cast<std::uint32_t>(group), random.step}},
                   random.key0, random.key1, kSignRounds);
    float* to = out + (1 + 32 * group - first) * row + offset;
#pragma unroll
    for (int bit = 0; bit < 32; ++bit, to += row) {
      if (32 * group + bit < first || 32 * group + bit >= last) continue;
      store_four(to, n, vectors, [&](int i) {
        return from[i] + bits_to_float(((words.word[i] << (31 - bit)) & 0x80000000u) ^ step_bits);
      });
    }
  }
}

__device__ void store_octet(const Octet& octet, float scale, std::int64_t index, std::int64_t d, bool vectors,
                            const float* x, float* to) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::int64_t start = 8 * index + 4 * half, n = d - start;
    if (n <= 0) return;
    float from[4];
    load_four(x + start, n, vectors, from);
    store_four(to + start, n, vectors, [&](int i) { return from[i] + scale * octet.value[4 * half + i]; });
  }
}

// A block makes one row of the output; the first rows are the images themselves. A thread has up to kHeld octets in
// registers; with kHeld = 0 any number, which it draws again once their length is known.
template <class Row, int kHeld>
__global__ void __launch_bounds__(kHeld == 0 ? kMostThreads : 1024)
    perturb_rows(Drawing drawing, bool vectors, const float* __restrict__ x, float* __restrict__ out) {
  __shared__ typename Row::Staging staging;
  __shared__ float partial[kWarp];
  const std::int64_t n_images = drawing.geometry.n_images, d = drawing.geometry.n_elements;
  const std::int64_t image = blockIdx.x % n_images, k = blockIdx.x / n_images - 1;
  const float* from = x + image * d;
  float* to = out + blockIdx.x * d;
  if (k < 0) {
    for (std::int64_t i = threadIdx.x; 8 * i < d; i += blockDim.x) store_octet(Octet{}, 0.0f, i, d, vectors, from, to);
    return;
  }
  const Row row(drawing, image, k, staging);
  const bool fixed_length = drawing.geometry.directions == Directions::kGaussian;
  Octet held[kHeld == 0 ? 1 : kHeld];
  float squares = 0.0f;
  if (kHeld == 0) {
    for (std::int64_t i = threadIdx.x; !fixed_length && 8 * i < d; i += blockDim.x) squares += sum_of_squares(row.octet(i));
  } else {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      held[h] = row.octet(threadIdx.x + h * static_cast<std::int64_t>(blockDim.x));
      squares += sum_of_squares(held[h]);
    }
  }
  const float length = fixed_length ? static_cast<float>(gaussian_length(d)) : sqrtf(block_sum(squares, partial));
  const float scale = static_cast<float>(drawing.mu) / length;
  if (kHeld == 0) {
    for (std::int64_t i = threadIdx.x; 8 * i < d; i += blockDim.x)
      store_octet(row.octet(i), scale, i, d, vectors, from, to);
  } else {
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
      store_octet(held[h], scale, threadIdx.x + h * static_cast<std::int64_t>(blockDim.x), d, vectors, from, to);
  }
}

template <class Row>
void launch_rows(const Drawing& drawing, bool vectors, const float* x, float* out, const Queue& queue) {
  const std::int64_t blocks = drawing.geometry.n_images * (1 + drawing.num_directions);
  if constexpr (Row::kHeld > 0) {
    const unsigned threads = whole_warps(ceil_divide(drawing.geometry.n_elements, 8 * Row::kHeld));
    if (threads <= 1024)
      return launch(kOp, queue, perturb_rows<Row, Row::kHeld>, {blocks, dim3(threads)}, drawing, vectors, x, out);
  }
  launch(kOp, queue, perturb_rows<Row, 0>, {blocks, dim3(kMostThreads)}, drawing, vectors, x, out);
}

}  // namespace

void perturb(const Drawing& drawing, const float* x, float* out, const Queue& queue) {
  const Geometry& geometry = drawing.geometry;
  const std::int64_t d = geometry.n_elements;
  if (d == 0) return;
  const DeviceGuard guard(kOp, queue.device);
  const bool vectors = d % 4 == 0 && aligned(x) && aligned(out);
  if (geometry.directions == Directions::kLowres) {
    if (FieldRow::fits(geometry)) return launch_rows<FieldRow>(drawing, vectors, x, out, queue);
    return launch_rows<DrawnFieldRow>(drawing, vectors, x, out, queue);
  }
  if (geometry.directions != Directions::kRademacher) return launch_rows<NormalRow>(drawing, vectors, x, out, queue);
  const std::int64_t quads = ceil_divide(d, 4);
  const unsigned threads = quads < kMostThreads ? whole_warps(quads) : kMostThreads;
  const std::int64_t tiles = ceil_divide(quads, threads);
  const std::int64_t first = drawing.first_direction, last = first + drawing.num_directions;
  const std::int64_t groups = drawing.num_directions == 0 ? 1 : ceil_divide(last, 32) - first / 32;
  const unsigned grid_rows = static_cast<unsigned>(groups < 65535 ? groups : 65535);
  const float step = static_cast<float>(drawing.mu / std::sqrt(static_cast<double>(d)));
  launch(kOp, queue, perturb_signs, {geometry.n_images * tiles, dim3(threads), grid_rows}, drawing, tiles, step, vectors, x,
         out);
}

}  // namespace cuda
}  // namespace bidfmkd
