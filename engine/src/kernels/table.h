// What every instruction set has in its table: the functions that the including file has by these names. Included
// inside the target region, behind them.
#pragma once

namespace lowbit {
namespace {

constexpr Kernels table(const char* isa) {
  return {.isa = isa,
          .binary_subtract = binary_subtract,
          .binary_bits = binary_bits,
          .binary_floats = binary_floats,
          .float_tile = float_tile,
          .float_tile_bits = float_tile_bits,
          .integer_sums = integer_sums,
          .float_bits = float_bits,
          .float_codes = float_codes,
          .float_ramp = ramp<float>,
          .rows = &kRows};
}

}  // namespace
}  // namespace lowbit
