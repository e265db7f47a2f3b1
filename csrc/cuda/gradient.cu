// Computes gradient[b] = s / (q mu) * sum_k differences[k, b] u_kb.
//
// The directions are drawn again instead of being read back: q B d floats would have to be read
// otherwise, and drawing them costs less than that. Every sum is taken in one fixed order, so equal
// inputs give equal bits.
#include <cmath>

#include "lengths.cuh"

namespace bidfmkd {
namespace cuda {
namespace {

constexpr const char* kOp = "estimate_gradient";
constexpr int kSlices = 8;  // warps per block; they divide the directions of the same elements
constexpr int kTogether =
    2;  // directions measured between two barriers: block_sums adds two values

// Add up the partial sums of the block's warps and call total(e, sum) for each of its kWarp * size
// elements, spread over all threads.
template <int size, class Total>
__device__ __forceinline__ void add_slices(float (&partial)[kSlices][kWarp * size],
                                           const float (&sums)[size], const Total& total) {
#pragma unroll
  for (int i = 0; i < size; ++i) partial[threadIdx.y][threadIdx.x * size + i] = sums[i];
  __syncthreads();
  for (int e = threadIdx.y * kWarp + threadIdx.x; e < kWarp * size; e += blockDim.y * kWarp) {
    float sum = 0.0f;
    for (unsigned slice = 0; slice < blockDim.y; ++slice) sum += partial[slice][e];
    total(e, sum);
  }
}

// Rademacher directions. A thread owns four elements and every blockDim.y-th group of 32
// directions; one Philox call yields 128 signs. A warp loads the 32 coefficients of a group with
// one coalesced access and then reads them from shared memory, where all threads read the same
// address (a broadcast). The sign is applied to the coefficient by XOR.
__global__ void __launch_bounds__(kWarp* kSlices)
    gradient_signs(Drawing drawing, std::int64_t tiles, float factor,
                   const float* __restrict__ differences, float* __restrict__ gradient) {
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
    coefficients[threadIdx.y][threadIdx.x] =
        k >= first && k < last ? differences[(k - first) * n_images + image] : 0.0f;
    __syncwarp();
    const PhiloxWords words =
        philox4x32<kSignRounds>({{static_cast<std::uint32_t>(tile * kWarp + threadIdx.x),
                                  static_cast<std::uint32_t>(drawing.first_image + image),
                                  static_cast<std::uint32_t>(group), random.step}},
                                random.key0, random.key1);
#pragma unroll
    for (int bit = 0; bit < 32; ++bit) {
      const std::uint32_t c = float_to_bits(coefficients[threadIdx.y][bit]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[i] += bits_to_float(((words.word[i] << (31 - bit)) & 0x80000000u) ^ c);
    }
  }
  const std::int64_t start = tile * kWarp * 4;
  add_slices<4>(partial, sums, [&](int e, float sum) {
    if (start + e < d) gradient[image * d + start + e] = factor * sum;
  });
}

// Directions made of normals: sums[b] = scale * sum_k differences[k, b] normals_kb / |row k, b|.
//
// kMeasured: pieces are whole rows, so the block computes each length itself and every direction is
// drawn only once. Otherwise the lengths come from `inverse_lengths`; nullptr means that the
// divisor is part of `scale`.
//
// A share may begin in the middle of a piece's directions. The first block of a piece writes to
// `sums`, every other one to shares[block]; add_shares adds those afterwards in block order.
template <bool kMeasured>
__global__ void __launch_bounds__(kMostThreads)
    sum_normals(Drawing drawing, Pieces pieces, float scale, const float* __restrict__ differences,
                const float* __restrict__ inverse_lengths, float* __restrict__ shares,
                float* __restrict__ sums) {
  __shared__ float partial[2][kTogether][kWarp];
  auto& sizes = *reinterpret_cast<Sizes*>(dynamic_memory);
  copy_sizes(sizes);
  __syncthreads();
  const RandomState random = random_state(drawing.state);
  const std::int64_t n_images = drawing.geometry.n_images, end = pieces.begin(blockIdx.x + 1);
  bool odd = false;
  for (std::int64_t r = pieces.begin(blockIdx.x); r < end;) {
    const Place place(pieces, r, end);
    r += place.last - place.first;
    const std::int64_t index = place.tile * pieces.size / 8 + threadIdx.x;
    const auto image = static_cast<std::uint32_t>(drawing.first_image + place.image);
    auto direction = static_cast<std::uint32_t>(drawing.first_direction + place.first);
    std::int64_t at = place.first * n_images + place.image;
    float own[8] = {};
    for (auto left = static_cast<int>(place.last - place.first); left > 0; left -= kTogether) {
      Octet octets[kTogether];
      float c[kTogether];
#pragma unroll
      for (int t = 0; t < kTogether; ++t, at += n_images, ++direction) {
        c[t] = t < left ? scale * differences[at] : 0.0f;
        if (!kMeasured && inverse_lengths != nullptr && t < left) c[t] *= inverse_lengths[at];
        octets[t] =
            normal_octet(sizes, random, static_cast<std::uint32_t>(index), image, direction);
      }
      if (kMeasured) {
        odd = !odd;  // two buffers: a slow warp may still read the previous sums
        float squares[kTogether];
#pragma unroll
        for (int t = 0; t < kTogether; ++t) {
          cut_octet(octets[t], index, pieces.n);
          squares[t] = sum_of_squares(octets[t]);
        }
        block_sums(squares, partial[odd]);
#pragma unroll
        for (int t = 0; t < kTogether; ++t) c[t] = t < left ? c[t] * rsqrtf(squares[t]) : 0.0f;
      }
#pragma unroll
      for (int t = 0; t < kTogether; ++t)
#pragma unroll
        for (int i = 0; i < 8; ++i) own[i] += c[t] * octets[t].value[i];
    }
    float* to = place.first == 0 ? sums + place.image * pieces.n + 8 * index
                                 : shares + blockIdx.x * pieces.size + 8 * threadIdx.x;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (8 * index + i < pieces.n) to[i] = own[i];
  }
}

// Add to each piece what the blocks after its first one have summed, in the order of the blocks.
__global__ void add_shares(Pieces pieces, std::int64_t n_images, const float* __restrict__ shares,
                           float* __restrict__ sums) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n_images * pieces.n) return;
  const std::int64_t image = i / pieces.n, at = i % pieces.n;
  const std::int64_t first = (image * pieces.tiles + at / pieces.size) * pieces.points;
  std::int64_t block = first * pieces.blocks / pieces.rows;
  while (pieces.begin(block) <= first) ++block;
  float sum = sums[i];
  for (; pieces.begin(block) < first + pieces.points; ++block)
    sum += shares[block * pieces.size + at % pieces.size];
  sums[i] = sum;
}

// Lowres directions: bilinear interpolation is linear, so the weighted sum of the fields is
// interpolated once instead of every field.
__global__ void upsample(Geometry geometry, const float* __restrict__ fields,
                         float* __restrict__ gradient) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= geometry.n_images * geometry.n_elements) return;
  const std::int64_t line = i / geometry.width, plane = line / geometry.height;
  const LinearTap column = linear_tap(i % geometry.width, geometry.width, geometry.grid);
  const LinearTap row = linear_tap(line % geometry.height, geometry.height, geometry.grid);
  gradient[i] = upsampled(column, row, plane, geometry.grid,
                          [&](std::int64_t normal) { return fields[normal]; });
}

// Describes how the normals of one call are summed.
struct Plan {
  bool lowres, gaussian, measured;
  Pieces pieces;
  Grid grid;

  std::int64_t n_shares() const { return pieces.blocks * pieces.size; }
};

Plan plan_of(const Geometry& geometry, std::int64_t q) {
  Plan plan;
  plan.lowres = geometry.directions == Directions::kLowres;
  plan.gaussian = geometry.directions == Directions::kGaussian;
  plan.measured = geometry.directions == Directions::kSphere && seen_whole<NormalRow>(geometry);
  plan.grid =
      share_pieces(kOp, plan.measured ? sum_normals<true> : sum_normals<false>, geometry.n_images,
                   geometry.n_random(), q, plan.measured ? kMostThreads : kPieceThreads,
                   sizeof(Sizes), plan.pieces);
  return plan;
}

}  // namespace

std::int64_t gradient_workspace(const Geometry& geometry, std::int64_t num_directions, int device) {
  const std::int64_t n_differences = num_directions * geometry.n_images;
  if (geometry.directions == Directions::kRademacher || n_differences * geometry.n_elements == 0)
    return n_differences;
  const DeviceGuard guard(kOp, device);
  const Plan plan = plan_of(geometry, num_directions);
  return n_differences + plan.n_shares() + (plan.lowres ? geometry.n_images * plan.pieces.n : 0) +
         (plan.measured || plan.gaussian ? 0 : lengths_workspace(geometry, num_directions));
}

void estimate_gradient(const Drawing& drawing, const float* differences, float* workspace,
                       float* gradient, const Queue& queue) {
  const Geometry& geometry = drawing.geometry;
  const std::int64_t d = geometry.n_elements, n_images = geometry.n_images,
                     q = drawing.num_directions;
  if (n_images * d == 0) return;
  const DeviceGuard guard(kOp, queue.device);
  if (q == 0) {
    const std::size_t n_bytes = static_cast<std::size_t>(n_images * d) * sizeof(float);
    return check(cudaMemsetAsync(gradient, 0, n_bytes, static_cast<cudaStream_t>(queue.stream)),
                 kOp);
  }
  const double scale =
      static_cast<double>(geometry.n_random()) / (static_cast<double>(q) * drawing.mu);
  if (geometry.directions == Directions::kRademacher) {
    const std::int64_t tiles = ceil_divide(d, 4 * kWarp), first = drawing.first_direction;
    const std::int64_t groups = ceil_divide(first + q, 32) - first / 32;
    const unsigned slices = static_cast<unsigned>(groups < kSlices ? groups : kSlices);
    launch(kOp, queue, gradient_signs, {n_images * tiles, dim3(kWarp, slices)}, drawing, tiles,
           static_cast<float>(scale / std::sqrt(static_cast<double>(d))), differences, gradient);
    return;
  }
  const Plan plan = plan_of(geometry, q);
  float *shares = workspace + q * n_images, *lengths = nullptr, *fields = shares + plan.n_shares();
  if (!plan.measured && !plan.gaussian) {
    lengths = plan.lowres ? fields + n_images * plan.pieces.n : fields;
    measure_rows(kOp, drawing, lengths, queue);
  }
  float* sums = plan.lowres ? fields : gradient;
  launch(kOp, queue, plan.measured ? sum_normals<true> : sum_normals<false>, plan.grid, drawing,
         plan.pieces, static_cast<float>(plan.gaussian ? scale / float_gaussian_length(d) : scale),
         differences, static_cast<const float*>(lengths), shares, sums);
  launch(kOp, queue, add_shares, {ceil_divide(n_images * plan.pieces.n, 256), dim3(256)},
         plan.pieces, n_images, static_cast<const float*>(shares), sums);
  if (plan.lowres)
    launch(kOp, queue, upsample, {ceil_divide(n_images * d, 256), dim3(256)}, geometry,
           static_cast<const float*>(sums), gradient);
}

}  // namespace cuda
}  // namespace bidfmkd
