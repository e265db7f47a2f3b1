#include "dispatch.h"

#include <atomic>

#if defined(BIDFMKD_X86)
#include <cpuid.h>
#endif

namespace bidfmkd {
namespace {

#if defined(BIDFMKD_X86)
struct InstructionSets {
  bool avx2 = false, avx512 = false;
};

// Ask the CPU for its instruction sets, and the operating system (XGETBV) for the registers that it
// saves. __builtin_cpu_supports would ask the compiler's runtime library, and that of ziglang does
// not know.
InstructionSets instruction_sets() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return {};
  const bool fma = c & bit_FMA;
  unsigned saved = 0, high = 0;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  const bool ymm = (saved & 0x06) == 0x06, zmm = (saved & 0xE6) == 0xE6;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {};
  constexpr unsigned kAvx512 = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
  return {ymm && fma && (b & bit_AVX2), zmm && fma && (b & kAvx512) == kAvx512};
}
#endif

// Return the tables whose instruction set this machine has, best first.
std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#if defined(BIDFMKD_X86)
  const InstructionSets has = instruction_sets();
  if (has.avx512) found.push_back(&kAvx512Kernels);
  if (has.avx2) found.push_back(&kAvx2Kernels);
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
