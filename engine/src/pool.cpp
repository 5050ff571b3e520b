// Pooling. Padded positions never take part, except as zeros in an average that counts them.
#include <algorithm>

#include "op.h"

namespace lowbit {
namespace {

Shape pooled(const Window& window, const Shape& input) {
  return {window.height, window.width, input.channels, input.bits};
}

// Slides the window and calls visit(first pixel or not, input pixel's elements, output pixel's elements) for each pixel
// under it, then finish(output pixel's elements, pixels under it). A pixel is `step` elements of type T.
template <class T>
class SlidingWindow {
 public:
  SlidingWindow(const OpSpec& spec, const Shape& input, int64_t step)
      : window(spec, input), input_(input), step_(step) {
    for (int axis = 0; axis < 2; ++axis) {
      require(window.dilation[axis] == 1, "a pool has no dilation");
      require(2 * window.padding[axis] <= window.kernel[axis], "padding may be at most half of the kernel");
    }
  }

  template <class Visit, class Finish>
  void run(const Call& call, const Visit& visit, const Finish& finish) const {
    call.pool.run(static_cast<size_t>(call.batch * window.height), [&](size_t row, int) {
      const T* image = call.input<T>() + row / window.height * input_.pixels() * step_;
      T* y = call.result<T>() + row * window.width * step_;
      const auto [top, bottom] = covered(0, row % window.height, input_.height);
      for (int64_t column = 0; column < window.width; ++column, y += step_) {
        const auto [left, right] = covered(1, column, input_.width);
        bool first = true;
        for (int64_t iy = top; iy < bottom; ++iy)
          for (int64_t ix = left; ix < right; ++ix, first = false)
            visit(first, image + (iy * input_.width + ix) * step_, y);
        finish(y, (bottom - top) * (right - left));
      }
    });
  }

  const Window window;

 private:
  // Input rows (axis 0) or columns (axis 1) under the window at this output position: never none, as padding is small.
  std::pair<int64_t, int64_t> covered(int axis, int64_t position, int64_t extent) const {
    const int64_t start = position * window.stride[axis] - window.padding[axis];
    return {std::max<int64_t>(start, 0), std::min(start + window.kernel[axis], extent)};
  }

  Shape input_;
  int64_t step_;
};

// Maximum of floats, or of codes of 2 to 8 bits, where a falling channel takes the minimum.
template <class T>
class MaxPool final : public Op {
 public:
  MaxPool(const OpSpec& spec, const Shape& input, std::vector<uint8_t> falling)
      : Op(pooled(Window(spec, input), input)), window_(spec, input, input.channels), falling_(std::move(falling)) {}

  void run(const Call& call) const override {
    const int64_t channels = output().channels;
    window_.run(
        call,
        [&](bool first, const T* x, T* y) {
          if (first)
            std::copy_n(x, channels, y);
          else if (falling_.empty())
            for (int64_t c = 0; c < channels; ++c) y[c] = std::max(y[c], x[c]);
          else
            for (int64_t c = 0; c < channels; ++c) y[c] = falling_[c] ? std::min(y[c], x[c]) : std::max(y[c], x[c]);
        },
        [](T*, int64_t) {});
  }

 private:
  SlidingWindow<T> window_;
  std::vector<uint8_t> falling_;
};

// The maximum of bits is their OR, the minimum their AND = not OR of not.
class MaxPoolBits final : public Op {
 public:
  MaxPoolBits(const OpSpec& spec, const Shape& input, const std::vector<uint8_t>& falling)
      : Op(pooled(Window(spec, input), input)), window_(spec, input, input.words()), falling_(input.words()) {
    for (int64_t c = 0; c < input.channels; ++c) falling_[c / 64] |= static_cast<uint64_t>(falling[c] != 0) << c % 64;
  }

  void run(const Call& call) const override {
    const int64_t words = output().words();
    window_.run(
        call,
        [&](bool first, const uint64_t* x, uint64_t* y) {
          for (int64_t w = 0; w < words; ++w) y[w] = (first ? 0 : y[w]) | (x[w] ^ falling_[w]);
        },
        [&](uint64_t* y, int64_t) {
          for (int64_t w = 0; w < words; ++w) y[w] ^= falling_[w];
        });
  }

 private:
  SlidingWindow<uint64_t> window_;
  std::vector<uint64_t> falling_;
};

class AvgPool final : public Op {
 public:
  AvgPool(const OpSpec& spec, const Shape& input)
      : Op(pooled(Window(spec, input), input)),
        window_(spec, input, input.channels),
        count_padding_(spec.count_include_pad) {
    require(input.is_float(), "avg_pool needs float32 as input");
  }

  void run(const Call& call) const override {
    const int64_t channels = output().channels;
    window_.run(
        call,
        [&](bool first, const float* x, float* y) {
          for (int64_t c = 0; c < channels; ++c) y[c] = first ? x[c] : y[c] + x[c];
        },
        [&](float* y, int64_t covered) {
          const auto& kernel = window_.window.kernel;
          const auto count = static_cast<float>(count_padding_ ? kernel[0] * kernel[1] : covered);
          for (int64_t c = 0; c < channels; ++c) y[c] /= count;
        });
  }

 private:
  SlidingWindow<float> window_;
  bool count_padding_;
};

}  // namespace

std::unique_ptr<Op> make_pool(const OpSpec& spec, const Shape& input) {
  if (spec.op == "avg_pool") return std::make_unique<AvgPool>(spec, input);
  if (input.is_float()) return std::make_unique<MaxPool<float>>(spec, input, std::vector<uint8_t>());
  const auto tensor_falling = tensor<uint8_t>(spec, "falling", {input.channels});
  std::vector<uint8_t> falling(tensor_falling.begin(), tensor_falling.end());
  if (input.bits == 1) return std::make_unique<MaxPoolBits>(spec, input, falling);
  return std::make_unique<MaxPool<uint8_t>>(spec, input, std::move(falling));
}

}  // namespace lowbit
