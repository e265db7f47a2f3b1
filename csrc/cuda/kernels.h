// What the CUDA kernels take. Addresses are of memory on `queue.device`; nothing waits for the device, and a launch that
// fails throws std::runtime_error.
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

// Why these kernels do not run on `device`; empty if they do.
std::string problem(int device);

// Floats of `workspace` below.
std::int64_t perturb_workspace(const Geometry& geometry, std::int64_t num_directions);

void perturb(const Drawing& drawing, const float* x, float* workspace, float* out, const Queue& queue);

// Floats of `workspace` below. Asks the device how many blocks it runs at once.
std::int64_t gradient_workspace(const Geometry& geometry, std::int64_t num_directions, int device);

// gradient[b] = s / (q mu) * sum_k differences[k, b] u_kb. The first q B floats of `workspace` may be `differences`.
void estimate_gradient(const Drawing& drawing, const float* differences, float* workspace, float* gradient,
                       const Queue& queue);

// differences[k, b] and, for the images themselves, loss[b]; scores and student are of `type`.
void objective_differences(const void* scores, const std::int64_t* labels, const void* student, ScoreType type,
                           std::int64_t n_images, std::int64_t num_directions, const ObjectiveSettings& settings,
                           float* differences, float* loss, const Queue& queue);

void kd_loss(const float* student, const float* teacher, std::int64_t n_tasks, std::int64_t n_images,
             const KDSettings& kd, float* loss, const Queue& queue);
void kd_loss_backward(const float* grad, const float* student, const float* teacher, std::int64_t n_tasks,
                      std::int64_t n_images, const KDSettings& kd, float* out, const Queue& queue);
void kd_loss_double_backward(const float* grad_out, const float* grad, const float* student, const float* teacher,
                             std::int64_t n_tasks, std::int64_t n_images, const KDSettings& kd, float* grad_grad,
                             float* grad_student, const Queue& queue);

// On images [N, C, H, W] and their cells; see norm/norm_pool.h.
void norm_pool(const NormPoolShape& shape, const float* x, const float* weight, const float* bias, double eps, float* y,
               const NormPoolSaved& saved, const Queue& queue);
void norm_pool_backward(const NormPoolShape& shape, const float* grad, const float* x, const float* weight,
                        const NormPoolSaved& saved, float* grad_x, float* grad_weight, float* grad_bias,
                        const Queue& queue);
void norm_pool_double_backward(const NormPoolShape& shape, const float* v, const float* p, const float* s,
                               const float* grad, const float* x, const float* weight, const NormPoolSaved& saved,
                               float* grad_grad, float* grad_x, float* grad_weight, const Queue& queue);

}  // namespace cuda
}  // namespace bidfmkd
