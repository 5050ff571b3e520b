// vpmaddwd multiplies and adds up two rows of an integer tile at once. What both of its users need for that.
#pragma once

#include "kernels/kernels.h"

namespace lowbit {

// Stands for the row after the last where the depth is odd.
inline constexpr int16_t kNoRow[kTileChannels] = {};

// An input and the one of the next row, as the 32 bits to broadcast.
inline int32_t joined(int16_t value, int16_t next) {
  return static_cast<int32_t>(static_cast<uint16_t>(value) | static_cast<uint32_t>(static_cast<uint16_t>(next)) << 16);
}

}  // namespace lowbit
