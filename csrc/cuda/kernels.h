// Declares the CUDA kernels. All addresses are in the memory of `queue.device`. No function waits
// for the device; a launch that fails throws std::runtime_error.
#pragma once

#include <cstdint>
#include <string>

#include "../loss/half.h"
#include "../loss/kd.h"
#include "../loss/objective.h"
#include "../norm/norm_pool.h"
#include "../random/directions.h"

namespace bidfmkd {
namespace cuda {

struct Queue {
  int device;
  void* stream;  // a cudaStream_t
};

// Return why these kernels cannot run on `device`; empty if they can.
std::string problem(int device);

// Return how many floats `workspace` must hold in perturb.
std::int64_t perturb_workspace(const Geometry& geometry, std::int64_t num_directions);

// points[0] = x and points[1 + k] = x + mu u_k, written to `out` [1 + q, B, d].
void perturb(const Drawing& drawing, const float* x, float* workspace, float* out,
             const Queue& queue);

// Return how many floats `workspace` must hold in estimate_gradient. Asks the device how many
// blocks it can run at once.
std::int64_t gradient_workspace(const Geometry& geometry, std::int64_t num_directions, int device);

// gradient[b] = s / (q mu) * sum_k differences[k, b] u_kb. `differences` may be the first q B
// floats of `workspace`.
void estimate_gradient(const Drawing& drawing, const float* differences, float* workspace,
                       float* gradient, const Queue& queue);

// Write differences[k, b] = L(x_b + mu u_kb) - L(x_b) and loss[b] = L(x_b). scores and student are
// of `type`.
void objective_differences(const void* scores, const std::int64_t* labels, const void* student,
                           ScoreType type, std::int64_t n_images, std::int64_t num_directions,
                           const ObjectiveSettings& settings, float* differences, float* loss,
                           const Queue& queue);

void kd_loss(const float* student, const float* teacher, std::int64_t n_tasks,
             std::int64_t n_images, const KDSettings& kd, float* loss, const Queue& queue);
void kd_loss_backward(const float* grad, const float* student, const float* teacher,
                      std::int64_t n_tasks, std::int64_t n_images, const KDSettings& kd, float* out,
                      const Queue& queue);
void kd_loss_double_backward(const float* grad_out, const float* grad, const float* student,
                             const float* teacher, std::int64_t n_tasks, std::int64_t n_images,
                             const KDSettings& kd, float* grad_grad, float* grad_student,
                             const Queue& queue);

// Batch norm, ReLU and max pooling on images [N, C, H, W], with their derivatives; see
// norm/norm_pool.h.
void norm_pool(const NormPoolShape& shape, const float* x, const float* weight, const float* bias,
               double eps, float* y, const NormPoolSaved& saved, const Queue& queue);
void norm_pool_backward(const NormPoolShape& shape, const float* grad, const float* x,
                        const float* weight, const NormPoolSaved& saved, float* grad_x,
                        float* grad_weight, float* grad_bias, const Queue& queue);
void norm_pool_double_backward(const NormPoolShape& shape, const float* v, const float* p,
                               const float* s, const float* grad, const float* x,
                               const float* weight, const NormPoolSaved& saved, float* grad_grad,
                               float* grad_x, float* grad_weight, const Queue& queue);

}  // namespace cuda
}  // namespace bidfmkd
