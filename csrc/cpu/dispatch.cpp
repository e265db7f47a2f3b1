#include "dispatch.h"

#include <atomic>

namespace bidfmkd {
namespace {

// Return the tables whose instruction set this machine has, best first.
std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#if defined(BIDFMKD_X86)
  __builtin_cpu_init();  // GCC's runtime does it when the module is loaded, others do not
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    found.push_back(&kAvx512Kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back(&kAvx2Kernels);
#endif
  found.push_back(&kPortableKernels);
  return found;
}

std::atomic<const Kernels*>& selected() {
  static std::atomic<const Kernels*> current{supported().front()};
  return current;
}

}  // namespace

const Kernels& kernels() { return *selected().load(std::memory_order_relaxed); }

std::vector<std::string> available_levels() {
  std::vector<std::string> names;
  for (const Kernels* table : supported()) names.emplace_back(table->name);
  return names;
}

bool select_level(const std::string& name) {
  for (const Kernels* table : supported()) {
    if (name == table->name) {
      selected().store(table);
      return true;
    }
  }
  return false;
}

}  // namespace bidfmkd
