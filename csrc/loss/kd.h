// Defines the distillation loss of one image, T^2 * D(teacher, student) (Hinton et al., 2015), with
// its first and second derivatives in the student's logits. The callers divide by the number of
// images.
#pragma once

#include "objective.h"

namespace bidfmkd {

struct KDSettings {
  std::int64_t n_classes;
  double temperature;
  ScoresKind kind;  // of the teacher
  Divergence divergence;
};

// One row of scores as softmax(scores / T). Probabilities p become p^(1/T), normalised, which is
// the same thing: log p differs from the logits by a constant only.
struct SoftRow {
  const float* scores;
  double inverse_temperature;
  bool take_log;  // the scores are probabilities, whose logarithm is taken first
  double log_normaliser;

  BIDFMKD_BOTH double tempered(std::int64_t c) const {
    const double s = scores[c];
    return inverse_temperature *
           (take_log ? log(s < kLowestProbability ? kLowestProbability : s) : s);
  }

  BIDFMKD_BOTH double log_probability(std::int64_t c) const { return tempered(c) - log_normaliser; }
  BIDFMKD_BOTH double probability(std::int64_t c) const { return exp(log_probability(c)); }

  BIDFMKD_BOTH static SoftRow make(const float* scores, std::int64_t n_classes, double temperature,
                                   ScoresKind kind) {
    SoftRow row{scores, 1.0 / temperature, kind == ScoresKind::kProbabilities, 0.0};
    double top = row.tempered(0);
    for (std::int64_t c = 1; c < n_classes; ++c)
      top = row.tempered(c) > top ? row.tempered(c) : top;
    double sum = 0.0;
    for (std::int64_t c = 0; c < n_classes; ++c) sum += exp(row.tempered(c) - top);
    row.log_normaliser = top + log(sum);
    return row;
  }
};

BIDFMKD_BOTH double sign_of(double value) { return value > 0.0 ? 1.0 : (value < 0.0 ? -1.0 : 0.0); }

BIDFMKD_BOTH double kd_image(const float* student, const float* teacher, const KDSettings& kd) {
  double sum = 0.0;
  if (kd.divergence == Divergence::kL1) {
    for (std::int64_t c = 0; c < kd.n_classes; ++c)
      sum += fabs(static_cast<double>(student[c]) - teacher[c]);
    return kd.temperature * sum;
  }
  const SoftRow s = SoftRow::make(student, kd.n_classes, kd.temperature, ScoresKind::kLogits);
  const SoftRow t = SoftRow::make(teacher, kd.n_classes, kd.temperature, kd.kind);
  for (std::int64_t c = 0; c < kd.n_classes; ++c) {
    const double p = t.probability(c);
    sum += kd.divergence == Divergence::kL1Probabilities ? fabs(s.probability(c) - p)
           : p == 0.0 ? 0.0  // 0 log 0 is 0
                      : p * (t.log_probability(c) - s.log_probability(c));
  }
  return kd.temperature * kd.temperature * sum;
}

// gradient[c] = scale * d kd_image / d student[c] / T; with T^2 in the loss, the caller's scale is
// T * grad / N.
BIDFMKD_BOTH void kd_image_gradient(const float* student, const float* teacher, double scale,
                                    const KDSettings& kd, float* gradient) {
  if (kd.divergence == Divergence::kL1) {
    for (std::int64_t c = 0; c < kd.n_classes; ++c)
      gradient[c] =
          static_cast<float>(scale * sign_of(static_cast<double>(student[c]) - teacher[c]));
    return;
  }
  const SoftRow s = SoftRow::make(student, kd.n_classes, kd.temperature, ScoresKind::kLogits);
  const SoftRow t = SoftRow::make(teacher, kd.n_classes, kd.temperature, kd.kind);
  if (kd.divergence == Divergence::kKL) {
    for (std::int64_t c = 0; c < kd.n_classes; ++c)
      gradient[c] = static_cast<float>(scale * (s.probability(c) - t.probability(c)));
    return;
  }
  double mean_sign = 0.0;
  for (std::int64_t c = 0; c < kd.n_classes; ++c)
    mean_sign += s.probability(c) * sign_of(s.probability(c) - t.probability(c));
  for (std::int64_t c = 0; c < kd.n_classes; ++c) {
    const double p = s.probability(c);
    gradient[c] = static_cast<float>(scale * p * (sign_of(p - t.probability(c)) - mean_sign));
  }
}

// hessian_v[c] = scale * (d^2 kd_image / d student^2 v)[c]; with T^2 in the loss, the caller's
// scale is grad / N. Returns <v, J>, J the gradient above with scale 1.
BIDFMKD_BOTH double kd_image_hessian(const float* student, const float* teacher, const float* v,
                                     double scale, const KDSettings& kd, float* hessian_v) {
  double projected = 0.0;
  if (kd.divergence == Divergence::kL1) {
    for (std::int64_t c = 0; c < kd.n_classes; ++c) {
      projected += v[c] * sign_of(static_cast<double>(student[c]) - teacher[c]);
      hessian_v[c] = 0.0f;
    }
    return projected;
  }
  const SoftRow s = SoftRow::make(student, kd.n_classes, kd.temperature, ScoresKind::kLogits);
  const SoftRow t = SoftRow::make(teacher, kd.n_classes, kd.temperature, kd.kind);
  double mean_v = 0.0, mean_sign = 0.0;
  for (std::int64_t c = 0; c < kd.n_classes; ++c) {
    const double p = s.probability(c);
    mean_v += p * v[c];
    mean_sign += p * sign_of(p - t.probability(c));
  }
  if (kd.divergence == Divergence::kKL) {
    for (std::int64_t c = 0; c < kd.n_classes; ++c) {
      const double p = s.probability(c);
      projected += v[c] * (p - t.probability(c));
      hessian_v[c] = static_cast<float>(scale * p * (v[c] - mean_v));
    }
    return projected;
  }
  for (std::int64_t c = 0; c < kd.n_classes; ++c) {
    const double p = s.probability(c);
    projected += v[c] * p * (sign_of(p - t.probability(c)) - mean_sign);
  }
  for (std::int64_t c = 0; c < kd.n_classes; ++c) {
    const double p = s.probability(c);
    const double offset = sign_of(p - t.probability(c)) - mean_sign;
    hessian_v[c] = static_cast<float>(scale * p * ((v[c] - mean_v) * offset - projected));
  }
  return projected;
}

}  // namespace bidfmkd
