// What the AVX-512 files share: every entry of the table, from a Counts<P> that the including file has defined. Its
// members low[P] and high[P] are the counts of P pixels for channels 0..7 and 8..15, in 64-bit lanes. Included inside
// the target region, so that each file compiles it for its own instruction set.
#pragma once

#include "kernels/arrange_rows.h"
#include "kernels/ramp.h"

namespace lowbit {
namespace {

constexpr size_t kRegisterFloats = 16;

// As rows.h has them.
__m512 larger(__m512 a, __m512 b) { return _mm512_max_ps(b, a); }
__m512 smaller(__m512 a, __m512 b) { return _mm512_min_ps(b, a); }

__m512 scaled(__m512 sums, const FloatOutput& out) {
  return _mm512_add_ps(_mm512_mul_ps(sums, _mm512_loadu_ps(out.scale)), _mm512_loadu_ps(out.bias));
}

// Writes what 16 sums of pixel p become, of the channels from `c` on.
void store_sums(__m512i sums, __m512 scale, __m512 bias, const FloatOutput& out, int p, int c) {
  const ptrdiff_t at = p * out.stride + c;
  __m512 y = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale), bias);
  if (out.added != nullptr) y = _mm512_add_ps(y, _mm512_loadu_ps(out.added + at));
  _mm512_storeu_ps(out.output + at, y);
}

// The counts of a pixel for all 16 channels, as 32 bits.
template <int P>
__m512i narrow(const Counts<P>& sums, int p) {
  const __m512i halves = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return _mm512_permutex2var_epi32(sums.low[p], halves, sums.high[p]);
}

template <int P>
void subtract_counts(const BinaryTile& tile, int shift, int32_t (*sums)[kTileChannels]) {
  const Counts<P> counts(tile);
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    const __m512i shifted = _mm512_sll_epi32(narrow(counts, p), _mm_cvtsi32_si128(shift));
    _mm512_storeu_si512(sums[p], _mm512_sub_epi32(_mm512_loadu_si512(sums[p]), shifted));
  }
}

template <int P>
void store_bits(const BinaryTile& tile, const int32_t* const* limits, uint16_t inverted, uint16_t* bits) {
  const Counts<P> sums(tile);
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
    bits[p] = static_cast<uint16_t>(_mm512_cmple_epi32_mask(narrow(sums, p), _mm512_loadu_si512(limits[p])) ^ inverted);
}

template <int P>
void store_floats(const BinaryTile& tile, const int32_t* const* bases, const FloatOutput& out) {
  const FloatOutput to = out;  // in registers, as nothing can be written over it
  for (int c = 0; c < tile.panels * kTileChannels; c += kTileChannels) {
    const Counts<P> sums({tile.pixels, tile.weights + c * tile.depth, tile.depth, P});
    const __m512 scale = _mm512_loadu_ps(to.scale + c), bias = _mm512_loadu_ps(to.bias + c);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const __m512i counts = narrow(sums, p);
      const __m512i dots = _mm512_sub_epi32(_mm512_loadu_si512(bases[p] + c), _mm512_add_epi32(counts, counts));
      store_sums(dots, scale, bias, to, p, c);
    }
  }
}

// Of N panels: 16 sums of two keep both multipliers busy while the next inputs are loaded.
template <int P, int N>
struct FloatSums {
  __m512 of[N][P];

  explicit FloatSums(const FloatTile& tile) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) of[n][p] = _mm512_setzero_ps();
    }
    const float* w = tile.weights;
    const size_t next = tile.depth * kTileChannels;
    for (size_t k = 0; k < tile.depth; ++k, w += kTileChannels) {
      const float* x = tile.at(k);
      __m512 weights[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) weights[n] = _mm512_loadu_ps(w + n * next);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const __m512 value = _mm512_set1_ps(x[p]);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) of[n][p] = _mm512_fmadd_ps(value, weights[n], of[n][p]);
      }
    }
  }
};

template <int P>
void store(const __m512* sums, const FloatOutput& out) {
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) _mm512_storeu_ps(out.output + p * out.stride, scaled(sums[p], out));
}

template <int P>
void multiply(const FloatTile& tile, const FloatOutput& out) {
  store<P>(FloatSums<P, 1>(tile).of[0], out);
}

template <int P>
void multiply_two(const FloatTile& tile, const FloatOutput& out) {
  const FloatSums<P, 2> sums(tile);
  store<P>(sums.of[0], out);
  store<P>(sums.of[1], {out.scale + kTileChannels, out.bias + kTileChannels, out.output + kTileChannels, out.stride});
}

__m512 flips_of(const FloatLimits& limits, int panel) {
  return _mm512_castsi512_ps(_mm512_loadu_si512(limits.flips + panel * kTileChannels));
}

unsigned passed(__m512 sums, const FloatOutput& out, const FloatLimits& limits, int panel) {
  return _mm512_cmp_ps_mask(_mm512_xor_ps(scaled(sums, out), flips_of(limits, panel)),
                            _mm512_loadu_ps(limits.thresholds + panel * kTileChannels), _CMP_GE_OQ);
}

template <int P>
void multiply_to_bits(const FloatTile& tile, const FloatOutput& out, const FloatLimits& limits, uint32_t* bits) {
  const FloatSums<P, 1> sums(tile);
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) bits[p] = passed(sums.of[0][p], out, limits, 0);
}

template <int P>
void multiply_two_to_bits(const FloatTile& tile, const FloatOutput& out, const FloatLimits& limits, uint32_t* bits) {
  const FloatSums<P, 2> sums(tile);
  const FloatOutput next{out.scale + kTileChannels, out.bias + kTileChannels, nullptr, 0};
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
    bits[p] = passed(sums.of[0][p], out, limits, 0) | passed(sums.of[1][p], next, limits, 1) << 16;
}

__m512i widened(const int16_t* row) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
}

template <int P>
void multiply_integers(const IntegerTile& tile, int32_t (*result)[kTileChannels]) {
  __m512i sums[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) sums[p] = _mm512_setzero_si512();
  const int16_t* x = tile.pixels;
  const int16_t* w = tile.weights;
  for (size_t k = 0; k < tile.depth; k += 2, x += 2 * P, w += 2 * kTileChannels) {
    const int16_t* next_x = k + 1 < tile.depth ? x + P : kNoRow;
    const __m512i row = widened(w), next_row = widened(k + 1 < tile.depth ? w + kTileChannels : kNoRow);
    const __m512i weights = _mm512_or_si512(row, _mm512_slli_epi32(next_row, 16));
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
      sums[p] = _mm512_add_epi32(sums[p], _mm512_madd_epi16(_mm512_set1_epi32(joined(x[p], next_x[p])), weights));
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) _mm512_storeu_si512(result[p], sums[p]);
}

// Four codes of a pixel for all channels.
__m512i four_codes(const uint8_t* codes) {
  int32_t four;
  __builtin_memcpy(&four, codes, 4);
  return _mm512_set1_epi32(four);
}

__m512i completed(const int32_t* sums, __m512i factor, const int32_t* bases) {
  return _mm512_add_epi32(_mm512_mullo_epi32(_mm512_loadu_si512(sums), factor), _mm512_loadu_si512(bases));
}

void sums_to_codes(const IntegerSums& sums, const IntegerLimits& limits, uint8_t* codes, ptrdiff_t stride) {
  const __m512i flips = _mm512_loadu_si512(limits.flips), one = _mm512_set1_epi32(1);
  const __m512i factor = _mm512_set1_epi32(sums.multiplier);
  for (int p = 0; p < sums.count; ++p) {
    const __m512i flipped = _mm512_xor_si512(completed(sums.sums[p], factor, sums.bases[p]), flips);
    __m512i passed = _mm512_setzero_si512();
    for (int level = 0; level < limits.levels; ++level) {
      const __m512i limit = _mm512_loadu_si512(limits.thresholds + level * kTileChannels);
      passed = _mm512_mask_add_epi32(passed, _mm512_cmpge_epi32_mask(flipped, limit), passed, one);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + p * stride), _mm512_cvtepi32_epi8(passed));
  }
}

void sum_bits(const int32_t (*sums)[kTileChannels], int count, int panels, const SumLimits& of, uint64_t* words,
              ptrdiff_t pitch) {
  for (int panel = 0; panel < panels; panel += 4, sums += 4 * kBlockPixels) {
    const int32_t* limits = of.limits + panel * kTileChannels;
    const uint64_t inverted = of.inverted[panel / 4];
    const int left = panels - panel < 4 ? panels - panel : 4;
    for (int p = 0; p < count; ++p) {
      const int32_t* of_pixel = limits + of.places[p];
      uint64_t word = 0;
      for (int i = 0; i < left; ++i) {
        const __m512i row = _mm512_loadu_si512(sums[i * kBlockPixels + p]);
        word |= uint64_t{_mm512_cmple_epi32_mask(row, _mm512_loadu_si512(of_pixel + i * kTileChannels))} << 16 * i;
      }
      words[p * pitch + panel / 4] = word ^ inverted;
    }
  }
}

void sums_to_floats(const IntegerSums& sums, const FloatOutput& out) {
  const IntegerSums from = sums;  // as above
  const FloatOutput to = out;
  const __m512i factor = _mm512_set1_epi32(from.multiplier);
  for (int c = 0; c < from.panels * kTileChannels; c += kTileChannels) {
    const __m512 scale = _mm512_loadu_ps(to.scale + c), bias = _mm512_loadu_ps(to.bias + c);
    const int32_t (*of)[kTileChannels] = from.sums + c / kTileChannels * kBlockPixels;
    for (int p = 0; p < from.count; ++p) store_sums(completed(of[p], factor, from.bases[p] + c), scale, bias, to, p, c);
  }
}

void binary_subtract(const BinaryTile& tile, int shift, int32_t (*sums)[kTileChannels]) {
  LOWBIT_BY_COUNT(subtract_counts, tile, shift, sums)
}

void binary_bits(const BinaryTile& tile, const int32_t* const* limits, uint16_t inverted, uint16_t* bits) {
  LOWBIT_BY_COUNT(store_bits, tile, limits, inverted, bits)
}

void binary_floats(const BinaryTile& tile, const int32_t* const* bases, const FloatOutput& out) {
  LOWBIT_BY_COUNT(store_floats, tile, bases, out)
}

void float_tile(const FloatTile& tile, const FloatOutput& out) {
  if (tile.panels == 2)
    LOWBIT_BY_COUNT(multiply_two, tile, out)
  else
    LOWBIT_BY_COUNT(multiply, tile, out)
}

void float_tile_bits(const FloatTile& tile, const FloatOutput& out, const FloatLimits& limits, uint32_t* bits) {
  if (tile.panels == 2)
    LOWBIT_BY_COUNT(multiply_two_to_bits, tile, out, limits, bits)
  else
    LOWBIT_BY_COUNT(multiply_to_bits, tile, out, limits, bits)
}

void integer_sums(const IntegerTile& tile, int32_t (*sums)[kTileChannels]) {
  LOWBIT_BY_COUNT(multiply_integers, tile, sums)
}

// A word of each pixel.
void passed_words(const float* x, const FloatLimits& limits, const Rows& rows, uint64_t* words, size_t pitch) {
  __m512 flips[4], thresholds[4];
  __mmask16 lanes[4];
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) {
    const size_t left = rows.channels > 16 * i ? rows.channels - 16 * i : 0;
    lanes[i] = static_cast<__mmask16>(left < 16 ? (1u << left) - 1 : 0xffffu);
    flips[i] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(lanes[i], limits.flips + 16 * i));
    thresholds[i] = _mm512_maskz_loadu_ps(lanes[i], limits.thresholds + 16 * i);
  }
  for (size_t p = 0; p < rows.pixels; ++p, x += rows.stride, words += pitch) {
    __mmask16 passed[4];
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i)
      passed[i] = _mm512_mask_cmp_ps_mask(
          lanes[i], _mm512_xor_ps(_mm512_maskz_loadu_ps(lanes[i], x + 16 * i), flips[i]), thresholds[i], _CMP_GE_OQ);
    *words = _mm512_kunpackd(_mm512_kunpackw(passed[3], passed[2]), _mm512_kunpackw(passed[1], passed[0]));
  }
}

void float_bits(const float* x, const FloatLimits& limits, const Rows& rows, uint64_t* words, size_t pitch) {
  for (size_t c = 0; c < rows.channels; c += 64)
    passed_words(x + c, {limits.thresholds + c, limits.flips + c},
                 {rows.pixels, rows.channels - c < 64 ? rows.channels - c : 64, rows.stride}, words + c / 64, pitch);
}

void float_codes(const float* x, const float* thresholds, size_t pitch, const uint32_t* flips, size_t channels,
                 int levels, uint8_t* codes) {
  const __m512i one = _mm512_set1_epi32(1);
  for (size_t c = 0; c < channels; c += 16) {
    const size_t left = channels - c;
    const auto lanes = static_cast<__mmask16>(left < 16 ? (1u << left) - 1 : 0xffffu);
    const __m512 flipped = _mm512_xor_ps(_mm512_maskz_loadu_ps(lanes, x + c),
                                         _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(lanes, flips + c)));
    __m512i passed = _mm512_setzero_si512();
    for (int level = 0; level < levels; ++level) {
      const __m512 limits = _mm512_maskz_loadu_ps(lanes, thresholds + level * pitch + c);
      passed = _mm512_mask_add_epi32(passed, _mm512_cmp_ps_mask(flipped, limits, _CMP_GE_OQ), passed, one);
    }
    _mm512_mask_cvtepi32_storeu_epi8(codes + c, lanes, passed);
  }
}

}  // namespace
}  // namespace lowbit

#include "kernels/rows.h"
