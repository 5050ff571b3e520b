#include "output_transform.h"

#include <bit>

namespace lowbit {
namespace {

Shape codes_like(const Shape& input, int64_t bits) {
  require(input.is_float(), "threshold needs float32 as input");
  return {input.height, input.width, input.channels, static_cast<int>(bits)};
}

// v <= t is -v >= -t.
float flipped(float threshold, uint32_t flip) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(threshold) ^ flip);
}

class ThresholdCodes final : public PixelwiseOp {
 public:
  ThresholdCodes(const OpSpec& spec, const Shape& input, const Kernels& kernels)
      : PixelwiseOp(codes_like(input, spec.bits)), kernels_(kernels), thresholds_(spec, input.channels) {
    if (spec.bits > kMostCounted) return;
    limits_.resize(thresholds_.levels() * input.channels);
    flips_.resize(input.channels);
    for (int64_t c = 0; c < input.channels; ++c) {
      flips_[c] = thresholds_.falling(c) ? 0x80000000u : 0u;
      for (int level = 0; level < thresholds_.levels(); ++level)
        limits_[level * input.channels + c] = flipped(thresholds_.of(c)[level], flips_[c]);
    }
  }

  const char* kernel(bool) const override { return limits_.empty() ? "" : "float_codes"; }

  void apply(const Operands& operands, const Part& part) const override {
    const int64_t channels = output().channels, count = part.end - part.channel;
    for (int64_t pixel = part.first; pixel < part.first + part.count; ++pixel) {
      const float* x = operands.input<float>() + pixel * channels + part.channel;
      uint8_t* codes = operands.result<uint8_t>() + pixel * channels + part.channel;
      if (limits_.empty())
        for (int64_t c = 0; c < count; ++c) codes[c] = thresholds_.code(x[c], part.channel + c);
      else
        kernels_.float_codes(x, limits_.data() + part.channel, channels, flips_.data() + part.channel, count,
                             thresholds_.levels(), codes);
    }
  }

 private:
  static constexpr int64_t kMostCounted = 4;  // bits up to which counting limits is faster than searching them

  const Kernels& kernels_;
  Thresholds<float> thresholds_;
  Buffer<float> limits_;  // [level][channel], flipped; empty where they are searched
  Buffer<uint32_t> flips_;
};

}  // namespace

ThresholdBits::ThresholdBits(const OpSpec& spec, const Shape& input, const Kernels& kernels)
    : PixelwiseOp(codes_like(input, 1)),
      kernels_(kernels),
      limits_(input.channels + kTileChannels),
      flips_(limits_.size()) {
  const Thresholds<float> thresholds(spec, input.channels);
  for (int64_t c = 0; c < input.channels; ++c) {
    flips_[c] = thresholds.falling(c) ? 0x80000000u : 0u;
    limits_[c] = flipped(*thresholds.of(c), flips_[c]);
  }
}

void ThresholdBits::apply(const Operands& operands, const Part& part) const {
  const int64_t channels = output().channels, words = output().words(), channel = part.channel;
  for (int64_t pixel = part.first; pixel < part.first + part.count; ++pixel)
    kernels_.float_bits(operands.input<float>() + pixel * channels + channel, limits_.data() + channel,
                        flips_.data() + channel, part.end - channel,
                        operands.result<uint64_t>() + pixel * words + channel / 64);
}

std::unique_ptr<Op> make_threshold(const OpSpec& spec, const Shape& input, const Kernels& kernels) {
  if (spec.bits == 1) return std::make_unique<ThresholdBits>(spec, input, kernels);
  return std::make_unique<ThresholdCodes>(spec, input, kernels);
}

}  // namespace lowbit
