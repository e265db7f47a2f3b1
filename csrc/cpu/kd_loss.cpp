// Evaluates the per-sample losses over whole batches. The black box takes so much more time that
// plain loops in double are fast enough.
#include "kernels.h"
#include "parallel.h"

namespace bidfmkd {

void objective_differences(const float* scores, const std::int64_t* labels, const float* student,
                           std::int64_t n_images, std::int64_t num_directions,
                           const ObjectiveSettings& settings, float* differences, float* loss,
                           int n_threads) {
  constexpr std::int64_t kPerThread =
      1 << 16;  // scores; with fewer, a thread costs more than it saves
  const std::int64_t worth = n_images * (1 + num_directions) * settings.n_classes / kPerThread;
  const int helpful = worth < n_threads ? static_cast<int>(worth) : n_threads;
  parallel_ranges(n_images, helpful, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t b = first; b < last; ++b) {
      const float* model = student == nullptr ? nullptr : student + b * settings.n_classes;
      const auto at = [&](std::int64_t row) {
        return point_objective(scores + (row * n_images + b) * settings.n_classes, labels[b], model,
                               settings);
      };
      const double base = at(0);
      loss[b] = static_cast<float>(base);
      for (std::int64_t k = 0; k < num_directions; ++k)
        differences[k * n_images + b] = static_cast<float>(at(1 + k) - base);
    }
  });
}

void kd_loss(const float* student, const float* teacher, std::int64_t n_tasks,
             std::int64_t n_images, const KDSettings& kd, float* loss) {
  for (std::int64_t task = 0; task < n_tasks; ++task) {
    double sum = 0.0;
    for (std::int64_t i = task * n_images; i < (task + 1) * n_images; ++i)
      sum += kd_image(student + i * kd.n_classes, teacher + i * kd.n_classes, kd);
    loss[task] = static_cast<float>(sum / static_cast<double>(n_images));
  }
}

void kd_loss_backward(const float* grad, const float* student, const float* teacher,
                      std::int64_t n_tasks, std::int64_t n_images, const KDSettings& kd,
                      float* out) {
  for (std::int64_t i = 0; i < n_tasks * n_images; ++i) {
    const double scale = kd.temperature * grad[i / n_images] / static_cast<double>(n_images);
    const std::int64_t at = i * kd.n_classes;
    kd_image_gradient(student + at, teacher + at, scale, kd, out + at);
  }
}

void kd_loss_double_backward(const float* grad_out, const float* grad, const float* student,
                             const float* teacher, std::int64_t n_tasks, std::int64_t n_images,
                             const KDSettings& kd, float* grad_grad, float* grad_student) {
  for (std::int64_t task = 0; task < n_tasks; ++task) {
    double projected = 0.0;
    for (std::int64_t i = task * n_images; i < (task + 1) * n_images; ++i) {
      const std::int64_t at = i * kd.n_classes;
      const double scale = grad[task] / static_cast<double>(n_images);
      projected +=
          kd_image_hessian(student + at, teacher + at, grad_out + at, scale, kd, grad_student + at);
    }
    grad_grad[task] =
        static_cast<float>(projected * kd.temperature / static_cast<double>(n_images));
  }
}

}  // namespace bidfmkd
