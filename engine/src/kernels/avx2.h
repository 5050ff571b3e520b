// What avx2.cpp and avx_vnni.cpp share. Included inside the target region, so that each compiles it for itself.
#pragma once

namespace lowbit {
namespace {

__m256i load(const void* data) { return _mm256_loadu_si256(static_cast<const __m256i*>(data)); }

// Four codes of a pixel for all channels.
__m256i four_codes(const uint8_t* codes) {
  int32_t four;
  __builtin_memcpy(&four, codes, 4);
  return _mm256_set1_epi32(four);
}

}  // namespace
}  // namespace lowbit
