// The mean of |x| over a convolution's window and a group's channels; zeros around the image count.
#include <algorithm>
#include <cmath>

#include "op.h"

namespace lowbit {
namespace {

class AbsMean final : public Op {
 public:
  AbsMean(const OpSpec& spec, const Shape& input, const Window& window)
      : Op({window.height, window.width, spec.groups}),
        input_(input),
        window_(window),
        depth_(input.channels / spec.groups) {}

  int64_t scratch_bytes() const override { return input_.pixels() * groups() * static_cast<int64_t>(sizeof(float)); }

  // First the sums over each pixel's channels, one map per group, then the windows of these maps.
  void run(const Call& call) const override {
    auto* maps = static_cast<float*>(call.scratch);
    call.pool.run(static_cast<size_t>(call.batch * input_.height), [&](size_t row, int) {
      const float* x = call.input<float>() + row * input_.width * input_.channels;
      float* sums = maps + row * input_.width * groups();
      for (int64_t i = 0; i < input_.width * groups(); ++i, x += depth_) sums[i] = magnitude(x);
    });
    const double count = static_cast<double>(window_.kernel[0] * window_.kernel[1] * depth_);
    call.pool.run(static_cast<size_t>(call.batch * window_.height), [&](size_t row, int) {
      const float* map = maps + row / window_.height * input_.pixels() * groups();
      float* y = call.result<float>() + row * window_.width * groups();
      for (int64_t column = 0; column < window_.width; ++column)
        for (int64_t group = 0; group < groups(); ++group)
          *y++ = static_cast<float>(sum(map + group, row % window_.height, column) / count);
      call.done({static_cast<int64_t>(row) * window_.width, window_.width, 0, groups()});
    });
  }

 private:
  int64_t groups() const { return output().channels; }

  // In lanes, so that the compiler can use vectors: the order is the same on every machine.
  float magnitude(const float* x) const {
    constexpr int64_t kLanes = 16;
    float lanes[kLanes] = {};
    int64_t c = 0;
    for (; c + kLanes <= depth_; c += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += std::fabs(x[c + lane]);
    double total = 0;
    for (; c < depth_; ++c) total += std::fabs(x[c]);
    for (const float lane : lanes) total += lane;
    return static_cast<float>(total);
  }

  double sum(const float* map, int64_t row, int64_t column) const {
    double total = 0;
    for (int64_t ky = 0; ky < window_.kernel[0]; ++ky) {
      const int64_t y = row * window_.stride[0] - window_.padding[0] + ky * window_.dilation[0];
      if (y < 0 || y >= input_.height) continue;
      for (int64_t kx = 0; kx < window_.kernel[1]; ++kx) {
        const int64_t x = column * window_.stride[1] - window_.padding[1] + kx * window_.dilation[1];
        if (x >= 0 && x < input_.width) total += map[(y * input_.width + x) * groups()];
      }
    }
    return total;
  }

  Shape input_;
  Window window_;
  int64_t depth_;  // channels of one group
};

}  // namespace

std::unique_ptr<Op> make_abs_mean(const OpSpec& spec, const Shape& input) {
  require(input.is_float(), "abs_mean needs float32 as input");
  require(spec.groups >= 1 && spec.groups <= input.channels && input.channels % spec.groups == 0,
          "the groups divide the channels unevenly");
  const Window window(spec, input);
  require(spec.kernel[0] * spec.kernel[1] <= kMaxTaps / (input.channels / spec.groups), "the mean has too many terms");
  return std::make_unique<AbsMean>(spec, input, window);
}

}  // namespace lowbit
