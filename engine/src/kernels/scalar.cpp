// The reference: plain C++, every entry, any machine.
#include <bit>

#include "kernels/kernels.h"

namespace lowbit {
namespace {

constexpr size_t kRegisterFloats = 4;

int32_t count(const BinaryTile& tile, int pixel, int channel) {
  const uint64_t* weights = tile.weights + channel / kTileChannels * tile.depth * kTileChannels;
  int32_t differing = 0;
  for (size_t k = 0; k < tile.depth; ++k) {
    const uint64_t weight = weights[k * kTileChannels + channel % kTileChannels];
    differing += std::popcount(tile.pixels[k * tile.count + pixel] ^ weight);
  }
  return differing;
}

void binary_subtract(const BinaryTile& tile, int shift, int32_t (*sums)[kTileChannels]) {
  for (int p = 0; p < tile.count; ++p)
    for (int c = 0; c < kTileChannels; ++c)
      sums[p][c] =
          static_cast<int32_t>(static_cast<uint32_t>(sums[p][c]) - (static_cast<uint32_t>(count(tile, p, c)) << shift));
}

void binary_bits(const BinaryTile& tile, const int32_t* const* limits, uint16_t inverted, uint16_t* bits) {
  for (int p = 0; p < tile.count; ++p) {
    unsigned below = 0;
    for (int c = 0; c < kTileChannels; ++c) below |= static_cast<unsigned>(count(tile, p, c) <= limits[p][c]) << c;
    bits[p] = static_cast<uint16_t>(below ^ inverted);
  }
}

void binary_floats(const BinaryTile& tile, const int32_t* const* bases, const FloatOutput& out) {
  for (int p = 0; p < tile.count; ++p)
    for (int c = 0; c < tile.panels * kTileChannels; ++c) {
      const auto sum = static_cast<float>(bases[p][c] - 2 * count(tile, p, c));
      const float y = sum * out.scale[c] + out.bias[c];
      out.output[p * out.stride + c] = out.added == nullptr ? y : y + out.added[p * out.stride + c];
    }
}

void float_tile(const FloatTile& tile, const FloatOutput& out) {
  for (int p = 0; p < tile.count; ++p) {
    float sums[kTileChannels] = {};
    for (size_t k = 0; k < tile.depth; ++k) {
      const float x = tile.at(k)[p];
      for (int c = 0; c < kTileChannels; ++c) sums[c] += x * tile.weights[k * kTileChannels + c];
    }
    for (int c = 0; c < kTileChannels; ++c) out.output[p * out.stride + c] = sums[c] * out.scale[c] + out.bias[c];
  }
}

bool passes(float x, const float* thresholds, const uint32_t* flips, size_t channel) {
  return (flips[channel] != 0 ? -x : x) >= thresholds[channel];
}

void float_tile_bits(const FloatTile& tile, const FloatOutput& out, const FloatLimits& limits, uint32_t* bits) {
  float values[kTilePixels][kTileChannels];
  float_tile(tile, {out.scale, out.bias, values[0], kTileChannels});
  for (int p = 0; p < tile.count; ++p) {
    unsigned passed = 0;
    for (int c = 0; c < kTileChannels; ++c)
      passed |= static_cast<unsigned>(passes(values[p][c], limits.thresholds, limits.flips, c)) << c;
    bits[p] = passed;
  }
}

void integer_sums(const IntegerTile& tile, int32_t (*sums)[kTileChannels]) {
  for (int p = 0; p < tile.count; ++p) {
    int32_t of_pixel[kTileChannels] = {};
    for (size_t k = 0; k < tile.depth; ++k) {
      const int32_t x = tile.pixels[k * tile.count + p];
      for (int c = 0; c < kTileChannels; ++c) of_pixel[c] += x * tile.weights[k * kTileChannels + c];
    }
    for (int c = 0; c < kTileChannels; ++c) sums[p][c] = of_pixel[c];
  }
}

uint64_t passed_word(const float* x, const FloatLimits& limits, size_t count) {
  uint64_t word = 0;
  for (size_t c = 0; c < count; ++c)
    word |= static_cast<uint64_t>(passes(x[c], limits.thresholds, limits.flips, c)) << c;
  return word;
}

void float_codes(const float* x, const float* thresholds, size_t pitch, const uint32_t* flips, size_t channels,
                 int levels, uint8_t* codes) {
  for (size_t c = 0; c < channels; ++c) {
    codes[c] = 0;
    for (int level = 0; level < levels; ++level) codes[c] += passes(x[c], thresholds + level * pitch, flips, c);
  }
}

}  // namespace
}  // namespace lowbit

#include "kernels/float_bits.h"
#include "kernels/ramp.h"
#include "kernels/rows.h"
#include "kernels/table.h"

constinit const lowbit::Kernels lowbit::kScalarKernels = lowbit::table("scalar");
