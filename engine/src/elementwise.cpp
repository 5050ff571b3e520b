// Float ops that take each element by itself, with at most one other. Every step is one float32 rounding.
#include <algorithm>
#include <cmath>

#include "op.h"

namespace lowbit {
namespace {

template <class Function>
class Elementwise final : public Op {
 public:
  Elementwise(const Shape& shape, Function function) : Op(shape), function_(std::move(function)) {}

  void run(const Call& call) const override {
    const int64_t channels = output().channels, width = output().width;
    call.pool.run(static_cast<size_t>(call.batch * output().height), [&](size_t row, int) {
      for (int64_t first = row * width * channels, end = first + width * channels; first < end; first += channels)
        function_(call, first, channels);
    });
  }

 private:
  Function function_;  // (call, first element of a pixel, channels)
};

template <class Function>
std::unique_ptr<Op> make(const Shape& shape, Function function) {
  return std::make_unique<Elementwise<Function>>(shape, std::move(function));
}

}  // namespace

std::unique_ptr<Op> make_multiply(const OpSpec& spec, Inputs inputs) {
  const Shape &shape = inputs[0], &factors = inputs[1];
  require(shape.is_float() && factors.is_float(), "inputs must be float32");
  require(shape.height == factors.height && shape.width == factors.width && shape.channels % factors.channels == 0,
          "the factors do not fit");
  return make(shape, [bias = bias_of(spec, shape.channels), groups = factors.channels](const Call& call, int64_t first,
                                                                                       int64_t channels) {
    const float *x = call.input<float>(0) + first, *factor = call.input<float>(1) + first / channels * groups;
    float* y = call.result<float>() + first;
    const int64_t size = channels / groups;
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t c = group * size; c < (group + 1) * size; ++c) y[c] = x[c] * factor[group] + bias[c];
  });
}

std::unique_ptr<Op> make_elementwise(const OpSpec& spec, Inputs inputs) {
  const Shape& shape = inputs[0];
  for (const Shape& input : inputs) require(input.is_float() && input == shape, "inputs must be float32 of one shape");
  if (spec.op == "add")
    return make(shape, [](const Call& call, int64_t first, int64_t channels) {
      const float *a = call.input<float>(0) + first, *b = call.input<float>(1) + first;
      float* y = call.result<float>() + first;
      for (int64_t c = 0; c < channels; ++c) y[c] = a[c] + b[c];
    });
  if (spec.op == "affine") {
    const auto scale = tensor<float>(spec, "scale", {shape.channels});
    const auto shift = tensor<float>(spec, "shift", {shape.channels});
    return make(shape, [scale = std::vector<float>(scale.begin(), scale.end()),
                        shift = std::vector<float>(shift.begin(), shift.end())](const Call& call, int64_t first,
                                                                                int64_t channels) {
      const float* x = call.input<float>() + first;
      float* y = call.result<float>() + first;
      for (int64_t c = 0; c < channels; ++c) y[c] = x[c] * scale[c] + shift[c];
    });
  }
  if (spec.op == "prelu") {
    const auto slope = tensor<float>(spec, "slope", {shape.channels});
    return make(shape, [slope = std::vector<float>(slope.begin(), slope.end())](const Call& call, int64_t first,
                                                                                int64_t channels) {
      const float* x = call.input<float>() + first;
      float* y = call.result<float>() + first;
      for (int64_t c = 0; c < channels; ++c) y[c] = x[c] >= 0.0f ? x[c] : slope[c] * x[c];
    });
  }
  const bool relu = spec.op == "relu";
  const float low = relu ? 0.0f : static_cast<float>(spec.min);
  const float high = relu ? INFINITY : static_cast<float>(spec.max);
  require(low <= high, "min is above max");
  return make(shape, [low, high](const Call& call, int64_t first, int64_t channels) {
    const float* x = call.input<float>() + first;
    float* y = call.result<float>() + first;
    for (int64_t c = 0; c < channels; ++c) y[c] = std::min(std::max(x[c], low), high);
  });
}

}  // namespace lowbit
