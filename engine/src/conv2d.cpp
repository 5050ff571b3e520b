// Convolutions in float32: of floats, and of codes that stand for the levels of a table.
#include "convolution.h"
#include "output_transform.h"

namespace lowbit {
namespace {

bool has_float_weight(const OpSpec& spec) {
  return !has_tensor(spec, "weight_bits") && !has_tensor(spec, "weight_codes");
}

// Of floats, or of codes that stand for the levels of a table: these are looked up when the planes are filled.
class Conv2d final : public Op {
 public:
  Conv2d(const OpSpec& spec, const Shape& input, const Window& window, const Kernels& kernels)
      : Op({window.height, window.width, spec.channels}),
        kernels_(kernels),
        input_(input),
        levels_(levels(spec, input)),
        product_(make_product(spec, input, window)),
        epilogue_(spec, has_float_weight(spec) ? nullptr : "weight_scale") {}

  bool makes_strips() const override { return true; }
  int64_t scratch_bytes() const override { return product_.planes_bytes(); }
  int64_t thread_scratch_bytes() const override { return product_.block_bytes(); }
  const char* kernel(bool joined) const override { return joined ? "float_tile_bits" : "float_tile"; }

  void run(const Call& call) const override {
    fill_planes(call);
    product_.run(
        call, kNoBegin, kOneRow,
        [&](const FloatTile& tiles, int64_t pixel, const int64_t*, int64_t group, int64_t panel) {
          product_.for_full_panels(tiles, panel, [&](const FloatTile& tile, int64_t number) {
            epilogue_.emit(call.result<float>(), pixel, tile.count, group, number,
                           [&](const FloatOutput& output) { kernels_.float_tile(tile, output); });
          });
        },
        kernels_.float_panels);
  }

  bool joins(const PixelwiseOp& next) const override { return dynamic_cast<const ThresholdBits*>(&next) != nullptr; }

  void run_joined(const PixelwiseOp& next, const Call& call) const override {
    const auto& threshold = dynamic_cast<const ThresholdBits&>(next);
    fill_planes(call);
    const int64_t words = next.output().words(), group_channels = product_.group_channels();
    product_.run(
        call, clearing(call, next.output()), kOneRow,
        [&](const FloatTile& tiles, int64_t pixel, const int64_t*, int64_t group, int64_t panel) {
          product_.for_full_panels(tiles, panel, [&](const FloatTile& tile, int64_t number) {
            const int64_t inside = number * kTileChannels, first = group * group_channels + inside;
            const int64_t width = std::min<int64_t>(tile.panels * kTileChannels, group_channels - inside);
            const auto wanted = static_cast<uint32_t>((uint64_t{1} << width) - 1);
            uint32_t bits[kTilePixels];
            kernels_.float_tile_bits(tile, epilogue_.tile(nullptr, group, number), threshold.limits(first), bits);
            for (int p = 0; p < tile.count; ++p) bits[p] &= wanted;
            add_bits(call.result<uint64_t>() + pixel * words, words, first, bits, tile.count);
          });
        },
        kernels_.float_panels);
  }

 private:
  void fill_planes(const Call& call) const {
    product_.fill_planes(call, input_, [&](int64_t row, float* line, const int64_t* columns) {
      const int64_t first = row * input_.width, plane_size = product_.plane_size();
      const auto fill = [&](const auto& value) {
        for (int64_t c = 0; c < input_.channels; ++c)
          for (int64_t i = 0; i < input_.width; ++i) line[c * plane_size + columns[i]] = value(first + i, c);
      };
      if (input_.is_float())
        fill([x = call.input<float>(), this](int64_t pixel, int64_t c) { return x[pixel * input_.channels + c]; });
      else
        fill([&](int64_t pixel, int64_t c) { return levels_[code_at(call, input_, pixel, c)]; });
    });
  }

  static std::vector<float> levels(const OpSpec& spec, const Shape& input) {
    if (input.is_float()) return {};
    const auto table = tensor<float>(spec, "levels", {int64_t{1} << input.bits});
    return {table.begin(), table.end()};
  }

  static Product<float> make_product(const OpSpec& spec, const Shape& input, const Window& window) {
    const int64_t depth = group_depth(spec, input, window), taps = spec.kernel[0] * spec.kernel[1],
                  words = ceil_div(depth, 64);
    if (has_tensor(spec, "weight_codes")) {
      const WeightCodes codes(spec, taps * depth);
      return {spec, input, window, depth,
              [&](int64_t o, int64_t tap, int64_t d) { return static_cast<float>(codes.at(o, tap * depth + d)); }};
    }
    if (has_float_weight(spec)) {
      const auto weight = tensor<float>(spec, "weight", {spec.channels, spec.kernel[0], spec.kernel[1], depth});
      return {spec, input, window, depth,
              [&](int64_t o, int64_t tap, int64_t d) { return weight[(o * taps + tap) * depth + d]; }};
    }
    const auto bits = tensor<uint64_t>(spec, "weight_bits", {spec.channels, spec.kernel[0], spec.kernel[1], words});
    return {spec, input, window, depth, [&](int64_t o, int64_t tap, int64_t d) {
              return (bits[(o * taps + tap) * words + d / 64] >> d % 64 & 1) != 0 ? 1.0f : -1.0f;
            }};
  }

  const Kernels& kernels_;
  Shape input_;
  std::vector<float> levels_;  // by code; empty for floats
  Product<float> product_;
  FloatEpilogue epilogue_;
};

}  // namespace

std::unique_ptr<Op> make_conv2d(const OpSpec& spec, const Shape& input, const Kernels& kernels) {
  require(input.is_float(), "conv2d needs float32 as input");
  return std::make_unique<Conv2d>(spec, input, Window(spec, input), kernels);
}

std::unique_ptr<Op> make_table_conv2d(const OpSpec& spec, const Shape& input, const Kernels& kernels) {
  require(!input.is_float(), "table_conv2d needs codes as input");
  return std::make_unique<Conv2d>(spec, input, Window(spec, input), kernels);
}

}  // namespace lowbit
