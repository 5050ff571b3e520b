#include "output_transform.h"

#include <numeric>

#include "ramp_table.h"

namespace lowbit {
namespace {

Shape codes_like(const Shape& input, int64_t bits) {
  require(input.is_float(), "threshold needs float32 as input");
  return {input.height, input.width, input.channels, static_cast<int>(bits)};
}

class ThresholdCodes final : public PixelwiseOp {
 public:
  ThresholdCodes(const OpSpec& spec, const Shape& input, const Kernels& kernels)
      : PixelwiseOp(codes_like(input, spec.bits)), kernels_(kernels), thresholds_(spec, input.channels) {
    if (spec.bits > kMostCounted) {
      const int64_t whole = std::lcm(kRampValues, input.channels);
      std::vector<int64_t> row(whole <= kMostRampValues ? whole : round_up(kRampValues, input.channels));
      for (size_t i = 0; i < row.size(); ++i) row[i] = static_cast<int64_t>(i) % input.channels;
      ramp_ = RampTable<float>::fit(thresholds_, row);
      return;
    }
    limits_.resize(thresholds_.levels() * input.channels);
    flips_.resize(input.channels);
    for (int64_t c = 0; c < input.channels; ++c) {
      flips_[c] = flip_of<float>(thresholds_.falling(c));
      for (int level = 0; level < thresholds_.levels(); ++level)
        limits_[level * input.channels + c] = flipped(thresholds_.of(c)[level], flips_[c]);
    }
  }

  const char* kernel(bool) const override { return ramp_ ? "float_ramp" : limits_.empty() ? "" : "float_codes"; }

  void apply(const Operands& operands, const Part& part) const override {
    const int64_t channels = output().channels, count = part.end - part.channel;
    const float* x = operands.input<float>() + part.first * channels + part.channel;
    uint8_t* codes = operands.result<uint8_t>() + part.first * channels + part.channel;
    if (ramp_ && count == channels) {  // as many pixels at once as the table goes on for
      const int64_t size = static_cast<int64_t>(ramp_->size()), end = part.count * channels;
      for (int64_t i = 0; i < end; i += size)
        kernels_.float_ramp(x + i, ramp_->from(0), std::min(size, end - i), codes + i);
      return;
    }
    for (int64_t p = 0; p < part.count; ++p, x += channels, codes += channels) {
      if (ramp_)
        kernels_.float_ramp(x, ramp_->from(part.channel), count, codes);
      else if (limits_.empty())
        for (int64_t c = 0; c < count; ++c) codes[c] = thresholds_.code(x[c], part.channel + c);
      else
        kernels_.float_codes(x, limits_.data() + part.channel, channels, flips_.data() + part.channel, count,
                             thresholds_.levels(), codes);
    }
  }

 private:
  // So many at least, that pixels of few channels are not done one by one, and a multiple of it where that is not much.
  static constexpr int64_t kRampValues = 128, kMostRampValues = 1024;

  const Kernels& kernels_;
  Thresholds<float> thresholds_;
  std::optional<RampTable<float>> ramp_;  // of pixels; where there is none, thresholds are counted or searched
  Buffer<float> limits_;                  // [level][channel], flipped; empty where they are not counted
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
    flips_[c] = flip_of<float>(thresholds.falling(c));
    limits_[c] = flipped(*thresholds.of(c), flips_[c]);
  }
}

void ThresholdBits::apply(const Operands& operands, const Part& part) const {
  const int64_t channels = output().channels, words = output().words();
  kernels_.float_bits(
      operands.input<float>() + part.first * channels + part.channel, limits(part.channel),
      {static_cast<size_t>(part.count), static_cast<size_t>(part.end - part.channel), static_cast<size_t>(channels)},
      operands.result<uint64_t>() + part.first * words + part.channel / 64, words);
}

std::unique_ptr<Op> make_threshold(const OpSpec& spec, const Shape& input, const Kernels& kernels) {
  if (spec.bits == 1) return std::make_unique<ThresholdBits>(spec, input, kernels);
  return std::make_unique<ThresholdCodes>(spec, input, kernels);
}

}  // namespace lowbit
