// Binds the kernels to Python; the only file that knows Python. Addresses come as integers.
// Arguments are checked in bidfmkd_fast/ops/checks.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cuda/kernels.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Int = std::int64_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

#if defined(BIDFMKD_CUDA)
constexpr bool kHasCuda = true;
constexpr const char* kArchitectures = BIDFMKD_CUDA;
#else
constexpr bool kHasCuda = false;
constexpr const char* kArchitectures = "";
#endif

// Every call ends with (n_threads, device, stream): it runs on that stream of the CUDA device, or
// on the CPU if `device` is negative. `workspace` and score types other than float32 are for CUDA
// only; see cuda/kernels.h.

bidfmkd::Geometry geometry(Int n_images, Int n_elements, int directions, Int channels, Int height,
                           Int width, Int grid) {
  return {n_images, n_elements, static_cast<bidfmkd::Directions>(directions), channels, height,
          width,    grid};
}

bidfmkd::Drawing drawing(Address state, Int num_directions, Int n_images, Int n_elements,
                         int directions, Int channels, Int height, Int width, Int grid, double mu,
                         Int first_direction, Int first_image) {
  return {geometry(n_images, n_elements, directions, channels, height, width, grid),
          at<const Int>(state),
          num_directions,
          mu,
          first_direction,
          first_image};
}

#if defined(BIDFMKD_CUDA)
// Return how many floats the workspace of a call on a CUDA device must hold.
Int perturb_workspace(Int num_directions, Int n_images, Int n_elements, int directions,
                      Int channels, Int height, Int width, Int grid, int /*device*/) {
  return bidfmkd::cuda::perturb_workspace(
      geometry(n_images, n_elements, directions, channels, height, width, grid), num_directions);
}

Int gradient_workspace(Int num_directions, Int n_images, Int n_elements, int directions,
                       Int channels, Int height, Int width, Int grid, int device) {
  return bidfmkd::cuda::gradient_workspace(
      geometry(n_images, n_elements, directions, channels, height, width, grid), num_directions,
      device);
}
#endif

void perturb(Address x, Address state, Address workspace, Address out, Int num_directions,
             Int n_images, Int n_elements, int directions, Int channels, Int height, Int width,
             Int grid, double mu, Int first_direction, Int first_image, int n_threads, int device,
             Address stream) {
  const auto draw = drawing(state, num_directions, n_images, n_elements, directions, channels,
                            height, width, grid, mu, first_direction, first_image);
  if constexpr (kHasCuda) {
    if (device >= 0)
      return bidfmkd::cuda::perturb(draw, at<const float>(x), at<float>(workspace), at<float>(out),
                                    {device, at<void>(stream)});
  }
  bidfmkd::kernels().perturb(draw, at<const float>(x), at<float>(out), n_threads);
}

void estimate_gradient(Address differences, Address state, Address workspace, Address gradient,
                       Int num_directions, Int n_images, Int n_elements, int directions,
                       Int channels, Int height, Int width, Int grid, double mu,
                       Int first_direction, Int first_image, int n_threads, int device,
                       Address stream) {
  const auto draw = drawing(state, num_directions, n_images, n_elements, directions, channels,
                            height, width, grid, mu, first_direction, first_image);
  if constexpr (kHasCuda) {
    if (device >= 0)
      return bidfmkd::cuda::estimate_gradient(draw, at<const float>(differences),
                                              at<float>(workspace), at<float>(gradient),
                                              {device, at<void>(stream)});
  }
  bidfmkd::kernels().estimate_gradient(draw, at<const float>(differences), at<float>(gradient),
                                       n_threads);
}

void zo_kd_gradient(Address scores, Address labels, Address student, Address state,
                    Address workspace, Address gradient, Address loss, int score_type,
                    Int num_directions, Int n_classes, Int n_images, Int n_elements, int directions,
                    Int channels, Int height, Int width, Int grid, double mu,
                    double boundary_weight, int scores_kind, int divergence, Int first_direction,
                    Int first_image, int n_threads, int device, Address stream) {
  const bidfmkd::ObjectiveSettings settings{
      n_classes, static_cast<bidfmkd::ScoresKind>(scores_kind),
      static_cast<bidfmkd::Divergence>(divergence), boundary_weight};
  const auto draw = drawing(state, num_directions, n_images, n_elements, directions, channels,
                            height, width, grid, mu, first_direction, first_image);
  if constexpr (kHasCuda) {
    if (device >= 0) {
      const bidfmkd::cuda::Queue queue{device, at<void>(stream)};
      float* differences = at<float>(workspace);
      bidfmkd::cuda::objective_differences(
          at<const void>(scores), at<const Int>(labels), at<const void>(student),
          static_cast<bidfmkd::ScoreType>(score_type), n_images, num_directions, settings,
          differences, at<float>(loss), queue);
      return bidfmkd::cuda::estimate_gradient(draw, differences, differences, at<float>(gradient),
                                              queue);
    }
  }
  std::vector<float> differences(static_cast<std::size_t>(num_directions * n_images));
  bidfmkd::objective_differences(at<const float>(scores), at<const Int>(labels),
                                 at<const float>(student), n_images, num_directions, settings,
                                 differences.data(), at<float>(loss), n_threads);
  bidfmkd::kernels().estimate_gradient(draw, differences.data(), at<float>(gradient), n_threads);
}

bidfmkd::KDSettings kd_settings(Int n_classes, double temperature, int scores_kind,
                                int divergence) {
  return {n_classes, temperature, static_cast<bidfmkd::ScoresKind>(scores_kind),
          static_cast<bidfmkd::Divergence>(divergence)};
}

void kd_loss(Address student, Address teacher, Address loss, Int n_tasks, Int n_images,
             Int n_classes, double temperature, int scores_kind, int divergence, int /*n_threads*/,
             int device, Address stream) {
  const auto kd = kd_settings(n_classes, temperature, scores_kind, divergence);
  if constexpr (kHasCuda) {
    if (device >= 0)
      return bidfmkd::cuda::kd_loss(at<const float>(student), at<const float>(teacher), n_tasks,
                                    n_images, kd, at<float>(loss), {device, at<void>(stream)});
  }
  bidfmkd::kd_loss(at<const float>(student), at<const float>(teacher), n_tasks, n_images, kd,
                   at<float>(loss));
}

void kd_loss_backward(Address grad, Address student, Address teacher, Address out, Int n_tasks,
                      Int n_images, Int n_classes, double temperature, int scores_kind,
                      int divergence, int /*n_threads*/, int device, Address stream) {
  const auto kd = kd_settings(n_classes, temperature, scores_kind, divergence);
  if constexpr (kHasCuda) {
    if (device >= 0)
      return bidfmkd::cuda::kd_loss_backward(at<const float>(grad), at<const float>(student),
                                             at<const float>(teacher), n_tasks, n_images, kd,
                                             at<float>(out), {device, at<void>(stream)});
  }
  bidfmkd::kd_loss_backward(at<const float>(grad), at<const float>(student),
                            at<const float>(teacher), n_tasks, n_images, kd, at<float>(out));
}

void kd_loss_double_backward(Address grad_out, Address grad, Address student, Address teacher,
                             Address grad_grad, Address grad_student, Int n_tasks, Int n_images,
                             Int n_classes, double temperature, int scores_kind, int divergence,
                             int /*n_threads*/, int device, Address stream) {
  const auto kd = kd_settings(n_classes, temperature, scores_kind, divergence);
  if constexpr (kHasCuda) {
    if (device >= 0)
      return bidfmkd::cuda::kd_loss_double_backward(
          at<const float>(grad_out), at<const float>(grad), at<const float>(student),
          at<const float>(teacher), n_tasks, n_images, kd, at<float>(grad_grad),
          at<float>(grad_student), {device, at<void>(stream)});
  }
  bidfmkd::kd_loss_double_backward(at<const float>(grad_out), at<const float>(grad),
                                   at<const float>(student), at<const float>(teacher), n_tasks,
                                   n_images, kd, at<float>(grad_grad), at<float>(grad_student));
}

bidfmkd::NormPoolSaved norm_pool_saved(Address place, Address normalised, Address mean, Address r) {
  return {at<std::int32_t>(place), at<float>(normalised), at<float>(mean), at<float>(r)};
}

void norm_pool(Int n_images, Int height, Int width, Int channels, Address x, Address weight,
               Address bias, double eps, Address y, Address place, Address normalised, Address mean,
               Address r, int n_threads, int device, Address stream) {
  const bidfmkd::NormPoolShape shape{n_images, height, width, channels};
  const auto saved = norm_pool_saved(place, normalised, mean, r);
  if constexpr (kHasCuda) {
    if (device >= 0)
      return bidfmkd::cuda::norm_pool(shape, at<const float>(x), at<const float>(weight),
                                      at<const float>(bias), eps, at<float>(y), saved,
                                      {device, at<void>(stream)});
  }
  bidfmkd::kernels().norm_pool(shape, at<const float>(x), at<const float>(weight),
                               at<const float>(bias), eps, at<float>(y), saved, n_threads);
}

void norm_pool_backward(Int n_images, Int height, Int width, Int channels, Address grad, Address x,
                        Address weight, Address place, Address normalised, Address mean, Address r,
                        Address grad_x, Address grad_weight, Address grad_bias, int n_threads,
                        int device, Address stream) {
  const bidfmkd::NormPoolShape shape{n_images, height, width, channels};
  const auto saved = norm_pool_saved(place, normalised, mean, r);
  if constexpr (kHasCuda) {
    if (device >= 0)
      return bidfmkd::cuda::norm_pool_backward(shape, at<const float>(grad), at<const float>(x),
                                               at<const float>(weight), saved, at<float>(grad_x),
                                               at<float>(grad_weight), at<float>(grad_bias),
                                               {device, at<void>(stream)});
  }
  bidfmkd::kernels().norm_pool_backward(shape, at<const float>(grad), at<const float>(x),
                                        at<const float>(weight), saved, at<float>(grad_x),
                                        at<float>(grad_weight), at<float>(grad_bias), n_threads);
}

void norm_pool_double_backward(Int n_images, Int height, Int width, Int channels, Address v,
                               Address p, Address s, Address grad, Address x, Address weight,
                               Address place, Address normalised, Address mean, Address r,
                               Address grad_grad, Address grad_x, Address grad_weight,
                               int n_threads, int device, Address stream) {
  const bidfmkd::NormPoolShape shape{n_images, height, width, channels};
  const auto saved = norm_pool_saved(place, normalised, mean, r);
  if constexpr (kHasCuda) {
    if (device >= 0)
      return bidfmkd::cuda::norm_pool_double_backward(
          shape, at<const float>(v), at<const float>(p), at<const float>(s), at<const float>(grad),
          at<const float>(x), at<const float>(weight), saved, at<float>(grad_grad),
          at<float>(grad_x), at<float>(grad_weight), {device, at<void>(stream)});
  }
  bidfmkd::kernels().norm_pool_double_backward(
      shape, at<const float>(v), at<const float>(p), at<const float>(s), at<const float>(grad),
      at<const float>(x), at<const float>(weight), saved, at<float>(grad_grad), at<float>(grad_x),
      at<float>(grad_weight), n_threads);
}

// Return why the CUDA kernels cannot run on `device`; empty if they can.
std::string cuda_problem(int device) {
  if constexpr (kHasCuda) return bidfmkd::cuda::problem(device);
  return "this build has no CUDA kernels";
}

py::dict build_info() {
  std::vector<std::string> architectures;
  std::istringstream list(kArchitectures);
  for (std::string name; std::getline(list, name, ',');) architectures.push_back("sm_" + name);
  py::dict info;
  info["compiler"] = BIDFMKD_COMPILER;
  info["devices"] =
      kHasCuda ? std::vector<std::string>{"cpu", "cuda"} : std::vector<std::string>{"cpu"};
  info["cpu_level"] = std::string(bidfmkd::kernels().name);
  info["cpu_levels"] = bidfmkd::available_levels();
  info["cuda_architectures"] = architectures;
  return info;
}

// Exposed for the tests: Random123's known answers are checked against the code that the kernels
// use.
std::vector<std::uint32_t> philox(const std::vector<std::uint32_t>& counter,
                                  const std::vector<std::uint32_t>& key, int rounds) {
  const bidfmkd::PhiloxWords c{{counter.at(0), counter.at(1), counter.at(2), counter.at(3)}};
  const auto generate = rounds == bidfmkd::kNormalRounds
                            ? bidfmkd::philox4x32<bidfmkd::kNormalRounds>
                            : bidfmkd::philox4x32<bidfmkd::kSignRounds>;
  const bidfmkd::PhiloxWords w = generate(c, key.at(0), key.at(1));
  return {w.word[0], w.word[1], w.word[2], w.word[3]};
}

void stream_fill(float value, Int n, Address out, int n_threads) {
  bidfmkd::kernels().stream_fill(value, n, at<float>(out), n_threads);
}

std::int32_t normal(std::uint32_t half) { return bidfmkd::normal_from_half(half); }

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of bidfmkd_fast: addresses and sizes in, nothing of torch.";
  const auto without_gil = py::call_guard<py::gil_scoped_release>();
#if defined(BIDFMKD_CUDA)
  module.def("perturb_workspace", &perturb_workspace, without_gil);
  module.def("gradient_workspace", &gradient_workspace, without_gil);
#endif
  module.def("perturb", &perturb, without_gil);
  module.def("estimate_gradient", &estimate_gradient, without_gil);
  module.def("zo_kd_gradient", &zo_kd_gradient, without_gil);
  module.def("kd_loss", &kd_loss, without_gil);
  module.def("kd_loss_backward", &kd_loss_backward, without_gil);
  module.def("kd_loss_double_backward", &kd_loss_double_backward, without_gil);
  module.def("norm_pool", &norm_pool, without_gil);
  module.def("norm_pool_backward", &norm_pool_backward, without_gil);
  module.def("norm_pool_double_backward", &norm_pool_double_backward, without_gil);
  module.def("stream_fill", &stream_fill, without_gil);
  module.def("cuda_problem", &cuda_problem, without_gil);
  module.def("build_info", &build_info);
  module.def("select_cpu_level", &bidfmkd::select_level);
  module.def("philox4x32", &philox);
  module.def("normal_from_half", &normal);
}
