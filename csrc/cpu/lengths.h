// The lengths of sphere directions that perturb divided by, kept for the gradient, which need not draw them all twice then.
// They are a function of seed, step, direction, image and size alone, so what is kept is never out of date.
#pragma once

#include <vector>

#include "kernels.h"

namespace bidfmkd {

// Keeps the `lengths` [q, n_images] of a call; the oldest calls' go when there are too many.
void keep_lengths(const Drawing& drawing, std::vector<double> lengths);

// Fills `lengths` [q, n_images], if all of them are kept, from one call or several.
bool recall_lengths(const Drawing& drawing, double* lengths);

}  // namespace bidfmkd
