// One direction of one image as a row made of normals (sphere, gaussian, lowres), eight elements at a time. A block makes
// many: Row::prepare fills what they share in the block's memory, the constructor what one row needs there.
#pragma once

#include "block_sum.cuh"
#include "normals.cuh"

namespace bidfmkd {
namespace cuda {

// A row that is the normals themselves.
class NormalRow {
 public:
  static constexpr unsigned kThreads = kMostThreads;  // of a block, at most: more take more registers than there are
  struct Staging {
    Sizes sizes;
  };

  static __device__ void prepare(const Geometry&, Staging& staging) {
    copy_sizes(staging.sizes);
    __syncthreads();
  }

  __device__ NormalRow(const Drawing& drawing, const RandomState& random, std::int64_t image, std::int64_t k,
                       const Staging& staging)
      : sizes_(staging.sizes),
        random_(random),
        image_(static_cast<std::uint32_t>(drawing.first_image + image)),
        direction_(static_cast<std::uint32_t>(drawing.first_direction + k)),
        n_(drawing.geometry.n_elements) {}

  // 0 beyond the row's end.
  __device__ __forceinline__ Octet octet(std::int64_t index) const {
    Octet octet = normal_octet(sizes_, random_, static_cast<std::uint32_t>(index), image_, direction_);
    cut_octet(octet, index, n_);
    return octet;
  }

 private:
  const Sizes& sizes_;
  RandomState random_;
  std::uint32_t image_, direction_;
  std::int64_t n_;
};

__device__ __forceinline__ float lerp(float low, float high, float weight_high) { return low + weight_high * (high - low); }

// Bilinear between four normals of a field, given by their places in the row of normals.
template <class Normal>
__device__ __forceinline__ float upsampled(const LinearTap& column, const LinearTap& line, std::int64_t channel,
                                           std::int64_t grid, const Normal& normal) {
  const std::int64_t low = (channel * grid + line.low) * grid, high = (channel * grid + line.high) * grid;
  return lerp(lerp(normal(low + column.low), normal(low + column.high), column.weight_high),
              lerp(normal(high + column.low), normal(high + column.high), column.weight_high), line.weight_high);
}

// A row upsampled from a field of normals in shared memory, whose lines are stretched to the row's width first.
class FieldRow {
 public:
  static constexpr unsigned kThreads = kMostThreads;
  static constexpr int kMostNormals = 2048, kMostStretched = 8192, kMostTaps = 256;
  struct Staging {
    float stretched[kMostStretched];
    float field[kMostNormals];
    LinearTap columns[kMostTaps], lines[kMostTaps];
  };

  static bool fits(const Geometry& geometry) {
    return geometry.n_random() <= kMostNormals && geometry.channels * geometry.grid * geometry.width <= kMostStretched &&
           geometry.width <= kMostTaps && geometry.height <= kMostTaps;
  }

  static __device__ void prepare(const Geometry& geometry, Staging& staging) {
    for (unsigned i = threadIdx.x; i < geometry.width; i += blockDim.x)
      staging.columns[i] = linear_tap(i, geometry.width, geometry.grid);
    for (unsigned i = threadIdx.x; i < geometry.height; i += blockDim.x)
      staging.lines[i] = linear_tap(i, geometry.height, geometry.grid);
  }

  // All threads of the block together.
  __device__ FieldRow(const Drawing& drawing, const RandomState& random, std::int64_t image, std::int64_t k,
                      Staging& staging)
      : n_(static_cast<std::uint32_t>(drawing.geometry.n_elements)),  // what fits has fewer than 2^27
        width_(static_cast<std::uint32_t>(drawing.geometry.width)),
        height_(static_cast<std::uint32_t>(drawing.geometry.height)),
        grid_(static_cast<std::uint32_t>(drawing.geometry.grid)),
        staging_(staging) {
    const auto n_normals = static_cast<std::uint32_t>(drawing.geometry.n_random());
    for (unsigned i = threadIdx.x; 8 * i < n_normals; i += blockDim.x) {
      const Octet octet = normal_octet(kSizes, random, i, static_cast<std::uint32_t>(drawing.first_image + image),
                                       static_cast<std::uint32_t>(drawing.first_direction + k));
#pragma unroll
      for (unsigned j = 0; j < 8; ++j)
        if (8 * i + j < n_normals) staging.field[8 * i + j] = octet.value[j];
    }
    __syncthreads();  // also: no one reads the lines of the row before any more
    for (unsigned i = threadIdx.x; i < n_normals / grid_ * width_; i += blockDim.x) {
      const LinearTap column = staging.columns[i % width_];
      const float* line = staging.field + i / width_ * grid_;
      staging.stretched[i] = lerp(line[column.low], line[column.high], column.weight_high);
    }
    __syncthreads();
  }

  // 0 beyond the row's end.
  __device__ Octet octet(std::int64_t index) const {
    Octet octet;
    const auto first = static_cast<std::uint32_t>(8 * index);
    if (width_ % 8 == 0) {  // all of one line
      const Lines lines = lines_of(first);
      alignas(16) float low[8], high[8];
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        *reinterpret_cast<float4*>(low + i) = *reinterpret_cast<const float4*>(lines.low + i);
        *reinterpret_cast<float4*>(high + i) = *reinterpret_cast<const float4*>(lines.high + i);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) octet.value[i] = first < n_ ? lerp(low[i], high[i], lines.weight_high) : 0.0f;
    } else {
#pragma unroll
      for (std::uint32_t i = 0; i < 8; ++i) {
        const Lines lines = lines_of(first + i);
        octet.value[i] = first + i < n_ ? lerp(*lines.low, *lines.high, lines.weight_high) : 0.0f;
      }
    }
    return octet;
  }

 private:
  struct Lines {
    const float *low, *high;
    float weight_high;
  };

  __device__ __forceinline__ Lines lines_of(std::uint32_t j) const {
    j = j < n_ ? j : 0;
    const std::uint32_t line = j / width_, x = j % width_;
    const LinearTap tap = staging_.lines[line % height_];
    const float* field = staging_.stretched + line / height_ * grid_ * width_ + x;
    return {field + tap.low * width_, field + tap.high * width_, tap.weight_high};
  }

  std::uint32_t n_, width_, height_, grid_;
  const Staging& staging_;
};

// The same for fields of any size: every tap draws its normal again, which is slow and small.
class DrawnFieldRow {
 public:
  static constexpr unsigned kThreads = 512;
  struct Staging {};

  static __device__ void prepare(const Geometry&, Staging&) {}

  __device__ DrawnFieldRow(const Drawing& drawing, const RandomState&, std::int64_t image, std::int64_t k, Staging&)
      : drawing_(drawing), image_(image), k_(k) {}

  __device__ Octet octet(std::int64_t index) const {
    Octet octet;
#pragma unroll
    for (int i = 0; i < 8; ++i) octet.value[i] = element(drawing_, image_, k_, 8 * index + i);
    return octet;
  }

 private:
  static __device__ __noinline__ float element(const Drawing& drawing, std::int64_t image, std::int64_t k,
                                               std::int64_t j) {
    const Geometry& geometry = drawing.geometry;
    if (j >= geometry.n_elements) return 0.0f;
    const std::int64_t line = j / geometry.width;
    return upsampled(linear_tap(j % geometry.width, geometry.width, geometry.grid),
                     linear_tap(line % geometry.height, geometry.height, geometry.grid), line / geometry.height,
                     geometry.grid, [&](std::int64_t i) { return normal(drawing, image, k, i); });
  }

  static __device__ __noinline__ float normal(const Drawing& drawing, std::int64_t image, std::int64_t k,
                                              std::int64_t i) {
    const PhiloxWords words = normal_words(random_state(drawing.state), static_cast<std::uint32_t>(i / 8),
                                           static_cast<std::uint32_t>(drawing.first_image + image),
                                           static_cast<std::uint32_t>(drawing.first_direction + k));
    std::uint32_t word = words.word[0];
#pragma unroll
    for (int j = 1; j < 4; ++j) word = i % 4 == j ? words.word[j] : word;
    return float_normal(kSizes, i % 8 < 4 ? word : word >> 16);
  }

  const Drawing& drawing_;
  std::int64_t image_, k_;
};

// function(Which<Row>{}) for the kind of row that a call's directions are.
template <class Row_>
struct Which {
  using Row = Row_;
};

template <class Function>
auto with_row(const Geometry& geometry, const Function& function) {
  if (geometry.directions != Directions::kLowres) return function(Which<NormalRow>{});
  return FieldRow::fits(geometry) ? function(Which<FieldRow>{}) : function(Which<DrawnFieldRow>{});
}

constexpr unsigned kPieceThreads = 512;  // of a block that need not see whole rows, at most

// Rows of `n` elements cut into pieces of as many as the threads of a block have octets for. `points` things are made of
// every piece, one after the other; a block takes its share of all of them, in the order of images, pieces, points.
struct Pieces {
  std::int64_t n, tiles, size, points;  // elements of a row, pieces of a row, elements of a piece, points of each
  std::int64_t rows, blocks;            // pieces times points, and what they are shared among

  BIDFMKD_BOTH std::int64_t begin(std::int64_t block) const { return rows * block / blocks; }
};

// For one point after the other: where it is.
struct Place {
  std::int64_t image, tile, first, last;  // the point is first <= point < last of this piece

  __device__ Place(const Pieces& pieces, std::int64_t r, std::int64_t end)
      : image(r / pieces.points / pieces.tiles),
        tile(r / pieces.points % pieces.tiles),
        first(r % pieces.points),
        last(end - r < pieces.points - first ? first + end - r : pieces.points) {}
};

inline unsigned piece_threads(std::int64_t n, unsigned most) {
  const std::int64_t octets = ceil_divide(n, 8), each = ceil_divide(octets, ceil_divide(octets, most));
  return each < 128 ? 128 : whole_warps(each);  // fewer would take long to copy the sizes
}

// The pieces and the grid of `kernel` for them.
template <class... Wanted>
Grid share_pieces(const char* op, void (*kernel)(Wanted...), std::int64_t n_images, std::int64_t n, std::int64_t points,
                  unsigned most_threads, std::size_t shared_bytes, Pieces& pieces) {
  const unsigned threads = piece_threads(n, most_threads);
  pieces.n = n, pieces.size = 8 * static_cast<std::int64_t>(threads), pieces.points = points;
  pieces.tiles = ceil_divide(n, pieces.size);
  pieces.rows = n_images * pieces.tiles * points;
  const Grid grid = resident_grid(op, kernel, pieces.rows, threads, shared_bytes);
  pieces.blocks = grid.blocks;
  return grid;
}

}  // namespace cuda
}  // namespace bidfmkd
