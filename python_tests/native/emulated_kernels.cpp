// Runs the CUDA kernels under emulated/cuda_runtime.h against the CPU's: small shapes, odd sizes,
// addresses out of line. `emulated_kernels SEED` checks them all with a thread order drawn from
// SEED (0: their own); `emulated_kernels fault NAME` makes one of the mistakes that the emulation
// has to notice.
#include <cuda_runtime.h>

#include <cstdlib>

#include "cpu/level.h"
#include "cuda/rows.cuh"

namespace {

using bidfmkd::Directions;
using bidfmkd::Divergence;
using bidfmkd::Drawing;
using bidfmkd::ScoresKind;

const bidfmkd::cuda::Queue kQueue{0, nullptr};
constexpr double kRelative = 1e-5,
                 kAbsolute =
                     4e-6;  // two float32 results of one formula, each "kernel" of tolerances.py
std::mt19937 generator;
long n_checked = 0;

std::vector<float> normals(std::int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& value : values) value = normal(generator);
  return values;
}

std::vector<float> unwritten(std::int64_t n) {
  return std::vector<float>(static_cast<std::size_t>(n), NAN);
}

// Absolute differences count in units of the largest value, or of `terms` where sums may cancel: a
// sum's error scales with its terms.
void compare(const char* what, const std::vector<float>& actual, const std::vector<float>& expected,
             bool exactly = false, double terms = 0.0) {
  double largest = terms;
  for (float value : expected) largest = std::max(largest, std::fabs(static_cast<double>(value)));
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double error = std::fabs(static_cast<double>(actual[i]) - expected[i]);
    const double allowed = exactly ? 0.0 : kRelative * std::fabs(expected[i]) + kAbsolute * largest;
    if (error <= allowed || (std::isnan(actual[i]) && std::isnan(expected[i]))) continue;
    std::printf("%s: element %zu of %zu is %.9g, not %.9g\n", what, i, expected.size(), actual[i],
                expected[i]);
    std::exit(1);
  }
  ++n_checked;
}

struct Shape {
  std::int64_t n_images, channels, height, width, grid;
};

void check_directions(const Shape& shape, std::int64_t q, std::int64_t first_direction,
                      std::int64_t first_image, std::size_t shift) {
  for (int kind = 0; kind < 4; ++kind) {
    const auto directions = static_cast<Directions>(kind);
    const std::int64_t d = shape.channels * shape.height * shape.width, n = shape.n_images * d;
    const auto seed = static_cast<std::uint64_t>(generator()) << 32 | generator();
    const std::int64_t state[2] = {static_cast<std::int64_t>(seed),
                                   static_cast<std::int64_t>(generator())};
    const Drawing drawing{
        {shape.n_images, d, directions, shape.channels, shape.height, shape.width, shape.grid},
        state,
        q,
        0.3,
        first_direction,
        first_image};
    // `shift` elements in front put everything out of line; nothing may be written there.
    const std::vector<float> x = normals(static_cast<std::int64_t>(shift) + n);
    std::vector<float> points = unwritten(static_cast<std::int64_t>(shift) + (1 + q) * n),
                       expected = points;
    std::vector<float> workspace = unwritten(bidfmkd::cuda::perturb_workspace(drawing.geometry, q));
    bidfmkd::cuda::perturb(drawing, x.data() + shift, workspace.data(), points.data() + shift,
                           kQueue);
    bidfmkd::portable::perturb(drawing, x.data() + shift, expected.data() + shift, 1);
    char name[200];
    std::snprintf(
        name, sizeof name, "perturb kind %d, [%ld, %ld, %ld, %ld] q %ld first %ld %ld shift %zu",
        kind, static_cast<long>(shape.n_images), static_cast<long>(shape.channels),
        static_cast<long>(shape.height), static_cast<long>(shape.width), static_cast<long>(q),
        static_cast<long>(first_direction), static_cast<long>(first_image), shift);
    compare(name, points, expected, directions == Directions::kRademacher);

    const std::vector<float> differences = normals(q * shape.n_images);
    workspace = unwritten(bidfmkd::cuda::gradient_workspace(drawing.geometry, q, 0));
    std::vector<float> gradient = unwritten(n), wanted = gradient;
    bidfmkd::cuda::estimate_gradient(drawing, differences.data(), workspace.data(), gradient.data(),
                                     kQueue);
    bidfmkd::portable::estimate_gradient(drawing, differences.data(), wanted.data(), 1);
    std::memcpy(name, "grad of", 7);
    double squares = 0.0;
    for (float difference : differences) squares += static_cast<double>(difference) * difference;
    const double terms = drawing.geometry.n_random() / (std::max<double>(q, 1) * drawing.mu) *
                         std::sqrt(squares / d);
    compare(name, gradient, wanted, false, terms);
    // In place, as zo_kd_gradient does it.
    std::copy(differences.begin(), differences.end(), workspace.begin());
    std::vector<float> again = unwritten(n);
    bidfmkd::cuda::estimate_gradient(drawing, workspace.data(), workspace.data(), again.data(),
                                     kQueue);
    compare(name, again, gradient, true);
  }
}

void check_normals() {
  for (std::uint32_t half = 0; half < 1u << 16; ++half) {
    const float normal = bidfmkd::cuda::float_normal(bidfmkd::cuda::kSizes, half | 0xABCD0000u);
    const std::int32_t wanted = bidfmkd::normal_from_half(half);
    if (normal == std::ldexp(static_cast<float>(wanted), -23)) continue;
    std::printf("normal of half %x is %.9g, not %d\n", half, normal, wanted);
    std::exit(1);
  }
  ++n_checked;
}

void check_halves() {
  for (std::uint32_t bits = 0; bits < 1u << 16; ++bits) {
    const int exponent = static_cast<int>(bits >> 10 & 31),
              mantissa = static_cast<int>(bits & 1023);
    double value =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (exponent == 31) value = mantissa ? NAN : INFINITY;
    value = bits >> 15 ? -value : value;
    const float half = bidfmkd::Float16{static_cast<std::uint16_t>(bits)};
    const float brain = bidfmkd::BFloat16{static_cast<std::uint16_t>(bits)};
    const bool fits = half == value || (std::isnan(half) && std::isnan(value));
    if (fits && bidfmkd::float_to_bits(brain) == bits << 16 &&
        std::signbit(half) == (bits >> 15 == 1))
      continue;
    std::printf("16-bit number %x becomes %g and %g\n", bits, half, brain);
    std::exit(1);
  }
  ++n_checked;
}

// Scores of one kind; their upper 16 bits are bfloat16 numbers already.
std::vector<float> make_scores(ScoresKind kind, std::int64_t rows, std::int64_t n_classes) {
  std::vector<float> scores = normals(rows * n_classes);
  for (std::int64_t row = 0; row < rows && kind != ScoresKind::kLogits; ++row) {
    float* at = scores.data() + row * n_classes;
    double sum = 0.0;
    for (std::int64_t c = 0; c < n_classes; ++c) sum += std::exp(at[c]);
    for (std::int64_t c = 0; c < n_classes; ++c)
      at[c] = static_cast<float>(kind == ScoresKind::kProbabilities ? std::exp(at[c]) / sum
                                                                    : at[c] - std::log(sum));
  }
  for (float& score : scores)
    score = bidfmkd::bits_to_float(bidfmkd::float_to_bits(score) & 0xFFFF0000u);
  return scores;
}

std::vector<std::uint16_t> upper_halves(const std::vector<float>& scores) {
  std::vector<std::uint16_t> halves;
  for (float score : scores)
    halves.push_back(static_cast<std::uint16_t>(bidfmkd::float_to_bits(score) >> 16));
  return halves;
}

void check_losses(ScoresKind kind, Divergence divergence, std::int64_t n_images,
                  std::int64_t n_classes, std::int64_t q) {
  const std::vector<float> scores = make_scores(kind, (1 + q) * n_images, n_classes);
  const std::vector<float> student = make_scores(kind, n_images, n_classes);
  std::vector<std::int64_t> labels;
  for (std::int64_t b = 0; b < n_images; ++b) labels.push_back(b % n_classes);
  for (double weight : {0.0, 0.7}) {
    const bidfmkd::ObjectiveSettings settings{n_classes, kind, divergence, weight};
    std::vector<float> wanted = unwritten(q * n_images), wanted_loss = unwritten(n_images);
    bidfmkd::objective_differences(scores.data(), labels.data(), student.data(), n_images, q,
                                   settings, wanted.data(), wanted_loss.data(), 1);
    const std::vector<std::uint16_t> short_scores = upper_halves(scores),
                                     short_student = upper_halves(student);
    for (bool is_short : {false, true}) {
      std::vector<float> differences = unwritten(q * n_images), loss = unwritten(n_images);
      bidfmkd::cuda::objective_differences(
          is_short ? static_cast<const void*>(short_scores.data()) : scores.data(), labels.data(),
          weight == 0.0
              ? nullptr
              : (is_short ? static_cast<const void*>(short_student.data()) : student.data()),
          is_short ? bidfmkd::ScoreType::kBFloat16 : bidfmkd::ScoreType::kFloat32, n_images, q,
          settings, differences.data(), loss.data(), kQueue);
      compare("objective differences", differences, wanted);
      compare("objective", loss, wanted_loss);
    }
  }
  // No one has looked at labels that live on a device.
  labels[0] = n_classes;
  std::vector<float> differences = unwritten(q * n_images),
                     loss(static_cast<std::size_t>(n_images), 0.0f);
  bidfmkd::cuda::objective_differences(
      scores.data(), labels.data(), nullptr, bidfmkd::ScoreType::kFloat32, n_images, q,
      {n_classes, kind, divergence, 0.0}, differences.data(), loss.data(), kQueue);
  compare("label out of range", {loss[0]}, {NAN});
}

void check_distillation(ScoresKind kind, Divergence divergence, std::int64_t n_tasks,
                        std::int64_t n_images, std::int64_t n_classes) {
  const std::int64_t rows = n_tasks * n_images, n = rows * n_classes;
  const bidfmkd::KDSettings kd{n_classes, 2.5, kind, divergence};
  const std::vector<float> student = normals(n), teacher = make_scores(kind, rows, n_classes),
                           grad = normals(n_tasks);
  const std::vector<float> grad_out = normals(n);
  std::vector<float> loss = unwritten(n_tasks), wanted_loss = loss, out = unwritten(n),
                     wanted_out = out;
  bidfmkd::cuda::kd_loss(student.data(), teacher.data(), n_tasks, n_images, kd, loss.data(),
                         kQueue);
  bidfmkd::kd_loss(student.data(), teacher.data(), n_tasks, n_images, kd, wanted_loss.data());
  compare("kd_loss", loss, wanted_loss);
  bidfmkd::cuda::kd_loss_backward(grad.data(), student.data(), teacher.data(), n_tasks, n_images,
                                  kd, out.data(), kQueue);
  bidfmkd::kd_loss_backward(grad.data(), student.data(), teacher.data(), n_tasks, n_images, kd,
                            wanted_out.data());
  compare("kd_loss_backward", out, wanted_out);
  std::vector<float> grad_grad = unwritten(n_tasks), wanted_grad_grad = grad_grad;
  std::fill(out.begin(), out.end(), NAN);
  bidfmkd::cuda::kd_loss_double_backward(grad_out.data(), grad.data(), student.data(),
                                         teacher.data(), n_tasks, n_images, kd, grad_grad.data(),
                                         out.data(), kQueue);
  bidfmkd::kd_loss_double_backward(grad_out.data(), grad.data(), student.data(), teacher.data(),
                                   n_tasks, n_images, kd, wanted_grad_grad.data(),
                                   wanted_out.data());
  compare("kd_loss_double_backward, grad", grad_grad, wanted_grad_grad);
  compare("kd_loss_double_backward, student", out, wanted_out);
}

// [N, C, H, W] from [N, H, W, C], or the other way.
template <class Number>
std::vector<Number> moved(const std::vector<Number>& from, const bidfmkd::NormPoolShape& shape,
                          bool channels_last) {
  std::vector<Number> to(from.size());
  const std::int64_t plane = shape.height * shape.width;
  for (std::int64_t image = 0; image < shape.n_images; ++image)
    for (std::int64_t c = 0; c < shape.channels; ++c)
      for (std::int64_t i = 0; i < plane; ++i) {
        const auto first = static_cast<std::size_t>((image * shape.channels + c) * plane + i);
        const auto last = static_cast<std::size_t>((image * plane + i) * shape.channels + c);
        channels_last ? to[last] = from[first] : to[first] = from[last];
      }
  return to;
}

// What norm_pool leaves for its derivatives, and where.
struct Pooled {
  std::vector<std::int32_t> place;
  std::vector<float> normalised, mean, r;

  explicit Pooled(const bidfmkd::NormPoolShape& cells)
      : place(
            static_cast<std::size_t>(cells.n_images * cells.channels * cells.height * cells.width),
            -1),
        normalised(place.size(), NAN),
        mean(static_cast<std::size_t>(cells.channels), NAN),
        r(mean) {}
  bidfmkd::NormPoolSaved saved() {
    return {place.data(), normalised.data(), mean.data(), r.data()};
  }
};

void check_norm_pool(const bidfmkd::NormPoolShape& shape) {
  const bidfmkd::NormPoolShape cells{shape.n_images, shape.height / 2, shape.width / 2,
                                     shape.channels};
  const std::int64_t n = shape.n_images * shape.channels * shape.height * shape.width;
  const std::int64_t n_cells = cells.n_images * cells.channels * cells.height * cells.width,
                     c = shape.channels;
  std::vector<float> x = normals(n);
  for (float& value : x) value += 10.0f;
  const std::vector<float> weight = normals(c), bias = normals(c), grad = normals(n_cells),
                           v = normals(n), p = normals(c), s = normals(c),
                           x_last = moved(x, shape, true), grad_last = moved(grad, cells, true),
                           v_last = moved(v, shape, true);
  Pooled own(cells), wanted(cells);
  std::vector<float> y = unwritten(n_cells), wanted_y = y;
  bidfmkd::cuda::norm_pool(shape, x.data(), weight.data(), bias.data(), 1e-5, y.data(), own.saved(),
                           kQueue);
  bidfmkd::portable::norm_pool(shape, x_last.data(), weight.data(), bias.data(), 1e-5,
                               wanted_y.data(), wanted.saved(), 1);
  compare("norm_pool", y, moved(wanted_y, cells, false));
  compare("norm_pool, normalised", own.normalised, moved(wanted.normalised, cells, false));
  const std::vector<std::int32_t> places = moved(wanted.place, cells, false);
  compare("norm_pool, place", {own.place.begin(), own.place.end()}, {places.begin(), places.end()},
          true);
  compare("norm_pool, mean", own.mean, wanted.mean);
  compare("norm_pool, r", own.r, wanted.r);

  const double terms = std::sqrt(static_cast<double>(n) / static_cast<double>(c));
  std::vector<float> grad_x = unwritten(n), grad_weight = unwritten(c), grad_bias = grad_weight,
                     wanted_x = grad_x, wanted_weight = grad_weight, wanted_bias = grad_weight;
  bidfmkd::cuda::norm_pool_backward(shape, grad.data(), x.data(), weight.data(), own.saved(),
                                    grad_x.data(), grad_weight.data(), grad_bias.data(), kQueue);
  bidfmkd::portable::norm_pool_backward(shape, grad_last.data(), x_last.data(), weight.data(),
                                        wanted.saved(), wanted_x.data(), wanted_weight.data(),
                                        wanted_bias.data(), 1);
  compare("norm_pool_backward, x", grad_x, moved(wanted_x, shape, false));
  compare("norm_pool_backward, weight", grad_weight, wanted_weight, false, terms);
  compare("norm_pool_backward, bias", grad_bias, wanted_bias, false, terms);

  std::vector<float> grad_grad = unwritten(n_cells), wanted_grad = grad_grad;
  bidfmkd::cuda::norm_pool_double_backward(shape, v.data(), p.data(), s.data(), grad.data(),
                                           x.data(), weight.data(), own.saved(), grad_grad.data(),
                                           grad_x.data(), grad_weight.data(), kQueue);
  bidfmkd::portable::norm_pool_double_backward(
      shape, v_last.data(), p.data(), s.data(), grad_last.data(), x_last.data(), weight.data(),
      wanted.saved(), wanted_grad.data(), wanted_x.data(), wanted_weight.data(), 1);
  compare("norm_pool_double_backward, grad", grad_grad, moved(wanted_grad, cells, false));
  compare("norm_pool_double_backward, x", grad_x, moved(wanted_x, shape, false));
  compare("norm_pool_double_backward, weight", grad_weight, wanted_weight, false, terms);
}

__global__ void out_of_bounds(float* values) { values[threadIdx.x] = 0.0f; }

__global__ void misaligned(float* values) {
  *reinterpret_cast<float4*>(values + 1) = make_float4(0, 0, 0, 0);
}

__global__ void out_of_shared_bounds(float* values) {
  __shared__ float small[8];
  small[threadIdx.x] = 0.0f;
  __syncthreads();
  values[0] = small[0];
}

__global__ void missed_barrier(float* values) {
  if (threadIdx.x == 0) return;
  __syncthreads();
  values[0] = 0.0f;
}

__global__ void unset_shared_memory(float* values) {
  __shared__ float total;
  total += 1.0f;
  __syncthreads();
  values[0] = total;
}

__global__ void no_barrier(float* values) {  // right in the threads' own order only
  __shared__ float ring[32];
  ring[threadIdx.x] = static_cast<float>(threadIdx.x);
  values[threadIdx.x] = threadIdx.x == 0 ? 0.0f : ring[threadIdx.x - 1];
}

int make_fault(const std::string& name) {
  std::vector<float> values(name == "out_of_bounds" ? 31 : 32), expected(values.size());
  const auto run = [&](void (*kernel)(float*)) {
    bidfmkd::cuda::launch("fault", kQueue, kernel, {1, dim3(32)}, values.data());
  };
  if (name == "out_of_bounds") run(out_of_bounds);
  if (name == "misaligned") run(misaligned);
  if (name == "out_of_shared_bounds") run(out_of_shared_bounds);
  if (name == "missed_barrier") run(missed_barrier);
  if (name == "unset_shared_memory") {
    run(unset_shared_memory);
    return std::isnan(values[0]) ? 1 : 0;
  }
  if (name == "no_barrier") {
    emulated::block.seed = 1;
    run(no_barrier);
    for (int i = 1; i < 32; ++i)
      if (values[static_cast<std::size_t>(i)] != static_cast<float>(i - 1)) return 1;
  }
  return 0;
}

}  // namespace

int main(int n_arguments, char** arguments) {
  if (n_arguments == 3) return make_fault(arguments[2]);
  emulated::block.seed = static_cast<unsigned>(std::atol(arguments[1]));
  generator.seed(emulated::block.seed);
  check_normals();
  check_halves();
  check_directions({0, 3, 8, 8, 2}, 3, 0, 0, 0);
  for (std::int64_t q : {0, 1, 33, 70}) check_directions({2, 3, 7, 5, 2}, q, 0, 0, 0);
  for (std::int64_t first : {1, 31, 45}) check_directions({3, 1, 6, 6, 6}, 40, first, 7, 0);
  check_directions({1, 1, 2, 2, 1}, 300, 3, 0,
                   0);  // more groups of directions than slices, the last one partial
  check_directions({2, 3, 32, 32, 4}, 9, 0, 0, 0);  // whole vectors
  check_directions({2, 3, 8, 8, 3}, 5, 0, 0, 1);    // the same out of line
  check_directions({1, 1, 100, 131, 5}, 2, 0, 0,
                   0);  // several tiles, the last one partial, lines of odd length
  check_directions({1, 3, 105, 108, 7}, 2, 0, 0,
                   0);  // rows of several pieces, a block's share begins within one
  check_directions({7, 1, 5, 8, 2}, 3, 0, 0, 0);     // shares of several pieces
  check_directions({1, 2, 9, 300, 9}, 2, 0, 0, 0);   // more columns than shared memory has taps for
  check_directions({2, 3, 30, 29, 28}, 2, 4, 1, 0);  // fields too large for shared memory
  for (ScoresKind kind :
       {ScoresKind::kLogits, ScoresKind::kProbabilities, ScoresKind::kLogProbabilities}) {
    for (Divergence divergence : {Divergence::kL1, Divergence::kL1Probabilities, Divergence::kKL}) {
      check_losses(kind, divergence, 3, 5, 9);
      check_losses(kind, divergence, 1, 64, 0);
      check_distillation(kind, divergence, 1, 1, 5);
      check_distillation(kind, divergence, 3, 37, 5);
      check_distillation(kind, divergence, 2, 300, 2);
    }
  }
  check_losses(ScoresKind::kLogits, Divergence::kKL, 2, 1, 300);  // more points than threads
  for (const bidfmkd::NormPoolShape& shape : std::vector<bidfmkd::NormPoolShape>{
           {3, 8, 8, 5}, {2, 7, 5, 3}, {1, 2, 2, 1}, {3, 1, 3, 2}, {4, 20, 18, 2}})
    check_norm_pool(shape);
  std::printf("%ld comparisons\n", n_checked);
}
