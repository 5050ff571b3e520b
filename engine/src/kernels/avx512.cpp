// AVX-512 without VPOPCNTDQ (Skylake-X and later): words are added up in carry-save form, whose full adder is two
// ternary-logic instructions, or one where its sum is a parity (full_adders.h), so that only one word in eight is
// counted, byte by byte with vpshufb. Of some pixels, tables tell how many bits differ.
#include "kernels/by_count.h"
#include "kernels/kernels.h"
#include "kernels/pairs.h"
#include "kernels/target.h"

LOWBIT_TARGET_OPEN("avx512f,avx512dq,avx512bw,avx512vl,fma")

namespace lowbit {
namespace {

using Vector = __m512i;

constexpr size_t kFewest = 8;  // words from which carry-save adders gain; 31 would fit a byte uncarried

// The number of ones in each byte, from a table by nibbles.
__m512i byte_counts(__m512i bits) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i nibble = _mm512_set1_epi8(15);
  return _mm512_add_epi8(_mm512_shuffle_epi8(table, _mm512_and_si512(bits, nibble)),
                         _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bits, 4), nibble)));
}

__m512i sum_bytes(__m512i bytes) { return _mm512_sad_epu8(bytes, _mm512_setzero_si512()); }

__m512i add_bytes(__m512i a, __m512i b) { return _mm512_add_epi8(a, b); }
__m512i add_lanes(__m512i a, __m512i b) { return _mm512_add_epi64(a, b); }
__m512i eight_times(__m512i lanes) { return _mm512_slli_epi64(lanes, 3); }

// Word k of a pixel, of P in the tile, against 8 channels.
template <int P>
__m512i difference(const uint64_t* x, const uint64_t* w, int k) {
  return _mm512_xor_si512(_mm512_set1_epi64(static_cast<long long>(x[k * P])),
                          _mm512_loadu_si512(w + k * kTileChannels));
}

}  // namespace
}  // namespace lowbit

#include "kernels/full_adders.h"

namespace lowbit {
namespace {

// The last word is a parity, so that pairs of words are left behind a first one.
void prepare_words(uint64_t* words, size_t depth, int count) {
  if (depth >= kFewest) put_parities(words, depth, count, (depth + 1) % 2);
}

template <int P>
[[gnu::always_inline]] inline __m512i pair(const uint64_t* x, const uint64_t* w, int k, __m512i& ones) {
  const __m512i before = ones;
  ones = difference<P>(x, w, k + 1);  // of parities
  return carry_beside(ones, before, difference<P>(x, w, k));
}

}  // namespace
}  // namespace lowbit

#include "kernels/carry_save.h"

namespace lowbit {
namespace {

template <int P>
struct Counts {
  __m512i low[P], high[P];

  explicit Counts(const BinaryTile& tile) {
    const uint64_t* x = tile.pixels;
    const uint64_t* w = tile.weights;
    if (tile.depth >= kFewest) {
      for (int p = 0; p < P; ++p) {
        low[p] = count_words<P>(x + p, w, tile.depth);
        high[p] = count_words<P>(x + p, w + 8, tile.depth);
      }
      return;
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) low[p] = high[p] = _mm512_setzero_si512();
    for (size_t k = 0; k < tile.depth; ++k, x += P, w += kTileChannels) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        low[p] = _mm512_add_epi8(low[p], byte_counts(difference<P>(x + p, w, 0)));
        high[p] = _mm512_add_epi8(high[p], byte_counts(difference<P>(x + p, w + 8, 0)));
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      low[p] = sum_bytes(low[p]);
      high[p] = sum_bytes(high[p]);
    }
  }
};

}  // namespace
}  // namespace lowbit

#include "kernels/avx512.h"

namespace lowbit {
namespace {

// Pairs of products are added up in 16 bits for as many steps as fit, then in 32.
template <int P>
void multiply_bytes(const uint8_t* pixels, const int8_t* weights, size_t depth, size_t steps,
                    int32_t (*result)[kTileChannels]) {
  const __m512i ones = _mm512_set1_epi16(1);
  __m512i sums[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) sums[p] = _mm512_setzero_si512();
  for (size_t k = 0; k < depth;) {
    const size_t end = depth - k > 4 * steps ? k + 4 * steps : depth;
    __m512i pairs[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) pairs[p] = _mm512_setzero_si512();
    for (; k < end; k += 4) {
      const __m512i row = _mm512_loadu_si512(weights + k * kTileChannels);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p)
        pairs[p] = _mm512_add_epi16(pairs[p], _mm512_maddubs_epi16(four_codes(pixels + p * depth + k), row));
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sums[p] = _mm512_add_epi32(sums[p], _mm512_madd_epi16(pairs[p], ones));
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) _mm512_storeu_si512(result[p], sums[p]);
}

__m512i load(const void* data) { return _mm512_loadu_si512(data); }
void store(void* to, __m512i a) { _mm512_storeu_si512(to, a); }

__m512i all_lanes(int32_t number) { return _mm512_set1_epi32(number); }

__m512i add_products(__m512i sums, __m512i a, __m512i b) { return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b)); }

}  // namespace
}  // namespace lowbit

#include "kernels/split_codes.h"

namespace lowbit {
namespace {

constexpr ByteKernels kBytes{4, 4, arrange_rows, byte_sums, sums_to_codes, sums_by_ramp, sums_to_floats, sum_bits};

}  // namespace
}  // namespace lowbit

#include "kernels/count_floats.h"

namespace lowbit {
namespace {

__m512i repeated(const void* bytes) {
  return _mm512_broadcast_i32x4(_mm_load_si128(static_cast<const __m128i*>(bytes)));
}

__m512i looked_up(__m512i table, __m512i indices) { return _mm512_shuffle_epi8(table, indices); }

__m512i low_bytes(__m512i a) { return _mm512_unpacklo_epi8(a, _mm512_setzero_si512()); }
__m512i high_bytes(__m512i a) { return _mm512_unpackhi_epi8(a, _mm512_setzero_si512()); }

void store_counts(__m512i words, bool add, BlockSums* counts, int row) {
  for (int i = 0; i < 2; ++i) {
    int32_t* to = counts[2 * i][row];
    __m512i wide = _mm512_cvtepu16_epi32(i == 0 ? _mm512_castsi512_si256(words) : _mm512_extracti64x4_epi64(words, 1));
    if (add) wide = _mm512_add_epi32(wide, _mm512_loadu_si512(to));
    _mm512_storeu_si512(to, wide);
  }
}

constexpr CountKernels kCounts{sum_bits, count_floats};

}  // namespace
}  // namespace lowbit

#include "kernels/nibble_tables.h"
#include "kernels/table.h"

constinit const lowbit::Kernels lowbit::kAvx512Kernels = [] {
  lowbit::Kernels kernels = lowbit::table("avx512");
  kernels.blocks = &lowbit::kBlocks;
  kernels.bytes = &lowbit::kBytes;
  kernels.counts = &lowbit::kCounts;
  kernels.float_panels = 2;
  kernels.prepare_words = lowbit::prepare_words;
  return kernels;
}();

LOWBIT_TARGET_CLOSE
