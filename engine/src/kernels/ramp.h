// Codes from thresholds that rise almost evenly, the same source for every instruction set. Included inside the target
// region, so that each file compiles it for itself; the loops are simple enough for the compiler to make them wide.
#pragma once

namespace lowbit {
namespace {

constexpr size_t kRampBlock = 64;

// kAlike: as Ramp::alike says, so that what all values have in common stays in registers.
template <bool kAlike, class T>
void ramp_of(const T* values, const Ramp<T>& of, size_t count, uint8_t* codes) {
  for (size_t first = 0; first < count; first += kRampBlock) {
    const size_t size = count - first < kRampBlock ? count - first : kRampBlock;
    T flipped[kRampBlock];
    float places[kRampBlock];
    int32_t levels[kRampBlock], close = 0;
    for (size_t i = 0; i < size; ++i) {
      const size_t n = kAlike ? 0 : first + i;
      flipped[i] = __builtin_bit_cast(T, __builtin_bit_cast(uint32_t, values[first + i]) ^ of.flips[n]);
      const float place = static_cast<float>(flipped[i]) * of.slope[n] + of.start[n];
      const float raised = place > of.low[n] ? place : of.low[n];  // of a NaN, too
      places[i] = raised < of.high[n] ? raised : of.high[n];
      levels[i] = static_cast<int32_t>(places[i]);
      const float above = places[i] - static_cast<float>(levels[i]);
      close |= static_cast<int32_t>(above <= of.slack) | static_cast<int32_t>(above >= 1 - of.slack);
    }
    if (close != 0)
      for (size_t i = 0; i < size; ++i) {
        const int32_t nearest = static_cast<int32_t>(places[i] + 0.5f) - 1;
        const int32_t row = of.rows[kAlike ? 0 : first + i];
        levels[i] = nearest + static_cast<int32_t>(flipped[i] >= of.limits[row + nearest]);
      }
    for (size_t i = 0; i < size; ++i) codes[first + i] = static_cast<uint8_t>(levels[i]);
  }
}

template <class T>
void ramp(const T* values, const Ramp<T>& of, size_t count, uint8_t* codes) {
  if (of.alike)
    ramp_of<true>(values, of, count, codes);
  else
    ramp_of<false>(values, of, count, codes);
}

[[maybe_unused]] void sums_by_ramp(const IntegerSums& sums, const Ramp<int32_t>& of, uint8_t* codes, ptrdiff_t stride) {
  for (int p = 0; p < sums.count; ++p) {
    int32_t values[kTileChannels];
    for (int c = 0; c < kTileChannels; ++c)
      values[c] = static_cast<int32_t>(static_cast<uint32_t>(sums.sums[p][c]) * static_cast<uint32_t>(sums.multiplier) +
                                       static_cast<uint32_t>(sums.bases[p][c]));
    ramp(values, of, kTileChannels, codes + p * stride);
  }
}

}  // namespace
}  // namespace lowbit
