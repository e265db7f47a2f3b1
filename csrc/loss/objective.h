// Defines the recovery objective of one point, from the black box's scores (paper, sections 3.2 and
// 3.3):
//
//   CE(A(x), y) - lambda * [argmax A(x) == argmax f(x)] * D(A(x), f(x)).
//
// It is evaluated in double: the gradient estimate consists of differences between values of this
// objective at points that are very close to each other.
#pragma once

#include <cmath>
#include <cstdint>

#include "../random/philox.h"

namespace bidfmkd {

enum class ScoresKind : int { kLogits = 0, kProbabilities = 1, kLogProbabilities = 2 };
enum class Divergence : int { kL1 = 0, kL1Probabilities = 1, kKL = 2 };

constexpr double kLowestProbability = 1e-7;  // an API may round a probability down to 0

// One row of scores, converted to log-probabilities and probabilities on demand. Score is float or
// converts to it.
template <class Score>
struct ScoreRow {
  const Score* scores;
  std::int64_t n_classes;
  ScoresKind kind;
  double log_normaliser;  // for logits

  BIDFMKD_BOTH static ScoreRow make(const Score* scores, std::int64_t n_classes, ScoresKind kind) {
    double log_normaliser = 0.0;
    if (kind == ScoresKind::kLogits) {
      double top = scores[0];
      BIDFMKD_ROLLED
      for (std::int64_t c = 1; c < n_classes; ++c)
        top = scores[c] > top ? static_cast<double>(scores[c]) : top;
      double sum = 0.0;
      BIDFMKD_ROLLED
      for (std::int64_t c = 0; c < n_classes; ++c) sum += exp(scores[c] - top);
      log_normaliser = top + log(sum);
    }
    return {scores, n_classes, kind, log_normaliser};
  }

  BIDFMKD_BOTH double log_probability(std::int64_t c) const {
    const double s = scores[c];
    if (kind == ScoresKind::kProbabilities)
      return log(s < kLowestProbability ? kLowestProbability : s);  // NaN stays
    return s - log_normaliser;
  }

  BIDFMKD_BOTH double probability(std::int64_t c) const {
    const double s = scores[c];
    return kind == ScoresKind::kProbabilities ? s : exp(s - log_normaliser);
  }

  // Return the first of the highest scores. As in torch, NaN counts as higher than every number.
  BIDFMKD_BOTH std::int64_t argmax() const {
    std::int64_t best = 0;
    double top = scores[0];
    BIDFMKD_ROLLED
    for (std::int64_t c = 1; c < n_classes; ++c) {
      const double s = scores[c];
      if (s > top || (s != s && top == top)) {
        best = c;
        top = s;
      }
    }
    return best;
  }
};

struct ObjectiveSettings {
  std::int64_t n_classes;
  ScoresKind kind;
  Divergence divergence;
  double boundary_weight;
};

// Evaluate the objective. `student` is null when there is no boundary term. A label out of range,
// which cannot be checked on a device, gives NaN.
template <class Score>
BIDFMKD_BOTH double point_objective(const Score* scores, std::int64_t label, const Score* student,
                                    const ObjectiveSettings& settings) {
  if (label < 0 || label >= settings.n_classes) return NAN;
  const auto api = ScoreRow<Score>::make(scores, settings.n_classes, settings.kind);
  double loss = -api.log_probability(label);
  if (student == nullptr || settings.boundary_weight == 0.0) return loss;
  const auto model = ScoreRow<Score>::make(student, settings.n_classes, settings.kind);
  if (api.argmax() != model.argmax()) return loss;
  double distance = 0.0;
  BIDFMKD_ROLLED
  for (std::int64_t c = 0; c < settings.n_classes; ++c) {
    if (settings.divergence == Divergence::kL1) {
      distance += fabs(static_cast<double>(scores[c]) - student[c]);
    } else if (settings.divergence == Divergence::kL1Probabilities) {
      distance += fabs(api.probability(c) - model.probability(c));
    } else if (const double p = api.probability(c); p != 0.0) {  // 0 log 0 is 0
      distance += p * (api.log_probability(c) - model.log_probability(c));
    }
  }
  return loss - settings.boundary_weight * distance;
}

}  // namespace bidfmkd
