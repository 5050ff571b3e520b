#include "output_transform.h"

#include <bit>

namespace lowbit {
namespace {

Shape codes_like(const Shape& input, int64_t bits) {
  require(input.is_float(), "threshold needs float32 as input");
  return {input.height, input.width, input.channels, static_cast<int>(bits)};
}

class ThresholdCodes final : public Op {
 public:
  ThresholdCodes(const OpSpec& spec, const Shape& input)
      : Op(codes_like(input, spec.bits)), thresholds_(spec, input.channels) {}

  void run(const Call& call) const override {
    const int64_t channels = output().channels, length = output().width * channels;
    call.pool.run(static_cast<size_t>(call.batch * output().height), [&](size_t row, int) {
      const float* x = call.input<float>() + row * length;
      uint8_t* codes = call.result<uint8_t>() + row * length;
      for (int64_t i = 0; i < length; ++i) codes[i] = thresholds_.code(x[i], i % channels);
    });
  }

 private:
  Thresholds<float> thresholds_;
};

}  // namespace

ThresholdBits::ThresholdBits(const OpSpec& spec, const Shape& input, const Kernels& kernels)
    : Op(codes_like(input, 1)), kernels_(kernels), limits_(input.channels + kTileChannels), flips_(limits_.size()) {
  const Thresholds<float> thresholds(spec, input.channels);
  for (int64_t c = 0; c < input.channels; ++c) {
    flips_[c] = thresholds.falling(c) ? 0x80000000u : 0u;
    limits_[c] = std::bit_cast<float>(std::bit_cast<uint32_t>(*thresholds.of(c)) ^ flips_[c]);
  }
}

void ThresholdBits::run(const Call& call) const {
  const int64_t channels = output().channels, words = output().words(), width = output().width;
  call.pool.run(static_cast<size_t>(call.batch * output().height), [&](size_t row, int) {
    for (int64_t pixel = row * width, end = pixel + width; pixel < end; ++pixel)
      kernels_.float_bits(call.input<float>() + pixel * channels, limits_.data(), flips_.data(), channels,
                          call.result<uint64_t>() + pixel * words);
  });
}

std::unique_ptr<Op> make_threshold(const OpSpec& spec, const Shape& input, const Kernels& kernels) {
  if (spec.bits == 1) return std::make_unique<ThresholdBits>(spec, input, kernels);
  return std::make_unique<ThresholdCodes>(spec, input);
}

}  // namespace lowbit
