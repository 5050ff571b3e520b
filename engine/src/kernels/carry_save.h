// Harley and Seal's count of ones: words are added up in carry-save form, so that only one in eight is counted. What
// AVX2 and AVX-512 share of it; included inside the target region, by a file that has defined for its Vector:
//   byte_counts(bits), the ones of each byte; sum_bytes(bytes), their sums in 64-bit lanes; add_bytes, add_lanes
//   and eight_times(lanes);
//   carry(sum, a, b), which adds two words to sum, bit by bit, and returns what they carry;
//   difference<P>(x, w, k), word k of a pixel, of P in the tile, xor those of as many channels as fit;
//   pair<P>(x, w, k, ones), which adds differences k and k + 1 to ones and returns what they carry.
// Mula, Kurz and Lemire, "Faster Population Counts Using AVX2 Instructions", The Computer Journal 61(1), 2018, arXiv
// 1611.07612.
#pragma once

namespace lowbit {
namespace {

// Adds words k to k + 3 to ones and twos; returns what they carry.
template <int P>
[[gnu::always_inline]] inline Vector four(const uint64_t* x, const uint64_t* w, int k, Vector& ones, Vector& twos) {
  const Vector left = pair<P>(x, w, k, ones), right = pair<P>(x, w, k + 2, ones);
  return carry(twos, left, right);
}

Vector twice_plus(Vector bytes, Vector more) { return add_bytes(add_bytes(bytes, bytes), more); }

// How many bits of a pixel's words, 8 or more, and of those of as many channels as fit differ, in 64-bit lanes. Where
// they are odd in number, the first is alone.
template <int P>
Vector count_words(const uint64_t* x, const uint64_t* w, size_t words) {
  Vector ones{}, twos{}, fours{}, eights{};
  if (words % 2 != 0) {
    ones = difference<P>(x, w, 0);
    words -= 1, x += P, w += kTileChannels;
  }
  for (; words >= 8; words -= 8, x += 8 * P, w += 8 * kTileChannels) {
    const Vector left = four<P>(x, w, 0, ones, twos), right = four<P>(x, w, 4, ones, twos);
    eights = add_lanes(eights, sum_bytes(byte_counts(carry(fours, left, right))));
  }
  Vector bytes = byte_counts(fours);
  if (words >= 4) {
    bytes = add_bytes(bytes, byte_counts(four<P>(x, w, 0, ones, twos)));
    words -= 4, x += 4 * P, w += 4 * kTileChannels;
  }
  bytes = twice_plus(bytes, byte_counts(twos));
  if (words != 0) bytes = add_bytes(bytes, byte_counts(pair<P>(x, w, 0, ones)));
  return add_lanes(sum_bytes(twice_plus(bytes, byte_counts(ones))), eight_times(eights));
}

}  // namespace
}  // namespace lowbit
