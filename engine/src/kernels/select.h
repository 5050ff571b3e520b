#pragma once

#include <string_view>

#include "kernels/kernels.h"

namespace lowbit {

// The kernels called `isa`, or the best that this CPU runs when `isa` is empty.
// Throws std::invalid_argument when the name is unknown or the CPU or the build lacks them.
const Kernels& select_kernels(std::string_view isa);

}  // namespace lowbit
