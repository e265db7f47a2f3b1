// Computes the lengths of rows that span several blocks, in two kernels: sums of squares per piece,
// then 1 / sqrt of their total.
#include "lengths.cuh"

namespace bidfmkd {
namespace cuda {
namespace {

// squares[k, b, tile] = sum of the squares of one piece. A block works through its share of pieces.
template <class Row>
__global__ void __launch_bounds__(Row::kThreads)
    piece_squares(Drawing drawing, Pieces pieces, float* __restrict__ squares) {
  __shared__ float partial[2][kWarp];
  auto& staging = *reinterpret_cast<typename Row::Staging*>(dynamic_memory);
  Row::prepare(drawing.geometry, staging);
  const RandomState random = random_state(drawing.state);
  const std::int64_t end = pieces.begin(blockIdx.x + 1);
  bool odd = false;
  for (std::int64_t r = pieces.begin(blockIdx.x); r < end;) {
    const Place place(pieces, r, end);
    r += place.last - place.first;
    const std::int64_t index = place.tile * pieces.size / 8 + threadIdx.x;
    for (std::int64_t k = place.first; k < place.last; ++k) {
      odd = !odd;  // two buffers: a slow warp may still read the previous row's sums
      const Row row(drawing, random, place.image, k, staging);
      const float sum = block_sum(sum_of_squares(row.octet(index)), partial[odd]);
      if (threadIdx.x == 0)
        squares[(k * drawing.geometry.n_images + place.image) * pieces.tiles + place.tile] = sum;
    }
  }
}

// inverse_lengths[k, b] = 1 / sqrt(sum of the row's squares). One thread per row adds the tiles in
// order.
__global__ void invert_lengths(std::int64_t n_rows, std::int64_t tiles,
                               const float* __restrict__ squares,
                               float* __restrict__ inverse_lengths) {
  const std::int64_t r = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (r >= n_rows) return;
  float sum = 0.0f;
  for (std::int64_t tile = 0; tile < tiles; ++tile) sum += squares[r * tiles + tile];
  inverse_lengths[r] = rsqrtf(sum);
}

template <class Row>
void launch_squares(const char* op, const Drawing& drawing, float* workspace, const Queue& queue) {
  const Geometry& geometry = drawing.geometry;
  const std::int64_t n_rows = drawing.num_directions * geometry.n_images;
  if (n_rows == 0) return;
  Pieces pieces;
  const Grid grid =
      share_pieces(op, piece_squares<Row>, geometry.n_images, geometry.n_elements,
                   drawing.num_directions, Row::kThreads, sizeof(typename Row::Staging), pieces);
  float* squares = workspace + n_rows;
  launch(op, queue, piece_squares<Row>, grid, drawing, pieces, squares);
  launch(op, queue, invert_lengths, {ceil_divide(n_rows, 256), dim3(256)}, n_rows, pieces.tiles,
         static_cast<const float*>(squares), workspace);
}

}  // namespace

std::int64_t lengths_workspace(const Geometry& geometry, std::int64_t num_directions) {
  const std::int64_t n_tiles = with_row(geometry, [&](auto which) {
    const unsigned threads = piece_threads(geometry.n_elements, decltype(which)::Row::kThreads);
    return ceil_divide(geometry.n_elements, 8 * std::int64_t{threads});
  });
  return num_directions * geometry.n_images * (1 + n_tiles);
}

void measure_rows(const char* op, const Drawing& drawing, float* workspace, const Queue& queue) {
  with_row(drawing.geometry, [&](auto which) {
    launch_squares<typename decltype(which)::Row>(op, drawing, workspace, queue);
  });
}

}  // namespace cuda
}  // namespace bidfmkd
