// AVX-512 with VPOPCNTDQ: xor, vpopcntq and add on 8 channels at a time, one activation word broadcast to all of them.
// 8 pixels x 16 channels make 16 independent accumulators, so no latency shows and nothing is summed across lanes.
// Processors that have it have VNNI too, for products of bytes: four at once, added to 32 bits.
#include "kernels/by_count.h"
#include "kernels/kernels.h"
#include "kernels/pairs.h"
#include "kernels/target.h"

LOWBIT_TARGET_OPEN("avx512f,avx512dq,avx512bw,avx512vl,avx512vpopcntdq,avx512vnni,fma")

namespace lowbit {
namespace {

// One pixel meets each weight once, so that a dense layer is as fast as its weights come from memory: these are asked
// for so many words ahead, over the ends of pages, where the processor itself would stop.
constexpr size_t kAhead = 512;

// The xor of pixel words with the weights of channels 0..7 (low) and 8..15 (high), counted.
template <int P>
struct Counts {
  __m512i low[P], high[P];

  explicit Counts(const BinaryTile& tile) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) low[p] = high[p] = _mm512_setzero_si512();
    const uint64_t* x = tile.pixels;
    const uint64_t* w = tile.weights;
    for (size_t k = 0; k < tile.depth; ++k, x += P, w += kTileChannels) {
      if constexpr (P == 1) {
        _mm_prefetch(reinterpret_cast<const char*>(w + kAhead), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(w + kAhead + 8), _MM_HINT_T0);
      }
      const __m512i w_low = _mm512_loadu_si512(w), w_high = _mm512_loadu_si512(w + 8);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const __m512i word = _mm512_set1_epi64(static_cast<long long>(x[p]));
        low[p] = _mm512_add_epi64(low[p], _mm512_popcnt_epi64(_mm512_xor_si512(word, w_low)));
        high[p] = _mm512_add_epi64(high[p], _mm512_popcnt_epi64(_mm512_xor_si512(word, w_high)));
      }
    }
  }
};

}  // namespace
}  // namespace lowbit

#include "kernels/avx512.h"

namespace lowbit {
namespace {

// Of two panels.
template <int P>
void multiply_bytes(const uint8_t* pixels, const int8_t* weights, size_t depth, int32_t (*left)[kTileChannels],
                    int32_t (*right)[kTileChannels]) {
  __m512i left_sums[P], right_sums[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) left_sums[p] = right_sums[p] = _mm512_setzero_si512();
  for (size_t k = 0; k < depth; k += 4) {
    const __m512i left_row = _mm512_loadu_si512(weights + k * kTileChannels);
    const __m512i right_row = _mm512_loadu_si512(weights + (depth + k) * kTileChannels);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const __m512i codes = four_codes(pixels + p * depth + k);
      left_sums[p] = _mm512_dpbusd_epi32(left_sums[p], codes, left_row);
      right_sums[p] = _mm512_dpbusd_epi32(right_sums[p], codes, right_row);
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    _mm512_storeu_si512(left[p], left_sums[p]);
    _mm512_storeu_si512(right[p], right_sums[p]);
  }
}

void byte_sums(const uint8_t* pixels, const int8_t* weights, size_t depth, int count, int panels, int64_t,
               BlockSums* sums) {
  for (int panel = 0; panel < panels; panel += 2, weights += depth * kBlockChannels)
    LOWBIT_BY_EIGHTS(multiply_bytes, count, pixels + first * depth, weights, depth, sums[panel] + first,
                     sums[panel + 1] + first)
}

constexpr ByteKernels kBytes{4, 2, arrange_rows, byte_sums, sums_to_codes, sums_by_ramp, sums_to_floats, sum_bits};

}  // namespace
}  // namespace lowbit

const lowbit::Kernels lowbit::kAvx512VpopcntdqKernels{
    "avx512_vpopcntdq", binary_subtract, binary_bits, binary_floats, float_tile, float_tile_bits, integer_sums,
    float_bits,         float_codes,     ramp<float>, &kRows,        nullptr,    &kBytes,         2};

LOWBIT_TARGET_CLOSE
