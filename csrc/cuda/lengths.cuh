// The lengths of rows, for the kernels that do not see whole rows.
#pragma once

#include "rows.cuh"

namespace bidfmkd {
namespace cuda {

// Floats of `workspace` below.
std::int64_t lengths_workspace(const Geometry& geometry, std::int64_t num_directions);

// 1 / |row| of direction k of image b to workspace[k B + b]; for sphere and lowres.
void measure_rows(const char* op, const Drawing& drawing, float* workspace, const Queue& queue);

// Whether a block sees whole rows, so that it can measure them itself.
template <class Row>
bool seen_whole(const Geometry& geometry) {
  return geometry.n_elements <= 8 * std::int64_t{Row::kThreads};
}

// Whether directions are divided by lengths that no block can find.
template <class Row>
bool takes_lengths(const Geometry& geometry) {
  const bool normalised = geometry.directions == Directions::kSphere || geometry.directions == Directions::kLowres;
  return normalised && !seen_whole<Row>(geometry);
}

}  // namespace cuda
}  // namespace bidfmkd
