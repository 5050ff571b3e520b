// Harley and Seal's count of ones: words are added up in carry-save form, so that only one in eight is counted. What
// AVX2 and AVX-512 share of it; included inside the target region, by a file that has defined for its Vector:
//   byte_counts(bits), the ones of each byte; sum_bytes(bytes), their sums in 64-bit lanes; add_bytes, add_lanes
//   and eight_times(lanes);
//   carry(sum, a, b), which adds two words to sum, bit by bit, and returns what they carry;
//   difference<P>(x, w, k), word k of a pixel, of P in the tile, xor those of as many channels as fit.
// Mula, Kurz and Lemire, "Faster Population Counts Using AVX2 Instructions", The Computer Journal 61(1), 2018, arXiv
// 1611.07612.
#pragma once

namespace lowbit {
namespace {

// Adds words k to k + 3 to ones and twos; returns what they carry.
template <int P>
[[gnu::always_inline]] inline Vector four(const uint64_t* x, const uint64_t* w, int k, Vector& ones, Vector& twos) {
  const Vector left = carry(ones, difference<P>(x, w, k), difference<P>(x, w, k + 1));
  const Vector right = carry(ones, difference<P>(x, w, k + 2), difference<P>(x, w, k + 3));
  return carry(twos, left, right);
}

Vector twice_plus(Vector bytes, Vector more) { return add_bytes(add_bytes(bytes, bytes), more); }

// The count of a multiple of 4 words in 64-bit lanes.
template <int P>
Vector count_fours(const uint64_t* x, const uint64_t* w, size_t words) {
  Vector ones{}, twos{}, fours{}, eights{};
  for (; words >= 8; words -= 8, x += 8 * P, w += 8 * kTileChannels) {
    const Vector left = four<P>(x, w, 0, ones, twos), right = four<P>(x, w, 4, ones, twos);
    eights = add_lanes(eights, sum_bytes(byte_counts(carry(fours, left, right))));
  }
  Vector bytes = byte_counts(fours);
  if (words != 0) bytes = add_bytes(bytes, byte_counts(four<P>(x, w, 0, ones, twos)));
  bytes = twice_plus(twice_plus(bytes, byte_counts(twos)), byte_counts(ones));
  return add_lanes(sum_bytes(bytes), eight_times(eights));
}

}  // namespace
}  // namespace lowbit
