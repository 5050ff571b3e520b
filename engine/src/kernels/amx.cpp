// AMX: 16 x 64 bytes times 64 x 16 bytes in one instruction, added to 16 x 16 sums. Weights of one bit stay packed in
// memory and become bytes, 1 and -1, on their way into a tile: one instruction makes a row of 64.
#include <utility>

#include "kernels/amx_tiles.h"
#include "kernels/kernels.h"
#include "kernels/target.h"

LOWBIT_TARGET_OPEN("avx512f,avx512dq,avx512bw,avx512vl,gfni,amx-tile,amx-int8")

namespace lowbit {
namespace {

constexpr size_t kTileBytes = 1024;
constexpr size_t kSlice = 1024;  // of 32 pixels: 32 KB

void begin() { _tile_loadconfig(&kTiles); }
void end() { _tile_release(); }

void spread(const uint64_t* words, size_t count, uint8_t* bytes) {
  const __m512i one = _mm512_set1_epi8(1);
  for (size_t i = 0; i < count; ++i) _mm512_store_si512(bytes + i * 64, _mm512_maskz_mov_epi8(words[i], one));
}

// A row takes the bit of its number from each byte: bits 7 to 1 of its own byte become the opposite, bit 0 becomes 1.
template <size_t... Row>
void expand(const uint8_t* packed, std::byte* tile, std::index_sequence<Row...>) {
  constexpr uint64_t kTakeBit = 0x0001010101010101;  // a byte for each bit that is made: the mask of what it is made of
  for (int half = 0; half < 2; ++half) {
    const __m512i bits = _mm512_load_si512(packed + half * 64);
    (_mm512_store_si512(tile + (half * 8 + Row) * 64,
                        _mm512_gf2p8affine_epi64_epi8(bits, _mm512_set1_epi64(kTakeBit << Row), 0xff)),
     ...);
  }
  asm volatile("" ::: "memory");  // gcc does not know that tiles are loaded from memory
}

// Panels first to end - 1 for Tiles times 16 pixels: 5, 4 or 3 times 1 panel at a time, 2 times 2 or 1 times 4, or
// times 1 where that leaves some. So about four sums are on their way at once: each waits for the one before it.
template <int Tiles, int Panels>
void multiply_panels(const MatrixProduct& product, int first, int end, BlockSums* sums) {
  constexpr size_t kRing = Tiles == 1 ? 8 : 4;  // weight tiles that are kept: they never leave the L1 cache
  constexpr size_t kAhead = kRing - 1;  // how far expanding runs ahead, so that a tile is not read while written
  alignas(64) std::byte ring[kRing * kTileBytes];
  const int64_t step = product.step;
  const size_t depth = product.depth, all = depth * static_cast<size_t>(end - first);
  const auto pitch = static_cast<ptrdiff_t>(depth * kMatrixWeights);  // from a panel to the next
  const uint8_t* packed = product.weights + first * pitch;
  size_t expanded = 0, used = 0, expanded_depth = 0;
  const auto expand_next = [&]() __attribute__((always_inline)) {
    if (expanded == all) return;
    expand(packed, ring + expanded % kRing * kTileBytes, std::make_index_sequence<8>());
    packed += pitch;
    if (++expanded % Panels != 0) return;
    packed += kMatrixWeights - Panels * pitch;
    if (++expanded_depth < depth) return;
    expanded_depth = 0;
    packed += (Panels - 1) * pitch;
  };
  const auto next_weights = [&]() __attribute__((always_inline)) { return ring + used++ % kRing * kTileBytes; };
  for (size_t i = 0; i < kAhead; ++i) expand_next();
  for (int panel = first; panel < end; panel += Panels) {
    const int32_t* start = product.starts + panel * kTileChannels;
    BlockSums *low = sums + panel, *high = low + product.panels;
    _tile_loadd(0, start, 0);  // a stride of 0: every row is the same
    if constexpr (Panels == 4) {
      _tile_loadd(1, start + kTileChannels, 0);
      _tile_loadd(2, start + 2 * kTileChannels, 0);
      _tile_loadd(3, start + 3 * kTileChannels, 0);
    } else if constexpr (Panels == 2) {
      _tile_loadd(1, start, 0);
      _tile_loadd(2, start + kTileChannels, 0);
      _tile_loadd(3, start + kTileChannels, 0);
    } else {
      if constexpr (Tiles > 1) _tile_loadd(1, start, 0);
      if constexpr (Tiles > 2) _tile_loadd(2, start, 0);
      if constexpr (Tiles > 3) _tile_loadd(3, start, 0);
      if constexpr (Tiles > 4) _tile_loadd(4, start, 0);
    }
    for (size_t k = 0; k < depth; ++k) {
      const uint8_t* pixels = product.pixels + product.taps[k];
      if constexpr (Panels == 4) {
        _tile_loadd(7, pixels, step);
        _tile_loadd(5, next_weights(), 64);
        _tile_dpbusd(0, 7, 5);
        expand_next();
        _tile_loadd(6, next_weights(), 64);
        _tile_dpbusd(1, 7, 6);
        expand_next();
        _tile_loadd(5, next_weights(), 64);
        _tile_dpbusd(2, 7, 5);
        expand_next();
        _tile_loadd(6, next_weights(), 64);
        _tile_dpbusd(3, 7, 6);
      } else if constexpr (Panels == 2) {
        _tile_loadd(6, pixels, step);
        _tile_loadd(5, next_weights(), 64);
        _tile_dpbusd(0, 6, 5);
        _tile_loadd(7, pixels + 16 * step, step);
        _tile_dpbusd(1, 7, 5);
        expand_next();
        _tile_loadd(5, next_weights(), 64);
        _tile_dpbusd(2, 6, 5);
        _tile_dpbusd(3, 7, 5);
      } else {
        _tile_loadd(6, pixels, step);
        _tile_loadd(5, next_weights(), 64);
        _tile_dpbusd(0, 6, 5);
        if constexpr (Tiles > 1) {
          _tile_loadd(7, pixels + 16 * step, step);
          _tile_dpbusd(1, 7, 5);
        }
        if constexpr (Tiles > 2) {
          _tile_loadd(6, pixels + 32 * step, step);
          _tile_dpbusd(2, 6, 5);
        }
        if constexpr (Tiles > 3) {
          _tile_loadd(7, pixels + 48 * step, step);
          _tile_dpbusd(3, 7, 5);
        }
        if constexpr (Tiles > 4) {
          _tile_loadd(6, pixels + 64 * step, step);
          _tile_dpbusd(4, 6, 5);
        }
      }
      expand_next();
    }
    _tile_stored(0, low[0], 64);
    if constexpr (Panels == 4) {
      _tile_stored(1, low[1], 64);
      _tile_stored(2, low[2], 64);
      _tile_stored(3, low[3], 64);
    } else {
      if constexpr (Tiles > 1) _tile_stored(1, low[0] + 16, 64);
      if constexpr (Panels == 2) {
        _tile_stored(2, low[1], 64);
        _tile_stored(3, low[1] + 16, 64);
      }
      if constexpr (Tiles > 2) _tile_stored(2, high[0], 64);
      if constexpr (Tiles > 3) _tile_stored(3, high[0] + 16, 64);
      if constexpr (Tiles > 4) _tile_stored(4, high[product.panels], 64);
    }
  }
}

template <int Tiles, int Panels>
void multiply_tiles(const MatrixProduct& product, BlockSums* sums) {
  const int grouped = product.panels / Panels * Panels;
  if (grouped > 0) multiply_panels<Tiles, Panels>(product, 0, grouped, sums);
  if (grouped < product.panels) multiply_panels<Tiles, 1>(product, grouped, product.panels, sums);
}

void multiply(const MatrixProduct& product, BlockSums* sums) {
  switch ((product.count + kMatrixTile - 1) / kMatrixTile) {
    case 1:
      return multiply_tiles<1, 4>(product, sums);
    case 2:
      return multiply_tiles<2, 2>(product, sums);
    case 3:
      return multiply_tiles<3, 1>(product, sums);
    case 4:
      return multiply_tiles<4, 1>(product, sums);
    default:
      return multiply_tiles<5, 1>(product, sums);
  }
}

// Weights that are bytes in memory. A slice of the depth at a time, so that its pixels stay in the L1 cache.
template <bool Both>
void multiply_bytes(const uint8_t* pixels, const int8_t* weights, size_t depth, int panels, BlockSums* sums) {
  for (size_t first = 0; first < depth; first += kSlice) {
    const size_t end = depth - first > kSlice ? first + kSlice : depth;
    for (int panel = 0; panel < panels; panel += 2) {
      const int8_t *left = weights + panel * depth * kTileChannels, *right = left + depth * kTileChannels;
      if (first == 0) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      } else {
        _tile_loadd(0, sums[panel], 64);
        _tile_loadd(1, sums[panel + 1], 64);
        if constexpr (Both) {
          _tile_loadd(2, sums[panel] + 16, 64);
          _tile_loadd(3, sums[panel + 1] + 16, 64);
        }
      }
      for (size_t k = first; k < end; k += 64) {
        _tile_loadd(4, pixels + k, depth);
        _tile_loadd(6, left + k * kTileChannels, 64);
        _tile_dpbusd(0, 4, 6);
        _tile_loadd(7, right + k * kTileChannels, 64);
        _tile_dpbusd(1, 4, 7);
        if constexpr (Both) {
          _tile_loadd(5, pixels + 16 * depth + k, depth);
          _tile_dpbusd(2, 5, 6);
          _tile_dpbusd(3, 5, 7);
        }
      }
      _tile_stored(0, sums[panel], 64);
      _tile_stored(1, sums[panel + 1], 64);
      if constexpr (Both) {
        _tile_stored(2, sums[panel] + 16, 64);
        _tile_stored(3, sums[panel + 1] + 16, 64);
      }
    }
  }
}

void byte_sums(const uint8_t* pixels, const int8_t* weights, size_t depth, int count, int panels, int64_t,
               BlockSums* sums) {
  if (count > 16)
    multiply_bytes<true>(pixels, weights, depth, panels, sums);
  else
    multiply_bytes<false>(pixels, weights, depth, panels, sums);
}

}  // namespace
}  // namespace lowbit

#include "kernels/count_floats.h"

namespace lowbit {
namespace {

constexpr MatrixKernels kMatrices{spread, begin, end, multiply};

}  // namespace
}  // namespace lowbit

LOWBIT_TARGET_CLOSE

// Called on any CPU, so for none of its own.
lowbit::Kernels lowbit::amx_kernels() {
  Kernels kernels = kAvx512VpopcntdqKernels;
  kernels.isa = "amx";
  static const CountKernels counts{kernels.bytes->bits, count_floats};
  kernels.counts = &counts;
  kernels.matrices = &kMatrices;
  static const ByteKernels bytes = [](ByteKernels table) {
    table.depth_multiple = 64;
    table.planes = 0;
    table.sums = byte_sums;
    table.begin = begin;
    table.end = end;
    return table;
  }(*kernels.bytes);
  kernels.bytes = &bytes;
  return kernels;
}
