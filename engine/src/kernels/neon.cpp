// NEON, which every aarch64 has: xor and a byte-wise count by vcnt on 2 channels at a time, one activation word
// broadcast to both.
#include <arm_neon.h>

#include "kernels/by_count.h"
#include "kernels/kernels.h"

namespace lowbit {
namespace {

constexpr size_t kRegisterFloats = 4;

constexpr int kPairs = kTileChannels / 2;
constexpr size_t kMostWords = 31;  // their counts, 8 to a byte at most, fit a byte

// How many bits of one pixel and each channel differ; two channels to a vector.
struct Counts {
  uint64x2_t pairs[kPairs];

  Counts(const BinaryTile& tile, int p) {
#pragma GCC unroll 8
    for (uint64x2_t& pair : pairs) pair = vdupq_n_u64(0);
    const uint64_t* x = tile.pixels + p;
    const uint64_t* w = tile.weights;
    for (size_t left = tile.depth; left > 0;) {
      uint8x16_t bytes[kPairs];
#pragma GCC unroll 8
      for (uint8x16_t& pair : bytes) pair = vdupq_n_u8(0);
      const size_t words = left < kMostWords ? left : kMostWords;
      for (size_t k = 0; k < words; ++k, x += tile.count, w += kTileChannels) {
        const uint64x2_t word = vdupq_n_u64(*x);
#pragma GCC unroll 8
        for (int i = 0; i < kPairs; ++i)
          bytes[i] = vaddq_u8(bytes[i], vcntq_u8(vreinterpretq_u8_u64(veorq_u64(word, vld1q_u64(w + 2 * i)))));
      }
#pragma GCC unroll 8
      for (int i = 0; i < kPairs; ++i) pairs[i] = vpadalq_u32(pairs[i], vpaddlq_u16(vpaddlq_u8(bytes[i])));
      left -= words;
    }
  }

  // As 32 bits, for four channels.
  int32x4_t four(int first) const {
    return vreinterpretq_s32_u32(vmovn_high_u64(vmovn_u64(pairs[first / 2]), pairs[first / 2 + 1]));
  }
};

// Four channels from `first` on.
float32x4_t scaled(float32x4_t sums, const FloatOutput& out, int first) {
  return vaddq_f32(vmulq_f32(sums, vld1q_f32(out.scale + first)), vld1q_f32(out.bias + first));
}

void binary_subtract(const BinaryTile& tile, int shift, int32_t (*sums)[kTileChannels]) {
  for (int p = 0; p < tile.count; ++p) {
    const Counts counts(tile, p);
#pragma GCC unroll 8
    for (int first = 0; first < kTileChannels; first += 4) {
      const int32x4_t shifted = vshlq_s32(counts.four(first), vdupq_n_s32(shift));
      vst1q_s32(sums[p] + first, vsubq_s32(vld1q_s32(sums[p] + first), shifted));
    }
  }
}

void binary_bits(const BinaryTile& tile, const int32_t* const* limits, uint16_t inverted, uint16_t* bits) {
  constexpr uint32_t kBits[] = {1, 2, 4, 8};
  for (int p = 0; p < tile.count; ++p) {
    const Counts sums(tile, p);
    unsigned below = 0;
#pragma GCC unroll 4
    for (int first = 0; first < kTileChannels; first += 4) {
      const uint32x4_t passed = vcleq_s32(sums.four(first), vld1q_s32(limits[p] + first));
      below |= vaddvq_u32(vandq_u32(passed, vld1q_u32(kBits))) << first;
    }
    bits[p] = static_cast<uint16_t>(below ^ inverted);
  }
}

void binary_floats(const BinaryTile& tile, const int32_t* const* bases, const FloatOutput& out) {
  for (int c = 0; c < tile.panels * kTileChannels; c += kTileChannels)
    for (int p = 0; p < tile.count; ++p) {
      const Counts sums({tile.pixels, tile.weights + c * tile.depth, tile.depth, tile.count}, p);
#pragma GCC unroll 4
      for (int first = 0; first < kTileChannels; first += 4) {
        const int32x4_t dots = vsubq_s32(vld1q_s32(bases[p] + c + first), vshlq_n_s32(sums.four(first), 1));
        const ptrdiff_t at = p * out.stride + c + first;
        float32x4_t y = scaled(vcvtq_f32_s32(dots), out, c + first);
        if (out.added != nullptr) y = vaddq_f32(y, vld1q_f32(out.added + at));
        vst1q_f32(out.output + at, y);
      }
    }
}

template <int P>
struct FloatSums {
  float32x4_t of[P][4];

  FloatSums(const FloatTile& tile, int first) {
#pragma GCC unroll 4
    for (auto& of_pixel : of)
      for (float32x4_t& four : of_pixel) four = vdupq_n_f32(0);
    const float* w = tile.weights;
    for (size_t k = 0; k < tile.depth; ++k, w += kTileChannels) {
      const float* x = tile.at(k) + first;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const float32x4_t weights = vld1q_f32(w + 4 * i);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) of[p][i] = vfmaq_f32(of[p][i], vdupq_n_f32(x[p]), weights);
      }
    }
  }
};

template <int P>
void multiply(const FloatTile& tile, int first, const FloatOutput& out) {
  const FloatSums<P> sums(tile, first);
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
    for (int i = 0; i < 4; ++i)
      vst1q_f32(out.output + (first + p) * out.stride + 4 * i, scaled(sums.of[p][i], out, 4 * i));
}

void float_tile(const FloatTile& tile, const FloatOutput& out){LOWBIT_BY_FOURS(multiply, tile.count, tile, first, out)}

// Four bits: which of four values pass.
uint32_t passed(float32x4_t values, const float* thresholds, const uint32_t* flips) {
  const uint32_t places[4] = {1, 2, 4, 8};
  const uint32x4_t flipped = veorq_u32(vreinterpretq_u32_f32(values), vld1q_u32(flips));
  const uint32x4_t passes = vcgeq_f32(vreinterpretq_f32_u32(flipped), vld1q_f32(thresholds));
  return vaddvq_u32(vandq_u32(passes, vld1q_u32(places)));
}

template <int P>
void multiply_to_bits(const FloatTile& tile, int first, const FloatOutput& out, const FloatLimits& limits,
                      uint32_t* bits) {
  const FloatSums<P> sums(tile, first);
  for (int p = 0; p < P; ++p) {
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i)
      word |= passed(scaled(sums.of[p][i], out, 4 * i), limits.thresholds + 4 * i, limits.flips + 4 * i) << 4 * i;
    bits[first + p] = word;
  }
}

void float_tile_bits(const FloatTile& tile, const FloatOutput& out, const FloatLimits& limits, uint32_t* bits) {
  LOWBIT_BY_FOURS(multiply_to_bits, tile.count, tile, first, out, limits, bits)
}

template <int P>
void multiply_integers(const IntegerTile& tile, int first, int32_t (*result)[kTileChannels]) {
  int32x4_t sums[P][4];
#pragma GCC unroll 4
  for (auto& of_pixel : sums)
    for (int32x4_t& four : of_pixel) four = vdupq_n_s32(0);
  const int16_t* x = tile.pixels + first;
  const int16_t* w = tile.weights;
  for (size_t k = 0; k < tile.depth; ++k, x += tile.count, w += kTileChannels) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int16x4_t weights = vld1_s16(w + 4 * i);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sums[p][i] = vmlal_s16(sums[p][i], vdup_n_s16(x[p]), weights);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
    for (int i = 0; i < 4; ++i) vst1q_s32(result[first + p] + 4 * i, sums[p][i]);
}

void integer_sums(const IntegerTile& tile,
                  int32_t (*sums)[kTileChannels]){LOWBIT_BY_FOURS(multiply_integers, tile.count, tile, first, sums)}

uint64_t passed_word(const float* x, const FloatLimits& limits, size_t count) {
  uint64_t word = 0;
  size_t c = 0;
  for (; c + 4 <= count; c += 4)
    word |= static_cast<uint64_t>(passed(vld1q_f32(x + c), limits.thresholds + c, limits.flips + c)) << c;
  for (; c < count; ++c) {
    const float flipped = limits.flips[c] != 0 ? -x[c] : x[c];
    word |= static_cast<uint64_t>(flipped >= limits.thresholds[c]) << c;
  }
  return word;
}

void float_codes(const float* x, const float* thresholds, size_t pitch, const uint32_t* flips, size_t channels,
                 int levels, uint8_t* codes) {
  size_t c = 0;
  for (; c + 4 <= channels; c += 4) {
    const float32x4_t flipped =
        vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(vld1q_f32(x + c)), vld1q_u32(flips + c)));
    uint32x4_t passed = vdupq_n_u32(0);
    for (int level = 0; level < levels; ++level)
      passed = vsubq_u32(passed, vcgeq_f32(flipped, vld1q_f32(thresholds + level * pitch + c)));
    uint32_t counts[4];
    vst1q_u32(counts, passed);
    for (int i = 0; i < 4; ++i) codes[c + i] = static_cast<uint8_t>(counts[i]);
  }
  for (; c < channels; ++c) {
    const float flipped = flips[c] != 0 ? -x[c] : x[c];
    codes[c] = 0;
    for (int level = 0; level < levels; ++level) codes[c] += flipped >= thresholds[level * pitch + c];
  }
}

}  // namespace
}  // namespace lowbit

#include "kernels/float_bits.h"
#include "kernels/ramp.h"
#include "kernels/rows.h"
#include "kernels/table.h"

constinit const lowbit::Kernels lowbit::kNeonKernels = lowbit::table("neon");
