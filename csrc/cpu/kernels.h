// Declares the CPU kernels. They take plain addresses and sizes. Each instruction set has one table
// of them; dispatch.cpp selects it.
#pragma once

#include <cstdint>

#include "../loss/kd.h"
#include "../loss/objective.h"
#include "../norm/norm_pool.h"
#include "../random/directions.h"

namespace bidfmkd {

struct Kernels {
  const char* name;
  void (*perturb)(const Drawing&, const float* x, float* out, int n_threads);
  // gradient[b] = s / (q mu) * sum_k differences[k, b] u_kb
  void (*estimate_gradient)(const Drawing&, const float* differences, float* gradient,
                            int n_threads);
  // Store `value` n times, past the cache: the limit that the benchmarks compare perturb with.
  void (*stream_fill)(float value, std::int64_t n, float* out, int n_threads);
  // Batch norm, ReLU and max pooling on images [N, H, W, C], with their derivatives; see
  // norm/norm_pool.h.
  void (*norm_pool)(const NormPoolShape&, const float* x, const float* weight, const float* bias,
                    double eps, float* y, const NormPoolSaved&, int n_threads);
  void (*norm_pool_backward)(const NormPoolShape&, const float* grad, const float* x,
                             const float* weight, const NormPoolSaved&, float* grad_x,
                             float* grad_weight, float* grad_bias, int n_threads);
  void (*norm_pool_double_backward)(const NormPoolShape&, const float* v, const float* p,
                                    const float* s, const float* grad, const float* x,
                                    const float* weight, const NormPoolSaved&, float* grad_grad,
                                    float* grad_x, float* grad_weight, int n_threads);
};

extern const Kernels kPortableKernels;
#if defined(BIDFMKD_X86)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// These serve every instruction set and are compiled only once: the black box takes so much more
// time that vectors would gain nothing.
void objective_differences(const float* scores, const std::int64_t* labels, const float* student,
                           std::int64_t n_images, std::int64_t num_directions,
                           const ObjectiveSettings& settings, float* differences, float* loss,
                           int n_threads);
void kd_loss(const float* student, const float* teacher, std::int64_t n_tasks,
             std::int64_t n_images, const KDSettings& kd, float* loss);
void kd_loss_backward(const float* grad, const float* student, const float* teacher,
                      std::int64_t n_tasks, std::int64_t n_images, const KDSettings& kd,
                      float* out);
void kd_loss_double_backward(const float* grad_out, const float* grad, const float* student,
                             const float* teacher, std::int64_t n_tasks, std::int64_t n_images,
                             const KDSettings& kd, float* grad_grad, float* grad_student);

}  // namespace bidfmkd
