// Full adders of AVX-512, and such whose sums need no computing: two words of differences are added to the bit carried
// so far, and such a sum is the parity of all differences up to there, which is the parity of the pixel's words xor
// that of the weight's. Where both have their parities in the place of every second word, the sum costs as much as the
// difference that it replaces. Included inside the target region.
#pragma once

namespace lowbit {
namespace {

// Words `start`, start + 2, ... of words[depth][count] become the parities of all words up to them.
[[maybe_unused]] void put_parities(uint64_t* words, size_t depth, int count, size_t start) {
  for (int first = 0; first < count; first += 8) {
    const int left = count - first;
    const auto lanes = static_cast<__mmask8>(left < 8 ? (1u << left) - 1 : 0xffu);
    __m512i parities = _mm512_setzero_si512();
    uint64_t* row = words + first;
    for (size_t k = 0; k < depth; ++k, row += count) {
      parities = _mm512_xor_si512(parities, _mm512_maskz_loadu_epi64(lanes, row));
      if ((k + start) % 2 != 0) continue;
      if (left < 8)
        _mm512_mask_storeu_epi64(row, lanes, parities);
      else
        _mm512_storeu_si512(row, parities);
    }
  }
}

// Adds two words, bit by bit, to sum; returns what they carry.
[[maybe_unused]] __m512i carry(__m512i& sum, __m512i a, __m512i b) {
  const __m512i carried = _mm512_ternarylogic_epi64(sum, a, b, 0xe8);
  sum = _mm512_ternarylogic_epi64(sum, a, b, 0x96);
  return carried;
}

// What a full adder carries of `before`, `bits` and a third input, where `sum` is before ^ bits ^ third: `bits` where
// it is as `before`, else the third, which is ~sum there.
__m512i carry_beside(__m512i sum, __m512i before, __m512i bits) {
  constexpr int kCarry = 0b11010100;  // at 4 * before + 2 * bits + sum
  return _mm512_ternarylogic_epi64(before, bits, sum, kCarry);
}

}  // namespace
}  // namespace lowbit
