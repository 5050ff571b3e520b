// AVX-512 with VPOPCNTDQ: 8 channels at a time, one activation word broadcast to all of them. 4 pixels x 16 channels
// make 8 sums, so no latency shows and nothing is summed across lanes. Processors that have it have VNNI too, for
// products of bytes: four at once, added to 32 bits.
//
// Counting bits takes three instructions for a word, xor, vpopcntq and add, and the processor is busy with nothing
// else. So two words are counted at once, by a full adder of which only what it carries is counted, for twice: where
// its sum is a parity (full_adders.h), two words take five instructions, not six.
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

}  // namespace
}  // namespace lowbit

#include "kernels/full_adders.h"

namespace lowbit {
namespace {

void prepare_words(uint64_t* words, size_t depth, int count) { put_parities(words, depth, count, 0); }

// How many bits differ between up to four pixels of a tile of P, from `first` on, and channels 0..7 (low) and 8..15.
template <int P, int N>
[[gnu::always_inline]] inline void count_pixels(const BinaryTile& tile, int first, __m512i* low, __m512i* high) {
  const size_t depth = tile.depth;
  const uint64_t* x = tile.pixels + first;
  const uint64_t* w = tile.weights;
  __m512i sums[N][2], counts[N][2];
  const auto word = [&](size_t k, int p) { return _mm512_set1_epi64(static_cast<long long>(x[k * P + p])); };
  const auto weight = [&](size_t k, int half) {
    const uint64_t* words = w + k * kTileChannels + 8 * half;
    if constexpr (P == 1) _mm_prefetch(reinterpret_cast<const char*>(words + kAhead), _MM_HINT_T0);
    return _mm512_loadu_si512(words);
  };
#pragma GCC unroll 4
  for (int p = 0; p < N; ++p)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      counts[p][half] = _mm512_setzero_si512();
      sums[p][half] = depth > 0 ? _mm512_xor_si512(word(0, p), weight(0, half)) : counts[p][half];
    }
  size_t k = 1;
  for (; k + 1 < depth; k += 2) {
    const __m512i of_bits[] = {weight(k, 0), weight(k, 1)}, of_sum[] = {weight(k + 1, 0), weight(k + 1, 1)};
#pragma GCC unroll 4
    for (int p = 0; p < N; ++p) {
      const __m512i bits = word(k, p), parity = word(k + 1, p);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m512i sum = _mm512_xor_si512(parity, of_sum[half]);
        const __m512i carried = carry_beside(sum, sums[p][half], _mm512_xor_si512(bits, of_bits[half]));
        counts[p][half] = _mm512_add_epi64(counts[p][half], _mm512_popcnt_epi64(carried));
        sums[p][half] = sum;
      }
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < N; ++p)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i twice = _mm512_add_epi64(counts[p][half], counts[p][half]);
      counts[p][half] = _mm512_add_epi64(twice, _mm512_popcnt_epi64(sums[p][half]));
    }
  if (k < depth)
#pragma GCC unroll 4
    for (int p = 0; p < N; ++p)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m512i last = _mm512_popcnt_epi64(_mm512_xor_si512(word(k, p), weight(k, half)));
        counts[p][half] = _mm512_add_epi64(counts[p][half], last);
      }
#pragma GCC unroll 4
  for (int p = 0; p < N; ++p) {
    low[first + p] = counts[p][0];
    high[first + p] = counts[p][1];
  }
}

template <int P>
struct Counts {
  __m512i low[P], high[P];

  [[gnu::always_inline]] explicit Counts(const BinaryTile& tile) {
    constexpr int kFirst = P < 4 ? P : 4;
    count_pixels<P, kFirst>(tile, 0, low, high);
    if constexpr (P > kFirst) count_pixels<P, P - kFirst>(tile, kFirst, low, high);
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
  for (int panel = 0; panel < panels; panel += 2, weights += depth * 2 * kTileChannels)
    LOWBIT_BY_EIGHTS(multiply_bytes, count, pixels + first * depth, weights, depth, sums[panel] + first,
                     sums[panel + 1] + first)
}

constexpr ByteKernels kBytes{4, 2, arrange_rows, byte_sums, sums_to_codes, sums_by_ramp, sums_to_floats, sum_bits};

}  // namespace
}  // namespace lowbit

#include "kernels/table.h"

constinit const lowbit::Kernels lowbit::kAvx512VpopcntdqKernels = [] {
  lowbit::Kernels kernels = lowbit::table("avx512_vpopcntdq");
  kernels.bytes = &lowbit::kBytes;
  kernels.float_panels = 2;
  kernels.prepare_words = lowbit::prepare_words;
  return kernels;
}();

LOWBIT_TARGET_CLOSE
