// Evaluates the per-sample losses over whole batches, in double and from the same source as on the
// CPU. The black box takes so much more time that a simple layout is fast enough: a thread computes
// one loss, and values that are added or subtracted belong to one block.
#include "block_sum.cuh"
#include "normals.cuh"

namespace bidfmkd {
namespace cuda {
namespace {

constexpr const char* kObjective = "zo_kd_gradient";
constexpr const char* kDistillation = "kd_loss";
constexpr int kLossThreads = 256;

unsigned threads_for(std::int64_t items) {
  return items < kLossThreads ? whole_warps(items) : kLossThreads;
}

// One block per image: compute the objective at all 1 + q points; the first is the image itself,
// and its value is subtracted from the others.
template <class Score>
__global__ void __launch_bounds__(kLossThreads)
    differences_of(const Score* __restrict__ scores, const std::int64_t* __restrict__ labels,
                   const Score* __restrict__ student, std::int64_t n_images,
                   std::int64_t num_directions, ObjectiveSettings settings,
                   float* __restrict__ differences, float* __restrict__ loss) {
  __shared__ double base;
  const std::int64_t image = blockIdx.x;
  const Score* model = student == nullptr ? nullptr : student + image * settings.n_classes;
  const auto at = [&](std::int64_t point) {
    return point_objective(scores + (point * n_images + image) * settings.n_classes, labels[image],
                           model, settings);
  };
  for (std::int64_t first = 0; first <= num_directions; first += blockDim.x) {
    const std::int64_t point = first + threadIdx.x;
    const double own = point <= num_directions ? at(point) : 0.0;
    if (first == 0) {
      if (threadIdx.x == 0) {
        base = own;
        loss[image] = static_cast<float>(own);
      }
      __syncthreads();
    }
    if (point > 0 && point <= num_directions)
      differences[(point - 1) * n_images + image] = static_cast<float>(own - base);
  }
}

// One block per task: loss[task] = mean over its images.
__global__ void __launch_bounds__(kLossThreads)
    task_losses(const float* __restrict__ student, const float* __restrict__ teacher,
                std::int64_t n_images, KDSettings kd, float* __restrict__ loss) {
  __shared__ double partial[kWarp];
  const std::int64_t first = blockIdx.x * n_images;
  double sum = 0.0;
  for (std::int64_t i = threadIdx.x; i < n_images; i += blockDim.x)
    sum += kd_image(student + (first + i) * kd.n_classes, teacher + (first + i) * kd.n_classes, kd);
  sum = block_sum(sum, partial);
  if (threadIdx.x == 0) loss[blockIdx.x] = static_cast<float>(sum / static_cast<double>(n_images));
}

__global__ void __launch_bounds__(kLossThreads)
    gradients(const float* __restrict__ grad, const float* __restrict__ student,
              const float* __restrict__ teacher, std::int64_t n_all, std::int64_t n_images,
              KDSettings kd, float* __restrict__ out) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n_all) return;
  const double scale = kd.temperature * grad[i / n_images] / static_cast<double>(n_images);
  const std::int64_t at = i * kd.n_classes;
  kd_image_gradient(student + at, teacher + at, scale, kd, out + at);
}

__global__ void __launch_bounds__(kLossThreads)
    hessian_products(const float* __restrict__ grad_out, const float* __restrict__ grad,
                     const float* __restrict__ student, const float* __restrict__ teacher,
                     std::int64_t n_images, KDSettings kd, float* __restrict__ grad_grad,
                     float* __restrict__ grad_student) {
  __shared__ double partial[kWarp];
  const std::int64_t first = blockIdx.x * n_images;
  const double scale = grad[blockIdx.x] / static_cast<double>(n_images);
  double projected = 0.0;
  for (std::int64_t i = threadIdx.x; i < n_images; i += blockDim.x) {
    const std::int64_t at = (first + i) * kd.n_classes;
    projected +=
        kd_image_hessian(student + at, teacher + at, grad_out + at, scale, kd, grad_student + at);
  }
  projected = block_sum(projected, partial);
  if (threadIdx.x == 0)
    grad_grad[blockIdx.x] =
        static_cast<float>(projected * kd.temperature / static_cast<double>(n_images));
}

template <class Score>
void launch_differences(const void* scores, const std::int64_t* labels, const void* student,
                        std::int64_t n_images, std::int64_t num_directions,
                        const ObjectiveSettings& settings, float* differences, float* loss,
                        const Queue& queue) {
  launch(kObjective, queue, differences_of<Score>,
         {n_images, dim3(threads_for(1 + num_directions))}, static_cast<const Score*>(scores),
         labels, static_cast<const Score*>(student), n_images, num_directions, settings,
         differences, loss);
}

}  // namespace

std::string problem(int device) {
  int n_devices = 0, block_bytes = 0;
  std::string advice;
  cudaError_t status =
      cudaGetDeviceCount(&n_devices);  // fails where the driver is missing or older than this CUDA
  if (status == cudaSuccess && device >= n_devices) status = cudaErrorInvalidDevice;
  if (status == cudaSuccess) {
    const DeviceGuard guard("problem", device);
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(
        &attributes, reinterpret_cast<const void*>(gradients));  // fails if not compiled for it
    if (status != cudaSuccess) advice = "; rebuild with CUDAARCHS=native";
  }
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(status) + advice;
  }
  constexpr int kNeeded = sizeof(Sizes) + 1024;
  if (block_bytes >= kNeeded) return "";
  return "a block has " + std::to_string(block_bytes) +
         " bytes of shared memory there, and they need " + std::to_string(kNeeded);
}

void objective_differences(const void* scores, const std::int64_t* labels, const void* student,
                           ScoreType type, std::int64_t n_images, std::int64_t num_directions,
                           const ObjectiveSettings& settings, float* differences, float* loss,
                           const Queue& queue) {
  const DeviceGuard guard(kObjective, queue.device);
  const auto launch_for = type == ScoreType::kFloat16    ? launch_differences<Float16>
                          : type == ScoreType::kBFloat16 ? launch_differences<BFloat16>
                                                         : launch_differences<float>;
  launch_for(scores, labels, student, n_images, num_directions, settings, differences, loss, queue);
}

void kd_loss(const float* student, const float* teacher, std::int64_t n_tasks,
             std::int64_t n_images, const KDSettings& kd, float* loss, const Queue& queue) {
  const DeviceGuard guard(kDistillation, queue.device);
  launch(kDistillation, queue, task_losses, {n_tasks, dim3(threads_for(n_images))}, student,
         teacher, n_images, kd, loss);
}

void kd_loss_backward(const float* grad, const float* student, const float* teacher,
                      std::int64_t n_tasks, std::int64_t n_images, const KDSettings& kd, float* out,
                      const Queue& queue) {
  const DeviceGuard guard(kDistillation, queue.device);
  const std::int64_t n_all = n_tasks * n_images;
  launch(kDistillation, queue, gradients, {ceil_divide(n_all, kLossThreads), dim3(kLossThreads)},
         grad, student, teacher, n_all, n_images, kd, out);
}

void kd_loss_double_backward(const float* grad_out, const float* grad, const float* student,
                             const float* teacher, std::int64_t n_tasks, std::int64_t n_images,
                             const KDSettings& kd, float* grad_grad, float* grad_student,
                             const Queue& queue) {
  const DeviceGuard guard(kDistillation, queue.device);
  launch(kDistillation, queue, hessian_products, {n_tasks, dim3(threads_for(n_images))}, grad_out,
         grad, student, teacher, n_images, kd, grad_grad, grad_student);
}

}  // namespace cuda
}  // namespace bidfmkd
