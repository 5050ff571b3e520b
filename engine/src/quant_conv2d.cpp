// Convolutions of codes on any integer grid.
#include <optional>

#include "convolution.h"
#include "output_transform.h"

namespace lowbit {
namespace {

constexpr int64_t kMaxSum = (int64_t{1} << 31) - 2;

// Codes become the integers that they stand for when the planes are filled, so that the border's zeros add nothing to a
// sum, whatever the grid.
class QuantConv2d final : public Op {
 public:
  QuantConv2d(const OpSpec& spec, const Shape& input, const Window& window, const Kernels& kernels)
      : Op({window.height, window.width, spec.channels,
            has_tensor(spec, "thresholds") ? static_cast<int>(spec.bits) : 0}),
        kernels_(kernels),
        input_(input),
        grid_(spec.input_multiplier, spec.input_offset, input.bits),
        product_(make_product(spec, input, window, grid_)) {
    if (has_tensor(spec, "thresholds"))
      thresholds_.emplace(spec, spec.channels);
    else
      epilogue_.emplace(spec, "scale");
  }

  int64_t scratch_bytes() const override { return product_.planes_bytes(); }
  int64_t thread_scratch_bytes() const override { return product_.block_bytes(); }
  const char* kernel(bool) const override { return "integer_sums"; }

  void run(const Call& call) const override {
    fill_planes(call);
    const auto clear = [&](int64_t first, int64_t count, int64_t channel, int64_t end) {
      if (output().bits == 1) clear_bits(call, output(), first, count, channel, end);
    };
    product_.run(
        call, clear, [&](const IntegerTile& tile, int64_t pixel, const int64_t*, int64_t group, int64_t panel) {
          int32_t sums[kTilePixels][kTileChannels];
          kernels_.integer_sums(tile, sums);
          if (thresholds_)
            put_codes(call, sums, pixel, tile.count, group, panel);
          else
            epilogue_->emit(call.result<float>(), pixel, tile.count, group, panel, [&](const FloatOutput& out) {
              for (int p = 0; p < tile.count; ++p)
                for (int c = 0; c < kTileChannels; ++c)
                  out.output[p * out.stride + c] = static_cast<float>(sums[p][c]) * out.scale[c] + out.bias[c];
            });
        });
  }

 private:
  static Product<int16_t> make_product(const OpSpec& spec, const Shape& input, const Window& window,
                                       const IntegerGrid& grid) {
    const int64_t depth = group_depth(spec, input, window), terms = spec.kernel[0] * spec.kernel[1] * depth;
    const WeightCodes codes(spec, terms);
    require(terms * grid.largest * codes.largest() <= kMaxSum, "a sum may overflow an int32");
    return {spec, input, window, depth,
            [&](int64_t o, int64_t tap, int64_t d) { return static_cast<int16_t>(codes.at(o, tap * depth + d)); }};
  }

  void fill_planes(const Call& call) const {
    product_.fill_planes(call, input_, [&](int64_t row, int16_t* line, int64_t plane_size) {
      const int64_t first = row * input_.width;
      for (int64_t i = 0; i < input_.width; ++i)
        for (int64_t c = 0; c < input_.channels; ++c)
          line[c * plane_size + i] = static_cast<int16_t>(grid_.integer(code_at(call, input_, first + i, c)));
    });
  }

  void put_codes(const Call& call, const int32_t (*sums)[kTileChannels], int64_t pixel, int count, int64_t group,
                 int64_t panel) const {
    const int64_t inside = panel * kTileChannels, first = group * product_.group_channels() + inside;
    const int64_t end = first + std::min<int64_t>(kTileChannels, product_.group_channels() - inside);
    for (int p = 0; p < count; ++p)
      for (int64_t c = first; c < end; ++c) {
        const uint8_t code = thresholds_->code(sums[p][c - first], c);
        if (output().bits == 1)
          call.result<uint64_t>()[(pixel + p) * output().words() + c / 64] |= uint64_t{code} << c % 64;
        else
          call.result<uint8_t>()[(pixel + p) * output().channels + c] = code;
      }
  }

  const Kernels& kernels_;
  Shape input_;
  IntegerGrid grid_;
  Product<int16_t> product_;
  std::optional<Thresholds<int32_t>> thresholds_;  // for codes
  std::optional<FloatEpilogue> epilogue_;          // for floats
};

}  // namespace

std::unique_ptr<Op> make_quant_conv2d(const OpSpec& spec, const Shape& input, const Kernels& kernels) {
  require(!input.is_float(), "quant_conv2d needs codes as input");
  return std::make_unique<QuantConv2d>(spec, input, Window(spec, input), kernels);
}

}  // namespace lowbit
