// Pooling. Padded positions never take part, except as zeros in an average that counts them.
#include <algorithm>

#include "op.h"

namespace lowbit {
namespace {

// Slides a window over pixels of `step` elements of type T.
template <class T>
class SlidingWindow : public PoolOp {
 public:
  SlidingWindow(const OpSpec& spec, const Shape& input, int64_t step)
      : PoolOp(Window(spec, input), input), step_(step) {
    for (int axis = 0; axis < 2; ++axis) {
      require(window.dilation[axis] == 1, "a pool has no dilation");
      require(2 * window.padding[axis] <= window.kernel[axis], "padding may be at most half of the kernel");
    }
  }

 protected:
  // For each output pixel, calls combine(taps, count, y) with the input pixels under the window, in the order of
  // memory, and then finish(y, their number). Of a large window come some at a time, y as the first of the next.
  template <class Combine, class Finish>
  void slide(const Call& call, const Combine& combine, const Finish& finish) const {
    const Strip strip = call.strip == nullptr ? Strip{0, call.batch * window.height, 0, 0} : *call.strip;
    call.pool.run(static_cast<size_t>(strip.end - strip.first), [&](size_t number, int) {
      const int64_t row = strip.first + static_cast<int64_t>(number), first = (row - strip.output_first) * window.width;
      const T* image = call.input<T>() + row / window.height * input_.pixels() * step_;
      T* y = call.result<T>() + first * step_;
      const auto [top, bottom] = covered(0, row % window.height, input_.height);
      const int64_t step = step_, row_step = input_.width * step;  // in registers: a code may be written over members
      const T* taps[kMostTaps];
      for (int64_t column = 0; column < window.width; ++column, y += step) {
        const auto [left, right] = covered(1, column, input_.width);
        const T* line = image + (top - strip.input_first) * row_step;
        size_t count = 0;
        for (int64_t iy = top; iy < bottom; ++iy, line += row_step) {
          const T* end = line + right * step;
          for (const T* tap = line + left * step; tap != end; tap += step) {
            if (count == kMostTaps) {
              combine(taps, count, y);
              taps[0] = y;
              count = 1;
            }
            taps[count++] = tap;
          }
        }
        combine(taps, count, y);
        finish(y, (bottom - top) * (right - left));
      }
      call.done({first, window.width, 0, input_.channels});
    });
  }

 private:
  static constexpr size_t kMostTaps = 64;

  // Input rows (axis 0) or columns (axis 1) under the window at this output position: never none, as padding is small.
  std::pair<int64_t, int64_t> covered(int axis, int64_t position, int64_t extent) const {
    const int64_t start = position * window.stride[axis] - window.padding[axis];
    return {std::max<int64_t>(start, 0), std::min(start + window.kernel[axis], extent)};
  }

  int64_t step_;
};

constexpr auto kAsItIs = [](auto*, int64_t) {};

// Of floats. Where a channel falls it takes the minimum: the opposite of the maximum of the opposites.
class MaxPool final : public SlidingWindow<float> {
 public:
  MaxPool(const OpSpec& spec, const Shape& input, const Kernels& kernels)
      : SlidingWindow(spec, input, input.channels), rows_(*kernels.rows), flips_(input.channels, 0.0f) {
    if (!has_tensor(spec, "falling")) return;
    const auto falling = tensor<uint8_t>(spec, "falling", {input.channels});
    for (int64_t c = 0; c < input.channels; ++c) flips_[c] = falling[c] != 0 ? -0.0f : 0.0f;
  }

  void run(const Call& call) const override {
    slide(
        call,
        [&](const float* const* taps, size_t count, float* y) {
          rows_.maximum(taps, count, flips_.data(), y, output().channels);
        },
        kAsItIs);
  }

 private:
  const RowKernels& rows_;
  std::vector<float> flips_;
};

// Of codes, in words of 64 bits or bytes, in the same way.
template <class T>
class MaxPoolCodes final : public SlidingWindow<T> {
 public:
  MaxPoolCodes(const OpSpec& spec, const Shape& input, std::vector<T> falling)
      : SlidingWindow<T>(spec, input, static_cast<int64_t>(falling.size())), falling_(std::move(falling)) {}

  void run(const Call& call) const override {
    this->slide(
        call,
        [&](const T* const* taps, size_t count, T* y) {
          const size_t size = falling_.size();  // channel after channel in each step, which the compiler makes wide
          const T* falling = falling_.data();
          for (size_t i = 0; i < size; ++i) y[i] = taps[0][i] ^ falling[i];
          for (size_t tap = 1; tap < count; ++tap) {
            const T* x = taps[tap];
            for (size_t i = 0; i < size; ++i) y[i] = larger(y[i], static_cast<T>(x[i] ^ falling[i]));
          }
          for (size_t i = 0; i < size; ++i) y[i] ^= falling[i];
        },
        kAsItIs);
  }

 private:
  static uint8_t larger(uint8_t a, uint8_t b) { return std::max(a, b); }
  static uint64_t larger(uint64_t a, uint64_t b) { return a | b; }  // of bits

  std::vector<T> falling_;  // all ones where the channel falls
};

class AvgPool final : public SlidingWindow<float> {
 public:
  AvgPool(const OpSpec& spec, const Shape& input, const Kernels& kernels)
      : SlidingWindow(spec, input, input.channels), rows_(*kernels.rows), count_padding_(spec.count_include_pad) {
    require(input.is_float(), "avg_pool needs float32 as input");
  }

  void run(const Call& call) const override {
    const auto channels = static_cast<size_t>(output().channels);
    const int64_t taps = window.kernel[0] * window.kernel[1];
    slide(
        call, [&](const float* const* taps, size_t count, float* y) { rows_.sum(taps, count, y, channels); },
        [&](float* y, int64_t covered) {
          rows_.divide(y, static_cast<float>(count_padding_ ? taps : covered), y, {1, channels, channels});
        });
  }

 private:
  const RowKernels& rows_;
  bool count_padding_;
};

}  // namespace

std::unique_ptr<Op> make_pool(const OpSpec& spec, const Shape& input, const Kernels& kernels) {
  if (spec.op == "avg_pool") return std::make_unique<AvgPool>(spec, input, kernels);
  if (input.is_float()) return std::make_unique<MaxPool>(spec, input, kernels);
  const auto falling = tensor<uint8_t>(spec, "falling", {input.channels});
  if (input.bits == 1) {
    std::vector<uint64_t> words(input.words());
    for (int64_t c = 0; c < input.channels; ++c) words[c / 64] |= static_cast<uint64_t>(falling[c] != 0) << c % 64;
    return std::make_unique<MaxPoolCodes<uint64_t>>(spec, input, std::move(words));
  }
  std::vector<uint8_t> bytes(input.channels);
  for (int64_t c = 0; c < input.channels; ++c) bytes[c] = falling[c] != 0 ? 0xff : 0;
  return std::make_unique<MaxPoolCodes<uint8_t>>(spec, input, std::move(bytes));
}

}  // namespace lowbit
