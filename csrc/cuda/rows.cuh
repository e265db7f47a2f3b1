// Produces one direction of one image as a row of numbers (sphere, gaussian and lowres directions),
// eight numbers at a time.
//
// Glossary of the CUDA kernels in this folder:
// - octet: eight neighbouring elements of a row. One Philox call yields exactly eight normals.
// - row: all d elements of one direction k for one image b.
// - point: one of the 1 + q images that perturb writes for each input image. Point 0 is x itself.
// - piece: the part of a row that one block handles at once, with one octet per thread.
// - tile: the number of a piece within its row.
// - share: the consecutive (image, piece, point) triples that one block works through.
// - measured: the block sees the whole row, so it can compute the row's length itself. The lengths
//   of longer rows are computed by a separate kernel first (lengths.cu).
// - field: the grid x grid normals per channel that a lowres direction is interpolated from.
//
// A block produces many rows. Row::prepare fills the shared memory that all of its rows have in
// common; the constructor then fills what one row needs there.
#pragma once

#include "block_sum.cuh"
#include "normals.cuh"

namespace bidfmkd {
namespace cuda {

// Sphere and gaussian: the row's elements are the normals themselves.
class NormalRow {
 public:
  static constexpr unsigned kThreads =
      kMostThreads;  // most threads per block; __launch_bounds__ keeps registers within it
  struct Staging {
    Sizes sizes;
  };

  static __device__ void prepare(const Geometry&, Staging& staging) {
    copy_sizes(staging.sizes);
    __syncthreads();
  }

  __device__ NormalRow(const Drawing& drawing, const RandomState& random, std::int64_t image,
                       std::int64_t k, const Staging& staging)
      : sizes_(staging.sizes),
        random_(random),
        image_(static_cast<std::uint32_t>(drawing.first_image + image)),
        direction_(static_cast<std::uint32_t>(drawing.first_direction + k)),
        n_(drawing.geometry.n_elements) {}

  // Return elements 8 index, ..., 8 index + 7 of the row; elements beyond its end are 0.
  __device__ __forceinline__ Octet octet(std::int64_t index) const {
    Octet octet =
        normal_octet(sizes_, random_, static_cast<std::uint32_t>(index), image_, direction_);
    cut_octet(octet, index, n_);
    return octet;
  }

 private:
  const Sizes& sizes_;
  RandomState random_;
  std::uint32_t image_, direction_;
  std::int64_t n_;
};

__device__ __forceinline__ float lerp(float low, float high, float weight_high) {
  return low + weight_high * (high - low);
}

// Interpolate bilinearly between four normals of a field. `column` and `line` say which and with
// what weights; `normal(i)` returns normal i of the field.
template <class Normal>
__device__ __forceinline__ float upsampled(const LinearTap& column, const LinearTap& line,
                                           std::int64_t channel, std::int64_t grid,
                                           const Normal& normal) {
  const std::int64_t low = (channel * grid + line.low) * grid,
                     high = (channel * grid + line.high) * grid;
  return lerp(lerp(normal(low + column.low), normal(low + column.high), column.weight_high),
              lerp(normal(high + column.low), normal(high + column.high), column.weight_high),
              line.weight_high);
}

// Lowres, small fields: the field lies in shared memory. Bilinear interpolation is separable, so
// each line of the field is first stretched to the image's width; an element then needs two numbers
// instead of four.
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
    return geometry.n_random() <= kMostNormals &&
           geometry.channels * geometry.grid * geometry.width <= kMostStretched &&
           geometry.width <= kMostTaps && geometry.height <= kMostTaps;
  }

  static __device__ void prepare(const Geometry& geometry, Staging& staging) {
    for (unsigned i = threadIdx.x; i < geometry.width; i += blockDim.x)
      staging.columns[i] = linear_tap(i, geometry.width, geometry.grid);
    for (unsigned i = threadIdx.x; i < geometry.height; i += blockDim.x)
      staging.lines[i] = linear_tap(i, geometry.height, geometry.grid);
  }

  // Draw the field of this row and stretch its lines. All threads of the block call this together.
  __device__ FieldRow(const Drawing& drawing, const RandomState& random, std::int64_t image,
                      std::int64_t k,
                      Staging& staging)
      : n_(static_cast<std::uint32_t>(
            drawing.geometry.n_elements)),  // FieldRow::fits admits fewer than 2^27 elements
        width_(static_cast<std::uint32_t>(drawing.geometry.width)),
        height_(static_cast<std::uint32_t>(drawing.geometry.height)),
        grid_(static_cast<std::uint32_t>(drawing.geometry.grid)),
        staging_(staging) {
    const auto n_normals = static_cast<std::uint32_t>(drawing.geometry.n_random());
    for (unsigned i = threadIdx.x; 8 * i < n_normals; i += blockDim.x) {
      const Octet octet =
          normal_octet(kSizes, random, i, static_cast<std::uint32_t>(drawing.first_image + image),
                       static_cast<std::uint32_t>(drawing.first_direction + k));
#pragma unroll
      for (unsigned j = 0; j < 8; ++j)
        if (8 * i + j < n_normals) staging.field[8 * i + j] = octet.value[j];
    }
    __syncthreads();  // the field is complete, and no thread still reads the previous row's lines
    for (unsigned i = threadIdx.x; i < n_normals / grid_ * width_; i += blockDim.x) {
      const LinearTap column = staging.columns[i % width_];
      const float* line = staging.field + i / width_ * grid_;
      staging.stretched[i] = lerp(line[column.low], line[column.high], column.weight_high);
    }
    __syncthreads();
  }

  // Return elements 8 index, ..., 8 index + 7 of the row; elements beyond its end are 0.
  __device__ Octet octet(std::int64_t index) const {
    Octet octet;
    const auto first = static_cast<std::uint32_t>(8 * index);
    if (width_ % 8 == 0) {  // the octet lies within one line, so it can be read as vectors
      const Lines lines = lines_of(first);
      alignas(16) float low[8], high[8];
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        *reinterpret_cast<float4*>(low + i) = *reinterpret_cast<const float4*>(lines.low + i);
        *reinterpret_cast<float4*>(high + i) = *reinterpret_cast<const float4*>(lines.high + i);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
        octet.value[i] = first < n_ ? lerp(low[i], high[i], lines.weight_high) : 0.0f;
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

// Lowres, fields of any size: every interpolated element draws its four normals again. This is
// slow, but such fields are rare and the kernel needs no shared memory.
class DrawnFieldRow {
 public:
  static constexpr unsigned kThreads = 512;
  struct Staging {};

  static __device__ void prepare(const Geometry&, Staging&) {}

  __device__ DrawnFieldRow(const Drawing& drawing, const RandomState&, std::int64_t image,
                           std::int64_t k, Staging&)
      : drawing_(drawing), image_(image), k_(k) {}

  __device__ Octet octet(std::int64_t index) const {
    Octet octet;
#pragma unroll
    for (int i = 0; i < 8; ++i) octet.value[i] = element(drawing_, image_, k_, 8 * index + i);
    return octet;
  }

 private:
  static __device__ __noinline__ float element(const Drawing& drawing, std::int64_t image,
                                               std::int64_t k, std::int64_t j) {
    const Geometry& geometry = drawing.geometry;
    if (j >= geometry.n_elements) return 0.0f;
    const std::int64_t line = j / geometry.width;
    return upsampled(linear_tap(j % geometry.width, geometry.width, geometry.grid),
                     linear_tap(line % geometry.height, geometry.height, geometry.grid),
                     line / geometry.height, geometry.grid,
                     [&](std::int64_t i) { return normal(drawing, image, k, i); });
  }

  static __device__ __noinline__ float normal(const Drawing& drawing, std::int64_t image,
                                              std::int64_t k, std::int64_t i) {
    const PhiloxWords words =
        normal_words(random_state(drawing.state), static_cast<std::uint32_t>(i / 8),
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

// Call function(Which<Row>{}) with the Row class that produces this call's directions.
template <class Row_>
struct Which {
  using Row = Row_;
};

template <class Function>
auto with_row(const Geometry& geometry, const Function& function) {
  if (geometry.directions != Directions::kLowres) return function(Which<NormalRow>{});
  return FieldRow::fits(geometry) ? function(Which<FieldRow>{}) : function(Which<DrawnFieldRow>{});
}

constexpr unsigned kPieceThreads = 512;  // most threads of a block that need not see whole rows

// Describes how the work of one call is cut up. Each row of `n` elements is cut into pieces with
// one octet per thread. `points` results are made from every piece (perturb: the points; gradient:
// the directions to add). The triples (image, piece, point) are numbered in this order, and block i
// takes the numbers [begin(i), begin(i + 1)): equal shares, so all blocks end at the same time.
struct Pieces {
  std::int64_t n;       // elements per row
  std::int64_t tiles;   // pieces per row
  std::int64_t size;    // elements per piece
  std::int64_t points;  // results per piece
  std::int64_t rows;    // number of triples: images * tiles * points
  std::int64_t blocks;  // blocks that share them

  BIDFMKD_BOTH std::int64_t begin(std::int64_t block) const { return rows * block / blocks; }
};

// Locates the work item `r` of a share, and how many items of the same piece follow it in the
// share.
struct Place {
  std::int64_t image, tile, first, last;  // the point is first <= point < last of this piece

  __device__ Place(const Pieces& pieces, std::int64_t r, std::int64_t end)
      : image(r / pieces.points / pieces.tiles),
        tile(r / pieces.points % pieces.tiles),
        first(r % pieces.points),
        last(end - r < pieces.points - first ? first + end - r : pieces.points) {}
};

inline unsigned piece_threads(std::int64_t n, unsigned most) {
  const std::int64_t octets = ceil_divide(n, 8),
                     each = ceil_divide(octets, ceil_divide(octets, most));
  return each < 128 ? 128
                    : whole_warps(each);  // fewer threads would copy the table of sizes slowly
}

// Fill in `pieces` for a call and return the grid of `kernel` that works through them.
template <class... Wanted>
Grid share_pieces(const char* op, void (*kernel)(Wanted...), std::int64_t n_images, std::int64_t n,
                  std::int64_t points, unsigned most_threads, std::size_t shared_bytes,
                  Pieces& pieces) {
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
