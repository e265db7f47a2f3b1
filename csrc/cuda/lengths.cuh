// Computes the lengths of rows for the kernels whose blocks see only a piece of a row.
#pragma once

#include "rows.cuh"

namespace bidfmkd {
namespace cuda {

// Return how many floats `workspace` must hold in measure_rows.
std::int64_t lengths_workspace(const Geometry& geometry, std::int64_t num_directions);

// Write 1 / |row| of direction k of image b to workspace[k B + b], for sphere and lowres
// directions.
void measure_rows(const char* op, const Drawing& drawing, float* workspace, const Queue& queue);

// Return true if a row fits into one block (one octet per thread), so that the block can measure
// it.
template <class Row>
bool seen_whole(const Geometry& geometry) {
  return geometry.n_elements <= 8 * std::int64_t{Row::kThreads};
}

// Return true if rows are normalised but span several blocks, so that their lengths need a kernel
// of their own first.
template <class Row>
bool takes_lengths(const Geometry& geometry) {
  const bool normalised =
      geometry.directions == Directions::kSphere || geometry.directions == Directions::kLowres;
  return normalised && !seen_whole<Row>(geometry);
}

}  // namespace cuda
}  // namespace bidfmkd
