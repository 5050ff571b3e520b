// AVX2 with VNNI on vectors of 256 bits, which CPUs have that lack AVX-512: four products of bytes and their sum are
// one instruction. All else is AVX2's.
#include "kernels/by_count.h"
#include "kernels/kernels.h"
#include "kernels/target.h"

LOWBIT_TARGET_OPEN("avx2,fma,avxvnni")

#include "kernels/avx2.h"

namespace lowbit {
namespace {

template <int P>
void multiply_bytes(const uint8_t* pixels, const int8_t* weights, size_t depth, int32_t (*result)[kTileChannels]) {
  __m256i low[P], high[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) low[p] = high[p] = _mm256_setzero_si256();
  for (size_t k = 0; k < depth; k += 4, weights += 4 * kTileChannels) {
    const __m256i w_low = load(weights), w_high = load(weights + 32);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const __m256i codes = four_codes(pixels + p * depth + k);
      low[p] = _mm256_dpbusd_avx_epi32(low[p], codes, w_low);
      high[p] = _mm256_dpbusd_avx_epi32(high[p], codes, w_high);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    auto* sums = reinterpret_cast<__m256i*>(result[p]);
    _mm256_storeu_si256(sums, low[p]);
    _mm256_storeu_si256(sums + 1, high[p]);
  }
}

void byte_sums(const uint8_t* pixels, const int8_t* weights, size_t depth, int count, int panels, int64_t,
               BlockSums* sums) {
  for (int panel = 0; panel < panels; ++panel, weights += depth * kTileChannels)
    LOWBIT_BY_FOURS(multiply_bytes, count, pixels + first * depth, weights, depth, sums[panel] + first)
}

}  // namespace
}  // namespace lowbit

LOWBIT_TARGET_CLOSE

// Called on any CPU, so for none of its own.
lowbit::Kernels lowbit::avx_vnni_kernels() {
  Kernels kernels = kAvx2Kernels;
  kernels.isa = "avx_vnni";
  static const ByteKernels bytes = [](ByteKernels table) {
    table.planes = 4;
    table.sums = byte_sums;
    return table;
  }(*kernels.bytes);
  kernels.bytes = &bytes;
  return kernels;
}
