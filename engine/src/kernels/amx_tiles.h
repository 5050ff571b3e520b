// What AMX's tiles are configured as.
#pragma once

#include <cstdint>

namespace lowbit {

// Eight tiles of 16 rows x 64 bytes. The processor keeps this per thread; others in the process set their own.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// In memory as a whole: gcc 12 takes the instruction to read the first bytes only, and drops what a local one holds.
inline constexpr TileConfig kTiles;

}  // namespace lowbit
