// Float ops that take each element by itself, with at most one other. Every step is one float32 rounding.
#include <algorithm>
#include <cmath>

#include "op.h"

namespace lowbit {
namespace {

template <class Function>
class Elementwise final : public PixelwiseOp {
 public:
  Elementwise(const Shape& shape, Function function) : PixelwiseOp(shape), function_(std::move(function)) {}

  void apply(const Operands& operands, const Part& part) const override {
    const int64_t channels = output().channels;
    Rows rows{static_cast<size_t>(part.count), static_cast<size_t>(part.end - part.channel),
              static_cast<size_t>(channels)};
    function_(operands, part, part.first * channels + part.channel, rows);
  }

 private:
  Function function_;  // (operands, part, its first element, its rows)
};

template <class Function>
std::unique_ptr<Op> make(const Shape& shape, Function function) {
  return std::make_unique<Elementwise<Function>>(shape, std::move(function));
}

class Sum final : public PixelwiseOp {
 public:
  Sum(const Shape& shape, const Kernels& kernels) : PixelwiseOp(shape), rows_(*kernels.rows) {}

  bool is_sum() const override { return true; }

  void apply(const Operands& operands, const Part& part) const override {
    const int64_t channels = output().channels, start = part.first * channels + part.channel;
    rows_.add(
        operands.input<float>(0) + start, operands.input<float>(1) + start, operands.result<float>() + start,
        {static_cast<size_t>(part.count), static_cast<size_t>(part.end - part.channel), static_cast<size_t>(channels)});
  }

 private:
  const RowKernels& rows_;
};

}  // namespace

std::unique_ptr<Op> make_multiply(const OpSpec& spec, Inputs inputs) {
  const Shape &shape = inputs[0], &factors = inputs[1];
  require(shape.is_float() && factors.is_float(), "inputs must be float32");
  require(shape.height == factors.height && shape.width == factors.width && shape.channels % factors.channels == 0,
          "the factors do not fit");
  return make(shape, [bias = bias_of(spec, shape.channels), groups = factors.channels,
                      size = shape.channels / factors.channels](const Operands& operands, const Part& part, int64_t,
                                                                const Rows& rows) {
    for (int64_t pixel = part.first; pixel < part.first + part.count; ++pixel) {
      const auto start = pixel * static_cast<int64_t>(rows.stride);
      const float *x = operands.input<float>(0) + start, *factor = operands.input<float>(1) + pixel * groups;
      float* y = operands.result<float>() + start;
      for (int64_t group = part.channel / size; group * size < part.end; ++group)
        for (int64_t c = std::max(group * size, part.channel); c < std::min((group + 1) * size, part.end); ++c)
          y[c] = x[c] * factor[group] + bias[c];
    }
  });
}

std::unique_ptr<Op> make_elementwise(const OpSpec& spec, Inputs inputs, const Kernels& kernels) {
  const Shape& shape = inputs[0];
  for (const Shape& input : inputs) require(input.is_float() && input == shape, "inputs must be float32 of one shape");
  if (spec.op == "add") return std::make_unique<Sum>(shape, kernels);
  if (spec.op == "affine") {
    const auto scale = tensor<float>(spec, "scale", {shape.channels});
    const auto shift = tensor<float>(spec, "shift", {shape.channels});
    return make(shape, [affine = kernels.rows->affine, scale = std::vector<float>(scale.begin(), scale.end()),
                        shift = std::vector<float>(shift.begin(), shift.end())](
                           const Operands& operands, const Part& part, int64_t start, const Rows& rows) {
      affine(operands.input<float>() + start, scale.data() + part.channel, shift.data() + part.channel,
             operands.result<float>() + start, rows);
    });
  }
  if (spec.op == "prelu") {
    const auto slope = tensor<float>(spec, "slope", {shape.channels});
    return make(shape, [prelu = kernels.rows->prelu, slope = std::vector<float>(slope.begin(), slope.end())](
                           const Operands& operands, const Part& part, int64_t start, const Rows& rows) {
      prelu(operands.input<float>() + start, slope.data() + part.channel, operands.result<float>() + start, rows);
    });
  }
  const bool relu = spec.op == "relu";
  const float low = relu ? 0.0f : static_cast<float>(spec.min);
  const float high = relu ? INFINITY : static_cast<float>(spec.max);
  require(low <= high, "min is above max");
  return make(shape, [clamp = kernels.rows->clamp, low, high](const Operands& operands, const Part&, int64_t start,
                                                              const Rows& rows) {
    clamp(operands.input<float>() + start, low, high, operands.result<float>() + start, rows);
  });
}

}  // namespace lowbit
