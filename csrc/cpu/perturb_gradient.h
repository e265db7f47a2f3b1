// The kernels that are compiled for each instruction set.
#pragma once

#include "kernels.h"

namespace bidfmkd {
namespace BIDFMKD_LEVEL {

void perturb(const Drawing& drawing, const float* x, float* out, int n_threads);
void estimate_gradient(const Drawing& drawing, const float* differences, float* gradient, int n_threads);
void stream_fill(float value, std::int64_t n, float* out, int n_threads);

}  // namespace BIDFMKD_LEVEL
}  // namespace bidfmkd
