// From sums to codes by thresholds.
#pragma once

#include <bit>
#include <type_traits>
#include <vector>

#include "op.h"

namespace lowbit {

// Bits of codes up to which counting thresholds is faster than a line through them, or a search.
inline constexpr int64_t kMostCounted = 4;

// Kernels know v >= t alone, so where a channel falls, values and thresholds are flipped: v <= t is -v >= -t of floats,
// and ~v >= ~t of integers.
template <class T>
constexpr uint32_t flip_of(bool falling) {
  return falling ? std::is_same_v<T, float> ? 0x80000000u : 0xffffffffu : 0u;
}

template <class T>
T flipped(T value, uint32_t flip) {
  return std::bit_cast<T>(std::bit_cast<uint32_t>(value) ^ flip);
}

// code = number of thresholds t with v >= t where the channel rises, with v <= t where it falls; T is what v is.
template <class T>
class Thresholds {
 public:
  Thresholds(const OpSpec& spec, int64_t channels) : bits_(static_cast<int>(spec.bits)) {
    require(spec.bits >= 1 && spec.bits <= 8, "bits must be 1 to 8");
    // All channels may share the thresholds of floats.
    const bool shared = std::is_same_v<T, float> && rows(spec, "thresholds") == 1;
    const auto values = tensor<T>(spec, "thresholds", {shared ? 1 : channels, levels()});
    stride_ = shared ? 0 : levels();
    const auto falling = tensor<uint8_t>(spec, "falling", {channels});
    values_.assign(values.begin(), values.end());
    falling_.assign(falling.begin(), falling.end());
  }

  int bits() const { return bits_; }
  int levels() const { return (1 << bits_) - 1; }
  bool falling(int64_t channel) const { return falling_[channel] != 0; }
  const T* of(int64_t channel) const { return values_.data() + channel * stride_; }

  // They are ordered, so those that v passes come first: a search by halves, without branches to guess.
  uint8_t code(T v, int64_t channel) const {
    const T* limits = of(channel);
    const int falls = falling(channel), rises = 1 - falls;
    int code = 0;
    for (int step = 1 << (bits_ - 1); step > 0; step /= 2) {
      const T limit = limits[code + step - 1];
      code += step * ((rises & (v >= limit)) | (falls & (v <= limit)));
    }
    return static_cast<uint8_t>(code);
  }

 private:
  int bits_;
  int64_t stride_;  // between the thresholds of one channel and the next
  std::vector<T> values_;
  std::vector<uint8_t> falling_;
};

// Float to 1-bit codes, written as words. v <= t is -v >= -t, also for NaN and zeros, so falling channels flip both
// signs.
class ThresholdBits final : public PixelwiseOp {
 public:
  ThresholdBits(const OpSpec& spec, const Shape& input, const Kernels& kernels);

  const char* kernel(bool) const override { return "float_bits"; }
  void apply(const Operands& operands, const Part& part) const override;

  // Of 16 channels from `first` on; those beyond the last channel mean nothing.
  FloatLimits limits(int64_t first) const { return {limits_.data() + first, flips_.data() + first}; }

 private:
  const Kernels& kernels_;
  Buffer<float> limits_;
  Buffer<uint32_t> flips_;
};

}  // namespace lowbit
