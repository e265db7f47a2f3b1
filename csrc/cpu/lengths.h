// Keeps the lengths of the sphere directions that perturb has drawn, so that the gradient need not
// draw every direction twice (once to measure it, once to add it). A length is a pure function of
// seed, step, direction, image and size, so a kept value can never be out of date.
#pragma once

#include <vector>

#include "kernels.h"

namespace bidfmkd {

// Keep the `lengths` [q, n_images] of one call; the oldest calls are dropped when there are too
// many.
void keep_lengths(const Drawing& drawing, std::vector<double> lengths);

// Fill `lengths` [q, n_images] and return true, if all of them are kept, from one call or from
// several chunks.
bool recall_lengths(const Drawing& drawing, double* lengths);

}  // namespace bidfmkd
