// Declares the kernels that are compiled once per instruction set, in a namespace of its name
// (BIDFMKD_LEVEL).
#pragma once

#include "kernels.h"

namespace bidfmkd {
namespace BIDFMKD_LEVEL {

void perturb(const Drawing& drawing, const float* x, float* out, int n_threads);
void estimate_gradient(const Drawing& drawing, const float* differences, float* gradient,
                       int n_threads);
void stream_fill(float value, std::int64_t n, float* out, int n_threads);
void norm_pool(const NormPoolShape& shape, const float* x, const float* weight, const float* bias,
               double eps, float* y, const NormPoolSaved& saved, int n_threads);
void norm_pool_backward(const NormPoolShape& shape, const float* grad, const float* x,
                        const float* weight, const NormPoolSaved& saved, float* grad_x,
                        float* grad_weight, float* grad_bias, int n_threads);
void norm_pool_double_backward(const NormPoolShape& shape, const float* v, const float* p,
                               const float* s, const float* grad, const float* x,
                               const float* weight, const NormPoolSaved& saved, float* grad_grad,
                               float* grad_x, float* grad_weight, int n_threads);

}  // namespace BIDFMKD_LEVEL
}  // namespace bidfmkd
