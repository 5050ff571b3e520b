// The words of pixels from those of single ones: the including file has defined passed_word(x, limits, count), the bits
// of up to 64 channels. Included inside the target region, so that each file compiles it for itself.
#pragma once

#include "kernels/kernels.h"

namespace lowbit {
namespace {

void float_bits(const float* x, const FloatLimits& limits, const Rows& rows, uint64_t* words, size_t pitch) {
  for (size_t p = 0; p < rows.pixels; ++p, x += rows.stride, words += pitch)
    for (size_t c = 0; c < rows.channels; c += 64)
      words[c / 64] = passed_word(x + c, {limits.thresholds + c, limits.flips + c},
                                  rows.channels - c < 64 ? rows.channels - c : 64);
}

}  // namespace
}  // namespace lowbit
