// Selects the kernels of the best instruction set that this machine has, once per process.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace bidfmkd {

// Return the selected kernels.
const Kernels& kernels();
// Return the names of the instruction sets that can be selected here, best first.
std::vector<std::string> available_levels();
// Select the kernels of `name` from now on (for tests and benchmarks). Return false if this machine
// or build does not have them.
bool select_level(const std::string& name);

}  // namespace bidfmkd
