// AVX2 with FMA: xor and a byte-wise count by vpshufb on 4 channels at a time, one activation word broadcast to all of
// them. Long sums are added up in carry-save form, so that only one word in eight is counted. Of some pixels, tables
// tell how many bits differ.
#include "kernels/by_count.h"
#include "kernels/kernels.h"
#include "kernels/pairs.h"
#include "kernels/target.h"

LOWBIT_TARGET_OPEN("avx2,fma")

#include "kernels/avx2.h"

namespace lowbit {
namespace {

constexpr size_t kRegisterFloats = 8;

// As rows.h has them.
__m256 larger(__m256 a, __m256 b) { return _mm256_max_ps(b, a); }
__m256 smaller(__m256 a, __m256 b) { return _mm256_min_ps(b, a); }

constexpr size_t kFewest = 24;  // words from which carry-save adders gain; 31 would fit a byte uncarried

using Vector = __m256i;

// The number of ones in each byte, from a table by nibbles.
__m256i byte_counts(__m256i bits) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m256i nibble = _mm256_set1_epi8(15);
  return _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(bits, nibble)),
                         _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bits, 4), nibble)));
}

__m256i sum_bytes(__m256i bytes) { return _mm256_sad_epu8(bytes, _mm256_setzero_si256()); }

__m256i add_bytes(__m256i a, __m256i b) { return _mm256_add_epi8(a, b); }
__m256i add_lanes(__m256i a, __m256i b) { return _mm256_add_epi64(a, b); }
__m256i eight_times(__m256i lanes) { return _mm256_slli_epi64(lanes, 3); }

// Adds two words, bit by bit, to sum; returns what they carry.
__m256i carry(__m256i& sum, __m256i a, __m256i b) {
  const __m256i differ = _mm256_xor_si256(a, b);
  const __m256i carried = _mm256_or_si256(_mm256_and_si256(a, b), _mm256_and_si256(differ, sum));
  sum = _mm256_xor_si256(sum, differ);
  return carried;
}

// Word k of a pixel, of P in the tile, against 4 channels.
template <int P>
__m256i difference(const uint64_t* x, const uint64_t* w, int k) {
  return _mm256_xor_si256(_mm256_set1_epi64x(static_cast<long long>(x[k * P])), load(w + k * kTileChannels));
}

template <int P>
[[gnu::always_inline]] inline __m256i pair(const uint64_t* x, const uint64_t* w, int k, __m256i& ones) {
  return carry(ones, difference<P>(x, w, k), difference<P>(x, w, k + 1));
}

}  // namespace
}  // namespace lowbit

#include "kernels/arrange_rows.h"
#include "kernels/carry_save.h"
#include "kernels/ramp.h"

namespace lowbit {
namespace {

// The low halves of eight 64-bit lanes.
__m256i narrow(__m256i low, __m256i high) {
  const __m256 halves = _mm256_shuffle_ps(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high), _MM_SHUFFLE(2, 0, 2, 0));
  return _mm256_permute4x64_epi64(_mm256_castps_si256(halves), _MM_SHUFFLE(3, 1, 2, 0));
}

// How many bits of each pixel and channel differ; four channels to a vector.
template <int P>
struct Counts {
  __m256i quads[P][4];

  explicit Counts(const BinaryTile& tile) {
    for (int i = 0; i < 4; ++i) {
      const uint64_t* x = tile.pixels;
      const uint64_t* w = tile.weights + 4 * i;
      if (tile.depth >= kFewest) {
        for (int p = 0; p < P; ++p) quads[p][i] = count_words<P>(x + p, w, tile.depth);
        continue;
      }
      __m256i bytes[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) bytes[p] = _mm256_setzero_si256();
      for (size_t k = 0; k < tile.depth; ++k, x += P, w += kTileChannels) {
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) bytes[p] = _mm256_add_epi8(bytes[p], byte_counts(difference<P>(x + p, w, 0)));
      }
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) quads[p][i] = sum_bytes(bytes[p]);
    }
  }

  // Of pixel p, as 32 bits, for eight channels.
  __m256i eight(int p, int first) const { return narrow(quads[p][first / 4], quads[p][first / 4 + 1]); }
};

// Eight channels from `first` on.
__m256 scaled(__m256 sums, const FloatOutput& out, int first) {
  return _mm256_add_ps(_mm256_mul_ps(sums, _mm256_loadu_ps(out.scale + first)), _mm256_loadu_ps(out.bias + first));
}

// Writes what sums_of(p), eight channels of each pixel from `first` on, become.
template <class SumsOf>
void store_sums(int count, const FloatOutput& out, int first, const SumsOf& sums_of) {
  const FloatOutput to = out;  // else it is read anew behind every store, which might have changed it
  const __m256 scale = _mm256_loadu_ps(to.scale + first), bias = _mm256_loadu_ps(to.bias + first);
  for (int p = 0; p < count; ++p) {
    const ptrdiff_t at = p * to.stride + first;
    __m256 y = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums_of(p)), scale), bias);
    if (to.added != nullptr) y = _mm256_add_ps(y, _mm256_loadu_ps(to.added + at));
    _mm256_storeu_ps(to.output + at, y);
  }
}

// A sum of signs.
__m256i dots(__m256i counts, const int32_t* bases) {
  return _mm256_sub_epi32(load(bases), _mm256_add_epi32(counts, counts));
}

// A bit for each of eight counts that is at most its limit.
unsigned within(__m256i counts, const int32_t* limits) {
  return _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(counts, load(limits)))) ^ 0xff;
}

template <int P>
void subtract_counts(const BinaryTile& tile, int shift, int32_t (*sums)[kTileChannels]) {
  const Counts<P> counts(tile);
  for (int p = 0; p < P; ++p)
    for (int first = 0; first < kTileChannels; first += 8) {
      const __m256i shifted = _mm256_sll_epi32(counts.eight(p, first), _mm_cvtsi32_si128(shift));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums[p] + first),
                          _mm256_sub_epi32(load(sums[p] + first), shifted));
    }
}

template <int P>
void store_bits(const BinaryTile& tile, const int32_t* const* limits, uint16_t inverted, uint16_t* bits) {
  const Counts<P> sums(tile);
  for (int p = 0; p < P; ++p) {
    unsigned word = inverted;
    for (int first = 0; first < kTileChannels; first += 8)
      word ^= within(sums.eight(p, first), limits[p] + first) << first;
    bits[p] = static_cast<uint16_t>(word);
  }
}

template <int P>
void store_floats(const BinaryTile& tile, const int32_t* const* bases, const FloatOutput& out) {
  for (int c = 0; c < tile.panels * kTileChannels; c += kTileChannels) {
    const Counts<P> sums({tile.pixels, tile.weights + c * tile.depth, tile.depth, P});
    for (int first = 0; first < kTileChannels; first += 8)
      store_sums(P, out, c + first, [&](int p) { return dots(sums.eight(p, first), bases[p] + c + first); });
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

template <int P>
struct FloatSums {
  __m256 low[P], high[P];

  FloatSums(const FloatTile& tile, int first) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) low[p] = high[p] = _mm256_setzero_ps();
    const float* w = tile.weights;
    for (size_t k = 0; k < tile.depth; ++k, w += kTileChannels) {
      const float* x = tile.at(k) + first;
      const __m256 w_low = _mm256_loadu_ps(w), w_high = _mm256_loadu_ps(w + 8);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const __m256 value = _mm256_set1_ps(x[p]);
        low[p] = _mm256_fmadd_ps(value, w_low, low[p]);
        high[p] = _mm256_fmadd_ps(value, w_high, high[p]);
      }
    }
  }
};

template <int P>
void multiply(const FloatTile& tile, int first, const FloatOutput& out) {
  const FloatSums<P> sums(tile, first);
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    float* output = out.output + (first + p) * out.stride;
    _mm256_storeu_ps(output, scaled(sums.low[p], out, 0));
    _mm256_storeu_ps(output + 8, scaled(sums.high[p], out, 8));
  }
}

void float_tile(const FloatTile& tile, const FloatOutput& out) {
  LOWBIT_BY_FOURS(multiply, tile.count, tile, first, out)
}

int passed(__m256 values, const FloatLimits& limits, int first) {
  const __m256 flips = _mm256_loadu_ps(reinterpret_cast<const float*>(limits.flips) + first);
  return _mm256_movemask_ps(
      _mm256_cmp_ps(_mm256_xor_ps(values, flips), _mm256_loadu_ps(limits.thresholds + first), _CMP_GE_OQ));
}

template <int P>
void multiply_to_bits(const FloatTile& tile, int first, const FloatOutput& out, const FloatLimits& limits,
                      uint32_t* bits) {
  const FloatSums<P> sums(tile, first);
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
    bits[first + p] = static_cast<uint32_t>(passed(scaled(sums.low[p], out, 0), limits, 0) |
                                            passed(scaled(sums.high[p], out, 8), limits, 8) << 8);
}

void float_tile_bits(const FloatTile& tile, const FloatOutput& out, const FloatLimits& limits, uint32_t* bits) {
  LOWBIT_BY_FOURS(multiply_to_bits, tile.count, tile, first, out, limits, bits)
}

template <int P>
void multiply_integers(const IntegerTile& tile, int first, int32_t (*result)[kTileChannels]) {
  __m256i even[P], odd[P];  // channels 0..3 and 8..11, 4..7 and 12..15: as unpacking leaves them
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) even[p] = odd[p] = _mm256_setzero_si256();
  const int16_t* x = tile.pixels + first;
  const int16_t* w = tile.weights;
  for (size_t k = 0; k < tile.depth; k += 2, x += 2 * tile.count, w += 2 * kTileChannels) {
    const int16_t* next_x = k + 1 < tile.depth ? x + tile.count : kNoRow;
    const __m256i row = load(w), next_row = load(k + 1 < tile.depth ? w + kTileChannels : kNoRow);
    const __m256i w_even = _mm256_unpacklo_epi16(row, next_row), w_odd = _mm256_unpackhi_epi16(row, next_row);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const __m256i both = _mm256_set1_epi32(joined(x[p], next_x[p]));
      even[p] = _mm256_add_epi32(even[p], _mm256_madd_epi16(both, w_even));
      odd[p] = _mm256_add_epi32(odd[p], _mm256_madd_epi16(both, w_odd));
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    auto* output = reinterpret_cast<__m256i*>(result[first + p]);
    _mm256_storeu_si256(output, _mm256_permute2x128_si256(even[p], odd[p], 0x20));
    _mm256_storeu_si256(output + 1, _mm256_permute2x128_si256(even[p], odd[p], 0x31));
  }
}

void integer_sums(const IntegerTile& tile, int32_t (*sums)[kTileChannels]) {
  LOWBIT_BY_FOURS(multiply_integers, tile.count, tile, first, sums)
}

// Pairs of products are added up in 16 bits for as many steps as fit, then in 32; 8 channels.
template <int P>
void multiply_bytes(const uint8_t* pixels, const int8_t* weights, size_t depth, size_t steps,
                    int32_t (*result)[kTileChannels]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int half = 0; half < kTileChannels; half += 8, weights += 32) {
    __m256i sums[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) sums[p] = _mm256_setzero_si256();
    for (size_t k = 0; k < depth;) {
      const size_t end = depth - k > 4 * steps ? k + 4 * steps : depth;
      __m256i pairs[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) pairs[p] = _mm256_setzero_si256();
      for (; k < end; k += 4) {
        const __m256i row = load(weights + k * kTileChannels);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          const __m256i codes = four_codes(pixels + p * depth + k);
          pairs[p] = _mm256_add_epi16(pairs[p], _mm256_maddubs_epi16(codes, row));
        }
      }
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sums[p] = _mm256_add_epi32(sums[p], _mm256_madd_epi16(pairs[p], ones));
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) _mm256_storeu_si256(reinterpret_cast<__m256i*>(result[p] + half), sums[p]);
  }
}

void store(void* to, __m256i a) { _mm256_storeu_si256(static_cast<__m256i*>(to), a); }

__m256i all_lanes(int32_t number) { return _mm256_set1_epi32(number); }

__m256i add_products(__m256i sums, __m256i a, __m256i b) { return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)); }

}  // namespace
}  // namespace lowbit

#include "kernels/split_codes.h"

namespace lowbit {
namespace {

// Eight channels from `first` on, which may be those of a panel behind the first.
__m256i completed(const IntegerSums& sums, int p, int first) {
  const int32_t* row = sums.sums[first / kTileChannels * kBlockPixels + p] + first % kTileChannels;
  const __m256i product = _mm256_mullo_epi32(load(row), _mm256_set1_epi32(sums.multiplier));
  return _mm256_add_epi32(product, load(sums.bases[p] + first));
}

__m256i passed(__m256i integers, const IntegerLimits& limits, int first) {
  const __m256i flipped = _mm256_xor_si256(integers, load(limits.flips + first));
  __m256i passed = _mm256_set1_epi32(limits.levels);
  for (int level = 0; level < limits.levels; ++level)
    passed =
        _mm256_add_epi32(passed, _mm256_cmpgt_epi32(load(limits.thresholds + level * kTileChannels + first), flipped));
  return passed;
}

void sums_to_codes(const IntegerSums& sums, const IntegerLimits& limits, uint8_t* codes, ptrdiff_t stride) {
  for (int p = 0; p < sums.count; ++p) {
    const __m256i low = passed(completed(sums, p, 0), limits, 0), high = passed(completed(sums, p, 8), limits, 8);
    // Packing works by halves of a vector, so their quarters come out as 0, 2, 1, 3.
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + p * stride), bytes);
  }
}

void sum_bits(const int32_t (*sums)[kTileChannels], int count, int panels, const SumLimits& of, uint64_t* words,
              ptrdiff_t pitch) {
  for (int panel = 0; panel < panels; panel += 4, sums += 4 * kBlockPixels) {
    const int32_t* limits = of.limits + panel * kTileChannels;
    const uint64_t inverted = of.inverted[panel / 4];
    const int eights = panels - panel < 4 ? 2 * (panels - panel) : 8;
    for (int p = 0; p < count; ++p) {
      const int32_t* of_pixel = limits + of.places[p];
      uint64_t word = 0;
      for (int i = 0; i < eights; ++i)
        word |= uint64_t{within(load(sums[i / 2 * kBlockPixels + p] + i % 2 * 8), of_pixel + 8 * i)} << 8 * i;
      words[p * pitch + panel / 4] = word ^ inverted;
    }
  }
}

void sums_to_floats(const IntegerSums& sums, const FloatOutput& out) {
  const IntegerSums from = sums;  // a copy, as store_sums has one
  for (int first = 0; first < from.panels * kTileChannels; first += 8)
    store_sums(from.count, out, first, [&](int p) { return completed(from, p, first); });
}

constexpr ByteKernels kBytes{4, 8, arrange_rows, byte_sums, sums_to_codes, sums_by_ramp, sums_to_floats, sum_bits};

uint64_t passed_word(const float* x, const FloatLimits& limits, size_t count) {
  uint64_t word = 0;
  size_t c = 0;
  for (; c + 8 <= count; c += 8)
    word |= static_cast<uint64_t>(passed(_mm256_loadu_ps(x + c), limits, static_cast<int>(c))) << c;
  if (c < count) {
    const __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count - c)), numbers);
    const __m256i flip = _mm256_maskload_epi32(reinterpret_cast<const int*>(limits.flips + c), lanes);
    const __m256 flipped = _mm256_xor_ps(_mm256_maskload_ps(x + c, lanes), _mm256_castsi256_ps(flip));
    const __m256 passed = _mm256_cmp_ps(flipped, _mm256_maskload_ps(limits.thresholds + c, lanes), _CMP_GE_OQ);
    const int bits = _mm256_movemask_ps(_mm256_and_ps(passed, _mm256_castsi256_ps(lanes)));
    word |= static_cast<uint64_t>(bits) << c;
  }
  return word;
}

void float_codes(const float* x, const float* thresholds, size_t pitch, const uint32_t* flips, size_t channels,
                 int levels, uint8_t* codes) {
  const __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (size_t c = 0; c < channels; c += 8) {
    const int left = channels - c < 8 ? static_cast<int>(channels - c) : 8;
    const __m256i lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32(left), numbers);
    const __m256i flip = _mm256_maskload_epi32(reinterpret_cast<const int*>(flips + c), lanes);
    const __m256 flipped = _mm256_xor_ps(_mm256_maskload_ps(x + c, lanes), _mm256_castsi256_ps(flip));
    __m256i passed = _mm256_setzero_si256();
    for (int level = 0; level < levels; ++level) {
      const __m256 limits = _mm256_maskload_ps(thresholds + level * pitch + c, lanes);
      passed = _mm256_sub_epi32(passed, _mm256_castps_si256(_mm256_cmp_ps(flipped, limits, _CMP_GE_OQ)));
    }
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(passed), _mm256_extracti128_si256(passed, 1));
    const __m128i bytes = _mm_packus_epi16(words, words);
    if (left == 8) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + c), bytes);
    } else {
      uint8_t last[16];
      _mm_storeu_si128(reinterpret_cast<__m128i*>(last), bytes);
      for (int i = 0; i < left; ++i) codes[c + i] = last[i];
    }
  }
}

__m256i repeated(const void* bytes) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(static_cast<const __m128i*>(bytes)));
}

__m256i looked_up(__m256i table, __m256i indices) { return _mm256_shuffle_epi8(table, indices); }

__m256i low_bytes(__m256i a) { return _mm256_unpacklo_epi8(a, _mm256_setzero_si256()); }
__m256i high_bytes(__m256i a) { return _mm256_unpackhi_epi8(a, _mm256_setzero_si256()); }

void store_counts(__m256i words, bool add, BlockSums* counts, int row) {
  auto* to = reinterpret_cast<__m256i*>((*counts)[row]);
  __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(words)),
          high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(words, 1));
  if (add) {
    low = _mm256_add_epi32(low, load(to));
    high = _mm256_add_epi32(high, load(to + 1));
  }
  _mm256_storeu_si256(to, low);
  _mm256_storeu_si256(to + 1, high);
}

void count_floats(const int32_t (*counts)[kTileChannels], int count, int panels, const int32_t* const* bases,
                  const FloatOutput& out) {
  for (int first = 0; first < panels * kTileChannels; first += 8) {
    const auto* panel = counts + first / kTileChannels * kBlockPixels;
    store_sums(count, out, first,
               [&](int p) { return dots(load(panel[p] + first % kTileChannels), bases[p] + first); });
  }
}

constexpr CountKernels kCounts{sum_bits, count_floats};

}  // namespace
}  // namespace lowbit

#include "kernels/float_bits.h"
#include "kernels/nibble_tables.h"
#include "kernels/rows.h"
#include "kernels/table.h"

constinit const lowbit::Kernels lowbit::kAvx2Kernels = [] {
  lowbit::Kernels kernels = lowbit::table("avx2");
  kernels.blocks = &lowbit::kBlocks;
  kernels.bytes = &lowbit::kBytes;
  kernels.counts = &lowbit::kCounts;
  return kernels;
}();

LOWBIT_TARGET_CLOSE
