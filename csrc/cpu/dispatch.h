// Chooses, once, the kernels of the best instruction set this machine has.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace bidfmkd {

const Kernels& kernels();
std::vector<std::string> available_levels();
// For tests: takes the kernels of `name` from now on; false when this machine or build has none of that name.
bool select_level(const std::string& name);

}  // namespace bidfmkd
