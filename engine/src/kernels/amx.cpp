// AMX: 16 x 64 bytes times 64 x 16 bytes in one instruction, added to 16 x 16 sums. Bits stay packed in memory and
// become bytes on their way into a tile: a pixel's set bit is -1 and others 0 (one masked move makes a row of 64), a
// weight is 1 where its bit is set and -1 where not. The sum of products is then the pixel's ones where the weight has
// none, less those where it has one: a tile that starts at the weight's ones ends as the number of bits that differ.
#include "kernels/amx_tiles.h"
#include "kernels/kernels.h"
#include "kernels/target.h"

LOWBIT_TARGET_OPEN("avx512f,avx512dq,avx512bw,avx512vl,amx-tile,amx-int8")

namespace lowbit {
namespace {

constexpr size_t kTileBytes = 1024;
constexpr size_t kSlice = 1024;  // of 32 pixels: 32 KB
constexpr size_t kRing = 4;      // pairs of weight tiles that are kept: they never leave the L1 cache
constexpr size_t kAhead = 3;  // how far expanding runs ahead of multiplying, so that a tile is not read while written

// Row r of a weight tile holds bits 4r to 4r+3 of each of the 16 channels: one mask of 64 bits makes the row.
void arrange_weights(const uint64_t* words, uint64_t* masks) {
  for (int panel = 0; panel < 2; ++panel, words += kTileChannels)
    for (int row = 0; row < kTileChannels; ++row) {
      uint64_t mask = 0;
      for (int c = 0; c < kTileChannels; ++c) mask |= (words[c] >> 4 * row & 15) << 4 * c;
      *masks++ = mask;
    }
}

size_t pixel_bytes(size_t depth) { return 2 * depth * kTileBytes; }

void arrange_pixels(const uint64_t* plane, const int64_t* taps, size_t depth, const int64_t* pixels, int count,
                    std::byte* arranged) {
  const __m512i set = _mm512_set1_epi8(-1);
  for (int first = 0; first < count; first += 16) {
    for (size_t k = 0; k < depth; ++k, arranged += kTileBytes) {
      const uint64_t* words = plane + taps[k];
      if (count - first >= 16) {
#pragma GCC unroll 16
        for (int p = 0; p < 16; ++p)
          _mm512_store_si512(arranged + p * 64, _mm512_maskz_mov_epi8(words[pixels[first + p]], set));
      } else {
        for (int p = 0; p < count - first; ++p)
          _mm512_store_si512(arranged + p * 64, _mm512_maskz_mov_epi8(words[pixels[first + p]], set));
      }
    }
  }
}

// A pair of weight tiles.
void expand(const uint64_t* masks, std::byte* tiles) {
  const __m512i plus = _mm512_set1_epi8(1), minus = _mm512_set1_epi8(-1);
#pragma GCC unroll 32
  for (int row = 0; row < 32; ++row)
    _mm512_store_si512(tiles + row * 64, _mm512_mask_blend_epi8(masks[row], minus, plus));
}

// Where a block's pixels lie: bytes from one to the next, and from 64 of their depth to the next 64.
struct PixelRows {
  const void* start;
  size_t row, step, second;  // second: where pixel 16 starts
};

// All panels for 16 pixels or, where Both, 32. Codes are products of unsigned bytes, and start from 0.
template <bool Codes, bool Both>
void multiply(const PixelRows& rows, const uint64_t* masks, const int32_t* ones, size_t depth, int panels,
              BlockCounts* counts) {
  alignas(64) std::byte ring[kRing * 2 * kTileBytes];
  const auto* pixels = static_cast<const std::byte*>(rows.start);
  const size_t pairs = depth * static_cast<size_t>(panels / 2);
  size_t expanded = 0;
  const auto expand_next = [&]() __attribute__((always_inline)) {
    if (expanded == pairs) return;
    expand(masks + expanded * 32, ring + expanded % kRing * 2 * kTileBytes);
    ++expanded;
  };
  for (size_t i = 0; i < kAhead; ++i) expand_next();
  size_t pair = 0;
  for (int panel = 0; panel < panels; panel += 2) {
    if constexpr (Codes) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      const int32_t* start = ones + panel * kTileChannels;
      _tile_loadd(0, start, 0);  // a stride of 0: every row is the same
      _tile_loadd(1, start + kTileChannels, 0);
      _tile_loadd(2, start, 0);
      _tile_loadd(3, start + kTileChannels, 0);
    }
    for (size_t k = 0; k < depth; ++k, ++pair) {
      const std::byte* weights = ring + pair % kRing * 2 * kTileBytes;
      _tile_loadd(4, pixels + k * rows.step, rows.row);
      _tile_loadd(6, weights, 64);
      if constexpr (Codes)
        _tile_dpbusd(0, 4, 6);
      else
        _tile_dpbssd(0, 4, 6);
      _tile_loadd(7, weights + kTileBytes, 64);
      if constexpr (Codes)
        _tile_dpbusd(1, 4, 7);
      else
        _tile_dpbssd(1, 4, 7);
      if constexpr (Both) {
        _tile_loadd(5, pixels + rows.second + k * rows.step, rows.row);
        if constexpr (Codes) {
          _tile_dpbusd(2, 5, 6);
          _tile_dpbusd(3, 5, 7);
        } else {
          _tile_dpbssd(2, 5, 6);
          _tile_dpbssd(3, 5, 7);
        }
      }
      expand_next();
    }
    _tile_stored(0, counts[panel], 64);
    _tile_stored(1, counts[panel + 1], 64);
    if constexpr (Both) {
      _tile_stored(2, counts[panel] + 16, 64);
      _tile_stored(3, counts[panel + 1] + 16, 64);
    }
  }
}

template <bool Codes>
void multiply_by_bits(const PixelRows& rows, const uint64_t* masks, const int32_t* ones, size_t depth, int count,
                      int panels, BlockCounts* counts) {
  _tile_loadconfig(&kTiles);
  if (count > 16)
    multiply<Codes, true>(rows, masks, ones, depth, panels, counts);
  else
    multiply<Codes, false>(rows, masks, ones, depth, panels, counts);
  _tile_release();
}

void count(const std::byte* arranged, const uint64_t* masks, const int32_t* ones, size_t depth, int count, int panels,
           BlockCounts* counts) {
  multiply_by_bits<false>({arranged, 64, kTileBytes, depth * kTileBytes}, masks, ones, depth, count, panels, counts);
}

void sign_sums(const uint8_t* pixels, const uint64_t* masks, size_t depth, int count, int panels, BlockSums* sums) {
  multiply_by_bits<true>({pixels, depth, 64, 16 * depth}, masks, nullptr, depth / 64, count, panels, sums);
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
  _tile_loadconfig(&kTiles);
  if (count > 16)
    multiply_bytes<true>(pixels, weights, depth, panels, sums);
  else
    multiply_bytes<false>(pixels, weights, depth, panels, sums);
  _tile_release();
}

void bits(const int32_t (*counts)[kTileChannels], int panels, const int32_t* limits, const uint64_t* falling,
          uint64_t* words) {
  for (int panel = 0; panel < panels; panel += 4) {
    uint64_t word = 0;
    for (int i = 0; i < 4 && panel + i < panels; ++i) {
      const int number = panel + i;
      const __m512i row = _mm512_load_si512(counts[number * kBlockPixels]);
      word |= uint64_t{_mm512_cmple_epi32_mask(row, _mm512_loadu_si512(limits + number * kTileChannels))} << 16 * i;
    }
    words[panel / 4] = word ^ falling[panel / 4];
  }
}

void floats(const int32_t (*counts)[kTileChannels], int count, const int32_t* const* bases, const FloatOutput& out) {
  const __m512 scale = _mm512_loadu_ps(out.scale), bias = _mm512_loadu_ps(out.bias);
  for (int p = 0; p < count; ++p) {
    const __m512i row = _mm512_loadu_si512(counts[p]);
    const __m512i dots = _mm512_sub_epi32(_mm512_loadu_si512(bases[p]), _mm512_add_epi32(row, row));
    __m512 y = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dots), scale), bias);
    if (out.added != nullptr) y = _mm512_add_ps(y, _mm512_loadu_ps(out.added + p * out.stride));
    _mm512_storeu_ps(out.output + p * out.stride, y);
  }
}

constexpr BlockKernels kBlocks{1, arrange_weights, pixel_bytes, arrange_pixels, count, bits, floats};

}  // namespace
}  // namespace lowbit

LOWBIT_TARGET_CLOSE

// Called on any CPU, so for none of its own.
lowbit::Kernels lowbit::amx_kernels() {
  Kernels kernels = kAvx512VpopcntdqKernels;
  kernels.isa = "amx";
  kernels.blocks = &kBlocks;
  static const ByteKernels bytes = [](ByteKernels table) {
    table.depth_multiple = 64;
    table.planes = 0;
    table.sums = byte_sums;
    table.sign_sums = sign_sums;
    return table;
  }(*kernels.bytes);
  kernels.bytes = &bytes;
  return kernels;
}
