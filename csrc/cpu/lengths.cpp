#include "lengths.h"

#include <algorithm>
#include <deque>
#include <mutex>
#include <utility>

namespace bidfmkd {
namespace {

constexpr std::size_t kMostCalls = 64;
constexpr std::size_t kMostLengths = std::size_t{1} << 20;  // 8 MB of doubles

// The lengths that one call of perturb has measured, with the directions and images they belong to.
struct Kept {
  std::int64_t seed, step, n_elements, first_direction, num_directions, first_image, n_images;
  std::vector<double> lengths;
};

std::mutex mutex;  // guards `kept` and `n_lengths`
std::deque<Kept> kept;
std::size_t n_lengths = 0;

// Return the lengths of direction `k` for all images of `drawing`, or nullptr if no call has kept
// them. The newest call is looked at first.
const double* find(const Drawing& drawing, std::int64_t k) {
  for (auto one = kept.rbegin(); one != kept.rend(); ++one) {
    const std::int64_t row = k - one->first_direction,
                       column = drawing.first_image - one->first_image;
    if (one->seed == drawing.state[0] && one->step == drawing.state[1] &&
        one->n_elements == drawing.geometry.n_elements && row >= 0 && row < one->num_directions &&
        column >= 0 && column + drawing.geometry.n_images <= one->n_images)
      return one->lengths.data() + row * one->n_images + column;
  }
  return nullptr;
}

}  // namespace

void keep_lengths(const Drawing& drawing, std::vector<double> lengths) {
  if (lengths.size() > kMostLengths) return;
  const std::lock_guard<std::mutex> lock(mutex);
  n_lengths += lengths.size();
  kept.push_back({drawing.state[0], drawing.state[1], drawing.geometry.n_elements,
                  drawing.first_direction, drawing.num_directions, drawing.first_image,
                  drawing.geometry.n_images, std::move(lengths)});
  while (n_lengths > kMostLengths || kept.size() > kMostCalls) {
    n_lengths -= kept.front().lengths.size();
    kept.pop_front();
  }
}

bool recall_lengths(const Drawing& drawing, double* lengths) {
  const std::lock_guard<std::mutex> lock(mutex);
  const std::int64_t n_images = drawing.geometry.n_images;
  for (std::int64_t k = 0; k < drawing.num_directions; ++k) {
    const double* row = find(drawing, drawing.first_direction + k);
    if (row == nullptr) return false;
    std::copy(row, row + n_images, lengths + k * n_images);
  }
  return true;
}

}  // namespace bidfmkd
