// AVX-VNNI's instruction for CPUs that have AVX2 alone: included before all else, it takes its place.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/target.h"

LOWBIT_TARGET_OPEN("avx2")

// sums[lane] += the products of four unsigned bytes with four signed ones, modulo 2^32.
inline __m256i dpbusd(__m256i sums, __m256i unsigned_bytes, __m256i signed_bytes) {
  uint32_t sum[8];
  uint8_t a[32];
  int8_t b[32];
  std::memcpy(sum, &sums, sizeof(sum));
  std::memcpy(a, &unsigned_bytes, sizeof(a));
  std::memcpy(b, &signed_bytes, sizeof(b));
  for (int i = 0; i < 32; ++i) sum[i / 4] += static_cast<uint32_t>(a[i] * b[i]);
  std::memcpy(&sums, sum, sizeof(sum));
  return sums;
}

LOWBIT_TARGET_CLOSE

#define _mm256_dpbusd_avx_epi32 dpbusd
#define __builtin_cpu_supports(feature) (__builtin_cpu_supports(feature) || std::strcmp(feature, "avxvnni") == 0)
