// gradient[b] = s / (q mu) * sum_k differences[k, b] u_kb, with the directions drawn again instead of read back, so that
// next to nothing goes through memory. Every sum has one order: the same input gives the same bits.
#include <cmath>

#include "rows.cuh"

namespace bidfmkd {
namespace cuda {
namespace {

constexpr const char* kOp = "estimate_gradient";
constexpr int kSlices = 8;  // warps of a block that share the directions of the same elements

// sums[] of the slices added up: element e of the block's `kWarp * size` to total(e), called by all threads in turns.
template <int size, class Total>
__device__ __forceinline__ void add_slices(float (&partial)[kSlices][kWarp * size], const float (&sums)[size],
                                           const Total& total) {
#pragma unroll
  for (int i = 0; i < size; ++i) partial[threadIdx.y][threadIdx.x * size + i] = sums[i];
  __syncthreads();
  for (int e = threadIdx.y * kWarp + threadIdx.x; e < kWarp * size; e += blockDim.y * kWarp) {
    float sum = 0.0f;
    for (unsigned slice = 0; slice < blockDim.y; ++slice) sum += partial[slice][e];
    total(e, sum);
  }
}

// A thread has four elements and every blockDim.y-th group of 32 directions: one call of Philox for 128 signs. The
// coefficients of a group are read by the warp at once and then from shared memory.
__global__ void __launch_bounds__(kWarp* kSlices)
    gradient_signs(Drawing drawing, std::int64_t tiles, float factor, const float* __restrict__ differences,
                   float* __restrict__ gradient) {
  __shared__ float coefficients[kSlices][32];
  __shared__ float partial[kSlices][kWarp * 4];
  const std::int64_t n_images = drawing.geometry.n_images, d = drawing.geometry.n_elements;
  const std::int64_t image = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const RandomState random = random_state(drawing.state);
  const std::int64_t first = drawing.first_direction, last = first + drawing.num_directions;
  float sums[4] = {};
  for (std::int64_t group = first / 32 + threadIdx.y; 32 * group < last; group += blockDim.y) {
    const std::int64_t k = 32 * group + threadIdx.x;
    __syncwarp();
    coefficients[threadIdx.y][threadIdx.x] = k >= first && k < last ? differences[(k - first) * n_images + image] : 0.0f;
    __syncwarp();
    const PhiloxWords words = philox4x32({{static_cast<std::uint32_t>(tile * kWarp + threadIdx.x),
                                           static_cast<std::uint32_t>(drawing.first_image + image),
                                           static_cast<std::uint32_t>(group), random.step}},
                                         random.key0, random.key1, kSignRounds);
#pragma unroll
    for (int bit = 0; bit < 32; ++bit) {
      const std::uint32_t c = float_to_bits(coefficients[threadIdx.y][bit]);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] += bits_to_float(((words.word[i] << (31 - bit)) & 0x80000000u) ^ c);
    }
  }
  const std::int64_t start = tile * kWarp * 4;
  add_slices<4>(partial, sums, [&](int e, float sum) {
    if (start + e < d) gradient[image * d + start + e] = factor * sum;
  });
}

// coefficients[k, b] = scale * differences[k, b] / |row|; a block makes one.
template <class Row>
__global__ void __launch_bounds__(256)
    row_coefficients(Drawing drawing, float scale, const float* differences, float* coefficients) {
  __shared__ typename Row::Staging staging;
  __shared__ float partial[kWarp];
  const std::int64_t n_images = drawing.geometry.n_images, d = drawing.geometry.n_elements;
  const Row row(drawing, blockIdx.x % n_images, blockIdx.x / n_images, staging);
  float squares = 0.0f;
  for (std::int64_t i = threadIdx.x; 8 * i < d; i += blockDim.x) squares += sum_of_squares(row.octet(i));
  const float length = sqrtf(block_sum(squares, partial));
  if (threadIdx.x == 0) coefficients[blockIdx.x] = scale * differences[blockIdx.x] / length;
}

// sums[b] = factor * sum_k coefficients[k, b] normals_kb, n normals a row: the gradient, or that of the fields.
__global__ void __launch_bounds__(kWarp* kSlices)
    sum_normals(Drawing drawing, std::int64_t n, std::int64_t tiles, float factor, const float* __restrict__ coefficients,
                float* __restrict__ sums) {
  __shared__ float partial[kSlices][kWarp * 8];
  const std::int64_t n_images = drawing.geometry.n_images;
  const std::int64_t image = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const RandomState random = random_state(drawing.state);
  float own[8] = {};
  for (std::int64_t k = threadIdx.y; k < drawing.num_directions; k += blockDim.y) {
    const float c = coefficients[k * n_images + image];
    const Octet octet = normal_octet(random, tile * kWarp + threadIdx.x,
                                     static_cast<std::uint32_t>(drawing.first_image + image),
                                     static_cast<std::uint32_t>(drawing.first_direction + k));
#pragma unroll
    for (int i = 0; i < 8; ++i) own[i] += c * octet.value[i];
  }
  const std::int64_t start = tile * kWarp * 8;
  add_slices<8>(partial, own, [&](int e, float sum) {
    if (start + e < n) sums[image * n + start + e] = factor * sum;
  });
}

// Upsampling is linear, so the fields' sum is upsampled once for all directions.
__global__ void upsample(Geometry geometry, const float* __restrict__ fields, float* __restrict__ gradient) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= geometry.n_images * geometry.n_elements) return;
  const std::int64_t line = i / geometry.width, plane = line / geometry.height;
  const LinearTap column = linear_tap(i % geometry.width, geometry.width, geometry.grid);
  const LinearTap row = linear_tap(line % geometry.height, geometry.height, geometry.grid);
  gradient[i] = upsampled(column, row, plane, geometry.grid, [&](std::int64_t normal) { return fields[normal]; });
}

template <class Row>
void launch_coefficients(const Drawing& drawing, float scale, const float* differences, float* coefficients,
                         const Queue& queue) {
  const std::int64_t octets = ceil_divide(drawing.geometry.n_elements, 8);
  launch(kOp, queue, row_coefficients<Row>,
         {drawing.num_directions * drawing.geometry.n_images, dim3(octets < 256 ? whole_warps(octets) : 256)}, drawing,
         scale, differences, coefficients);
}

}  // namespace

void estimate_gradient(const Drawing& drawing, const float* differences, float* workspace, float* gradient,
                       const Queue& queue) {
  const Geometry& geometry = drawing.geometry;
  const std::int64_t d = geometry.n_elements, n_images = geometry.n_images, q = drawing.num_directions;
  if (d == 0) return;
  const DeviceGuard guard(kOp, queue.device);
  const double span = static_cast<double>(geometry.n_random());
  const double scale = q == 0 ? 0.0 : span / (static_cast<double>(q) * drawing.mu);
  const bool signs = geometry.directions == Directions::kRademacher, gaussian = geometry.directions == Directions::kGaussian;
  const double fixed_length = signs ? std::sqrt(static_cast<double>(d)) : gaussian_length(d);
  const float factor = static_cast<float>(signs || gaussian ? scale / fixed_length : 1.0);
  if (signs) {
    const std::int64_t tiles = ceil_divide(d, 4 * kWarp), first = drawing.first_direction;
    const std::int64_t groups = q == 0 ? 1 : ceil_divide(first + q, 32) - first / 32;
    const unsigned slices = static_cast<unsigned>(groups < kSlices ? groups : kSlices);
    launch(kOp, queue, gradient_signs, {n_images * tiles, dim3(kWarp, slices)}, drawing, tiles, factor, differences,
           gradient);
    return;
  }
  const float* coefficients = gaussian ? differences : workspace;
  const float coefficient_scale = static_cast<float>(scale);
  if (geometry.directions == Directions::kSphere)
    launch_coefficients<NormalRow>(drawing, coefficient_scale, differences, workspace, queue);
  else if (geometry.directions == Directions::kLowres && FieldRow::fits(geometry))
    launch_coefficients<FieldRow>(drawing, coefficient_scale, differences, workspace, queue);
  else if (geometry.directions == Directions::kLowres)
    launch_coefficients<DrawnFieldRow>(drawing, coefficient_scale, differences, workspace, queue);

  const bool lowres = geometry.directions == Directions::kLowres;
  float* sums = lowres ? workspace + q * n_images : gradient;
  const std::int64_t n = geometry.n_random(), tiles = ceil_divide(n, 8 * kWarp);
  const unsigned slices = static_cast<unsigned>(q < 1 ? 1 : (q < kSlices ? q : kSlices));
  launch(kOp, queue, sum_normals, {n_images * tiles, dim3(kWarp, slices)}, drawing, n, tiles, factor, coefficients, sums);
  if (lowres)
    launch(kOp, queue, upsample, {ceil_divide(n_images * d, 256), dim3(256)}, geometry,
           static_cast<const float*>(sums), gradient);
}

}  // namespace cuda
}  // namespace bidfmkd
