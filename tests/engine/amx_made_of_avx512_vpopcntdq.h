// AMX's instructions for CPUs that have AVX-512 alone: included before all else, they take their place.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "kernels/target.h"

LOWBIT_TARGET_OPEN("avx512f,avx512vnni")

namespace made {

// Grants what is asked for tiles.
template <class... Arguments>
long system_call(long number, Arguments... arguments) {
  return number == SYS_arch_prctl ? 0 : syscall(number, arguments...);
}

struct Tiles {
  bool configured = false;
  alignas(64) uint8_t rows[8][16][64];

  // A tile that is not configured is an invalid instruction.
  uint8_t (&operator[](int tile))[16][64] {
    if (!configured) std::abort();
    return rows[tile];
  }
};

inline thread_local Tiles tiles;

inline void load_config(const void* config) {
  uint8_t whole[64] = {1};
  for (int tile = 0; tile < 8; ++tile) whole[16 + 2 * tile] = 64, whole[48 + tile] = 16;
  if (std::memcmp(config, whole, 64) != 0) std::abort();
  tiles.configured = true;
  std::memset(tiles.rows, 0, sizeof(tiles.rows));
}

inline void release_tiles() { tiles.configured = false; }

inline void zero_tile(int tile) { std::memset(tiles[tile], 0, 1024); }

inline void load_tile(int tile, const void* base, int64_t stride) {
  for (int row = 0; row < 16; ++row)
    std::memcpy(tiles[tile][row], static_cast<const uint8_t*>(base) + row * stride, 64);
}

inline void store_tile(int tile, void* base, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<uint8_t*>(base) + row * stride, tiles[tile][row], 64);
}

// Row m, lane n: sums[m][n] += the products of four unsigned bytes of a[m] with four signed ones of b[k], for all k.
inline void multiply_tiles(int sums, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    __m512i row = _mm512_load_si512(tiles[sums][m]);
    for (int k = 0; k < 16; ++k) {
      int32_t four;
      std::memcpy(&four, tiles[a][m] + 4 * k, 4);
      row = _mm512_dpbusd_epi32(row, _mm512_set1_epi32(four), _mm512_load_si512(tiles[b][k]));
    }
    _mm512_store_si512(tiles[sums][m], row);
  }
}

}  // namespace made

LOWBIT_TARGET_CLOSE

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#define _tile_loadconfig made::load_config
#define _tile_release made::release_tiles
#define _tile_zero made::zero_tile
#define _tile_loadd made::load_tile
#define _tile_stored made::store_tile
#define _tile_dpbusd made::multiply_tiles
#define syscall made::system_call
#define __builtin_cpu_supports(feature) (__builtin_cpu_supports(feature) || std::strcmp(feature, "amx-int8") == 0)
