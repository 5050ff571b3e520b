// Products of bytes of AVX2 and AVX-512 without VNNI. Where their pairs do not fit 16 bits, of each four codes the
// first and third, then the second and fourth, become 16 bits wide. Pixels are split once for all panels and weights
// once for all pixels, so many fours at a time as stay in the L1 cache. Included inside the target region, by a file
// that has defined for its Vector:
//   load(pointer), store(pointer, a), all_lanes(number of 32 bits);
//   add_products(sums, a, b), which adds products of 16 bits, two to each sum of 32 bits;
//   multiply_bytes<P>, for products whose pairs fit 16 bits, called below.
#pragma once

namespace lowbit {
namespace {

constexpr size_t kSplitFours = 64;
constexpr int kParts = 4 * kTileChannels / sizeof(Vector);  // vectors of the channels' sums

struct SplitPixel {
  int32_t even[kSplitFours], odd[kSplitFours];
};

struct SplitFour {
  Vector even[kParts], odd[kParts];
};

// Adds the products of some fours to the sums of P pixels, or writes them if they are the first.
template <int P>
void multiply_split(const SplitPixel* pixels, const SplitFour* weights, size_t fours, bool is_first,
                    int32_t (*sums)[kTileChannels]) {
  constexpr int kLanes = kTileChannels / kParts;
  Vector of[P][kParts];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) of[p][part] = is_first ? Vector{} : load(sums[p] + part * kLanes);
  for (size_t k = 0; k < fours; ++k) {
    const SplitFour four = weights[k];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const Vector even = all_lanes(pixels[p].even[k]), odd = all_lanes(pixels[p].odd[k]);
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part)
        of[p][part] = add_products(add_products(of[p][part], even, four.even[part]), odd, four.odd[part]);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) store(sums[p] + part * kLanes, of[p][part]);
}

void multiply_wide(const uint8_t* pixels, const int8_t* weights, size_t depth, int count, int panels, BlockSums* sums) {
  using Shorts = int16_t __attribute__((vector_size(sizeof(Vector))));
  constexpr uint32_t kAlternate = 0x00ff00ff;
  SplitPixel split[kBlockPixels];
  SplitFour of_panel[kSplitFours];
  for (size_t start = 0; start < depth; start += 4 * kSplitFours) {
    const size_t left = (depth - start) / 4, fours = left < kSplitFours ? left : kSplitFours;
    for (int p = 0; p < count; ++p)
      for (size_t k = 0; k < fours; ++k) {
        uint32_t four;
        __builtin_memcpy(&four, pixels + p * depth + start + 4 * k, 4);
        split[p].even[k] = static_cast<int32_t>(four & kAlternate);
        split[p].odd[k] = static_cast<int32_t>(four >> 8 & kAlternate);
      }
    for (int panel = 0; panel < panels; ++panel) {
      const int8_t* rows = weights + (panel * depth + start) * kTileChannels;
      for (size_t k = 0; k < fours; ++k)
        for (int part = 0; part < kParts; ++part, rows += sizeof(Vector)) {
          const auto row = (Shorts)load(rows);
          of_panel[k].even[part] = (Vector)(row << 8 >> 8);
          of_panel[k].odd[part] = (Vector)(row >> 8);
        }
      LOWBIT_BY_FOURS(multiply_split, count, split + first, of_panel, fours, start == 0, sums[panel] + first)
    }
  }
}

// As ByteKernels::sums.
void byte_sums(const uint8_t* pixels, const int8_t* weights, size_t depth, int count, int panels, int64_t pair,
               BlockSums* sums) {
  const auto steps = static_cast<size_t>(INT16_MAX / (pair > 0 ? pair : 1));
  if (steps == 0) {
    multiply_wide(pixels, weights, depth, count, panels, sums);
    return;
  }
  for (int panel = 0; panel < panels; ++panel, weights += depth * kTileChannels)
    LOWBIT_BY_EIGHTS(multiply_bytes, count, pixels + first * depth, weights, depth, steps, sums[panel] + first)
}

}  // namespace
}  // namespace lowbit
