// Writes points[0] = x and points[1 + k] = x + mu u_k.
//
// The lower bound on the time is the bandwidth of the stores: 150 x 3072 images with 100 directions
// write 186 MB, 58 us on an H100. So each thread draws its random numbers once, keeps them in
// registers, and all arithmetic hides behind the stores.
#include <cmath>

#include "lengths.cuh"

namespace bidfmkd {
namespace cuda {
namespace {

constexpr const char* kOp = "perturb";
constexpr int kSignThreads = 256;

// Store value(0), ..., value(3) to to[0], ..., to[3], as one 16-byte store if `vectors`; otherwise
// only the first n of them.
template <class Value>
__device__ __forceinline__ void store_four(float* to, std::int64_t n, bool vectors,
                                           const Value& value) {
  if (vectors) {
    *reinterpret_cast<float4*>(to) = make_float4(value(0), value(1), value(2), value(3));
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < n) to[i] = value(i);
}

// Load from[0], ..., from[3], as one 16-byte load if `vectors`; otherwise the first n, and 0 for
// the rest.
__device__ __forceinline__ void load_four(const float* from, std::int64_t n, bool vectors,
                                          float (&values)[4]) {
  if (vectors) {
    const float4 all = *reinterpret_cast<const float4*>(from);
    values[0] = all.x, values[1] = all.y, values[2] = all.z, values[3] = all.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = i < n ? from[i] : 0.0f;
}

// Rademacher directions: element j moves by +step or -step, step = mu / sqrt(d).
//
// A thread owns four neighbouring elements. One Philox call yields a 32-bit word for each of them;
// bit i of a word is the sign for direction 32 group + i. So one call serves 128 signs, and each of
// the 32 stores writes a whole cache line together with the neighbouring threads. The sign is
// applied by XOR: the wanted bit is shifted into the sign bit of `step`.
//
// Grid: x = image and tile of elements, y = group of 32 directions.
__global__ void __launch_bounds__(kSignThreads)
    perturb_signs(Drawing drawing, std::int64_t tiles, float step, bool vectors,
                  const float* __restrict__ x, float* __restrict__ out) {
  const std::int64_t d = drawing.geometry.n_elements, row = drawing.geometry.n_images * d;
  const std::int64_t image = blockIdx.x / tiles,
                     quad = blockIdx.x % tiles * blockDim.x + threadIdx.x;
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
    const PhiloxWords words = philox4x32<kSignRounds>(
        {{static_cast<std::uint32_t>(quad), static_cast<std::uint32_t>(drawing.first_image + image),
          static_cast<std::uint32_t>(group), random.step}},
        random.key0, random.key1);
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

// Says where the two halves (four elements each) of a thread's octet are read and written. With
// vector access, neighbouring threads exchange halves first, so that one store instruction of the
// pair fills a whole 32-byte sector.
struct Halves {
  std::int64_t index;
  bool vectors;

  __device__ __forceinline__ std::int64_t start(int half) const {
    return vectors ? 8 * (index - index % 2 + half) + 4 * (index % 2) : 8 * index + 4 * half;
  }
};

// Exchange the second half of an even thread's octet with the first half of the odd thread after
// it.
__device__ __forceinline__ void swap_fours(Octet& octet) {
  const bool odd = threadIdx.x % 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float got = __shfl_xor_sync(kEveryLane, odd ? octet.value[i] : octet.value[4 + i], 1);
    octet.value[i] = odd ? got : octet.value[i];
    octet.value[4 + i] = odd ? octet.value[4 + i] : got;
  }
}

// Load the elements of x that this thread will perturb, in the order in which store_octet writes
// them.
__device__ __forceinline__ Octet load_octet(const float* from, const Halves& halves,
                                            std::int64_t d) {
  Octet octet = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::int64_t start = halves.start(half);
    float four[4] = {};
    if (start < d) load_four(from + start, d - start, halves.vectors, four);
#pragma unroll
    for (int i = 0; i < 4; ++i) octet.value[4 * half + i] = four[i];
  }
  return octet;
}

// Write from + scale octet. All threads of a warp call this together, since they exchange halves.
__device__ __forceinline__ void store_octet(Octet octet, float scale, const Octet& from,
                                            const Halves& halves, std::int64_t d, float* to) {
  if (halves.vectors) swap_fours(octet);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::int64_t start = halves.start(half);
    if (start < d)
      store_four(to + start, d - start, halves.vectors, [&](int i) {
        return from.value[4 * half + i] + scale * octet.value[4 * half + i];
      });
  }
}

// Directions made of normals. A block works through its share of (piece, point); each thread owns
// one octet of the piece.
//
// kMeasured: pieces are whole rows, so the block computes the row's length itself. Otherwise the
// lengths are in `inverse_lengths`, or it is nullptr and the fixed length of gaussian directions
// applies.
template <class Row, bool kMeasured>
__global__ void __launch_bounds__(Row::kThreads)
    perturb_pieces(Drawing drawing, Pieces pieces, bool vectors,
                   const float* __restrict__ inverse_lengths, const float* __restrict__ x,
                   float* __restrict__ out) {
  __shared__ float partial[2][kWarp];
  auto& staging = *reinterpret_cast<typename Row::Staging*>(dynamic_memory);
  Row::prepare(drawing.geometry, staging);
  const RandomState random = random_state(drawing.state);
  const std::int64_t n_images = drawing.geometry.n_images, d = drawing.geometry.n_elements;
  const std::int64_t end = pieces.begin(blockIdx.x + 1);
  const auto mu = static_cast<float>(drawing.mu),
             fixed = static_cast<float>(1.0 / float_gaussian_length(d));
  bool odd = false;
  for (std::int64_t r = pieces.begin(blockIdx.x); r < end;) {
    const Place place(pieces, r, end);
    r += place.last - place.first;
    const Halves halves{place.tile * pieces.size / 8 + threadIdx.x, vectors};
    const Octet from = load_octet(x + place.image * d, halves, d);
    float* to = out + (place.first * n_images + place.image) * d;
    for (std::int64_t point = place.first; point < place.last; ++point, to += n_images * d) {
      if (point == 0) {
        store_octet(Octet{}, 0.0f, from, halves, d, to);
        continue;
      }
      const std::int64_t k = point - 1;
      const Octet octet = Row(drawing, random, place.image, k, staging).octet(halves.index);
      float inverse = fixed;
      if (kMeasured) {
        odd = !odd;  // two buffers: a slow warp may still read the previous point's sums
        inverse = rsqrtf(block_sum(sum_of_squares(octet), partial[odd]));
      } else if (inverse_lengths != nullptr) {
        inverse = inverse_lengths[k * n_images + place.image];
      }
      store_octet(octet, mu * inverse, from, halves, d, to);
    }
  }
}

template <class Row>
void launch_pieces(const Drawing& drawing, bool vectors, const float* x, float* workspace,
                   float* out, const Queue& queue) {
  const Geometry& geometry = drawing.geometry;
  const bool gaussian = geometry.directions == Directions::kGaussian,
             measured = !gaussian && seen_whole<Row>(geometry);
  if (takes_lengths<Row>(geometry)) measure_rows(kOp, drawing, workspace, queue);
  const auto kernel = measured ? perturb_pieces<Row, true> : perturb_pieces<Row, false>;
  Pieces pieces;
  const Grid grid =
      share_pieces(kOp, kernel, geometry.n_images, geometry.n_elements, 1 + drawing.num_directions,
                   measured ? Row::kThreads : kPieceThreads, sizeof(typename Row::Staging), pieces);
  launch(kOp, queue, kernel, grid, drawing, pieces, vectors,
         gaussian ? nullptr : static_cast<const float*>(workspace), x, out);
}

}  // namespace

std::int64_t perturb_workspace(const Geometry& geometry, std::int64_t num_directions) {
  const bool lengths = with_row(
      geometry, [&](auto which) { return takes_lengths<typename decltype(which)::Row>(geometry); });
  return lengths ? lengths_workspace(geometry, num_directions) : 0;
}

void perturb(const Drawing& drawing, const float* x, float* workspace, float* out,
             const Queue& queue) {
  const Geometry& geometry = drawing.geometry;
  const std::int64_t d = geometry.n_elements;
  if (geometry.n_images * d == 0) return;
  const DeviceGuard guard(kOp, queue.device);
  const bool vectors = d % 4 == 0 && aligned(x) && aligned(out);
  if (geometry.directions != Directions::kRademacher) {
    with_row(geometry, [&](auto which) {
      launch_pieces<typename decltype(which)::Row>(drawing, vectors, x, workspace, out, queue);
    });
    return;
  }
  const std::int64_t quads = ceil_divide(d, 4);
  const unsigned threads = quads < kSignThreads ? whole_warps(quads) : kSignThreads;
  const std::int64_t tiles = ceil_divide(quads, threads);
  const std::int64_t first = drawing.first_direction, last = first + drawing.num_directions;
  const std::int64_t groups = drawing.num_directions == 0 ? 1 : ceil_divide(last, 32) - first / 32;
  const unsigned grid_rows = static_cast<unsigned>(groups < 65535 ? groups : 65535);
  const float step = static_cast<float>(drawing.mu / std::sqrt(static_cast<double>(d)));
  launch(kOp, queue, perturb_signs, {geometry.n_images * tiles, dim3(threads), grid_rows}, drawing,
         tiles, step, vectors, x, out);
}

}  // namespace cuda
}  // namespace bidfmkd
