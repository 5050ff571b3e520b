// Convolutions of codes on any integer grid.
#include <optional>

#include "bit_limits.h"
#include "border_cases.h"
#include "byte_blocks.h"
#include "convolution.h"
#include "matrix_blocks.h"
#include "measure.h"
#include "output_transform.h"
#include "plane_blocks.h"
#include "ramp_table.h"

namespace lowbit {
namespace {

constexpr int64_t kMaxSum = (int64_t{1} << 31) - 2;

Shape output_shape(const OpSpec& spec, const Window& window) {
  return {window.height, window.width, spec.channels, has_tensor(spec, "thresholds") ? static_cast<int>(spec.bits) : 0};
}

// The products are of the codes themselves: with integers W of the weight, sum = m * (sum of code * W) + o * (sum of W
// inside the image) for a grid m * code + o. A code of zero adds nothing at the border. Modulo 2^32, which the sum
// fits. Codes are multiplied whole, a byte each, or bit by bit.
class CodeConv2d final : public Op {
 public:
  CodeConv2d(const OpSpec& spec, const Shape& input, const Window& window, const WeightCodes& weights, int64_t depth,
             int64_t largest, const Kernels& kernels)
      : Op(output_shape(spec, window)),
        kernels_(*kernels.bytes),
        input_(input),
        multiplier_(static_cast<int32_t>(spec.input_multiplier)),
        groups_(spec.groups),
        group_channels_(spec.channels / spec.groups),
        panels_(ceil_div(group_channels_, kTileChannels)) {
    if (weights.are_signs() && input.channels % 64 == 0 && MatrixBlocks::fits(spec, input, window, kernels.matrices)) {
      const auto weight_at = [&](int64_t o, int64_t tap, int64_t word) {
        uint64_t ones = 0;
        for (int64_t i = 0; i < 64; ++i) ones |= uint64_t{weights.at(o, tap * depth + word * 64 + i) > 0} << i;
        return ones;
      };
      matrices_.emplace(spec, input, window, weight_at, false, *kernels.matrices);
    } else {
      bytes_.emplace(spec, input, window, depth, weights, largest, kernels_);
      if (PlaneBlocks::fits(spec, input.bits, depth, kernels)) {
        planes_.emplace(spec, input, window, depth, weights, kernels);
        by_planes_ = planes_->products() <= kernels_.planes;
        shape_ = describe(spec, input, output().bits) + std::to_string(spec.weight_width);
      }
    }
    if (spec.input_offset != 0) cases_.emplace(input, window);
    bases_.emplace(spec.channels, spec.groups, 0, cases_ ? cases_->size() : 1);
    if (cases_) fill_bases(window, weights, depth, spec.input_offset);
    if (!has_tensor(spec, "thresholds")) {
      epilogue_.emplace(spec, "scale");
      return;
    }
    const Thresholds<int32_t> thresholds(spec, spec.channels);
    if (spec.bits == 1) {
      bit_limits_.emplace(bit_limits(spec, thresholds, multiplier_));
      if (planes_) plane_limits_.emplace(bit_limits(spec, thresholds, plane_multiplier()));
      return;
    }
    if (spec.bits > kMostCounted) {
      std::vector<int64_t> rows(groups_ * panels_ * kTileChannels, -1);
      for (int64_t c = 0; c < spec.channels; ++c)
        rows[slot(c / group_channels_, c % group_channels_ / kTileChannels) + c % group_channels_ % kTileChannels] = c;
      ramp_ = RampTable<int32_t>::fit(thresholds, rows);
      if (ramp_) return;
    }
    levels_ = thresholds.levels();
    limits_.assign(groups_ * panels_ * levels_ * kTileChannels, 0);
    flips_.emplace(spec.channels, spec.groups, 0);
    for (int64_t c = 0; c < spec.channels; ++c) {
      const uint32_t flip = flip_of<int32_t>(thresholds.falling(c));
      flips_->at(c) = static_cast<int32_t>(flip);
      const int64_t inside = c % group_channels_;
      int32_t* of_channel = limits_.data() + slot(c / group_channels_, inside / kTileChannels) * levels_;
      for (int level = 0; level < levels_; ++level)
        of_channel[level * kTileChannels + inside % kTileChannels] = flipped(thresholds.of(c)[level], flip);
    }
  }

  bool makes_strips() const override { return true; }
  int64_t scratch_bytes() const override {
    if (matrices_) return matrices_->scratch_bytes();
    return std::max(bytes_->scratch_bytes(), planes_ ? planes_->scratch_bytes() : int64_t{0});
  }
  int64_t thread_scratch_bytes() const override {
    if (matrices_) return matrices_->thread_scratch_bytes();
    return std::max(bytes_->thread_scratch_bytes(), planes_ ? planes_->thread_scratch_bytes() : int64_t{0});
  }
  const char* kernel(bool) const override {
    if (matrices_) return "matrices.multiply";
    return by_planes_ ? planes_->kernel() : bytes_->kernel();
  }

  void tune(const Measure& measure) override {
    if (!planes_) return;
    const bool rule = by_planes_;
    const auto choose = [&](bool first) { by_planes_ = first == rule; };
    choose(measure.first_is_faster(*this, input_, shape_, 1, choose));
  }

  void run(const Call& call) const override { run(call, nullptr); }
  bool joins(const PixelwiseOp& next) const override { return epilogue_ && next.is_sum(); }
  void run_joined(const PixelwiseOp&, const Call& call) const override { run(call, call.input<float>(1)); }

 private:
  void run(const Call& call, const float* added) const {
    if (matrices_)
      run_by(*matrices_, multiplier_, bit_limits_, call, added);
    else if (by_planes_)
      run_by(*planes_, plane_multiplier(), plane_limits_, call, added);
    else
      run_by(*bytes_, multiplier_, bit_limits_, call, added);
  }

  // Of a grid and half of one, each at most kMaxInteger.
  int32_t plane_multiplier() const { return multiplier_ * planes_->unit(); }

  // `multiplier`: of the sums, which are of codes; `limits`: of the sums, where bits come of them.
  template <class Blocks>
  void run_by(const Blocks& blocks, int32_t multiplier, const std::optional<BitLimits>& limits, const Call& call,
              const float* added) const {
    blocks.fill(call);
    // All tables by border case have rows of one length.
    const auto row_of = [&](int64_t position) { return cases_ ? bases_->row(cases_->of_position(position)) : 0; };
    if (limits) {
      const auto clear = [&](const Part& part) {
        if (limits->shares_words()) clearing(call, output())(part);
      };
      blocks.run(call, clear, row_of, [&](const SumBlock& block) { limits->write(call, block, kernels_.bits); });
      return;
    }
    blocks.run(call, kNoBegin, row_of, [&](const SumBlock& block) {
      for (int64_t p = 0; p < block.count; p += kTilePixels) {
        const int count = static_cast<int>(std::min<int64_t>(kTilePixels, block.count - p));
        const int64_t pixel = block.first_pixel + p;
        const int32_t* bases[kTilePixels];
        for (int i = 0; i < count; ++i)
          bases[i] = bases_->panel(block.group, block.first_panel) + block.case_rows[p + i];
        for (int64_t number = 0, size; number < block.panels; number += size) {
          const int64_t panel = block.first_panel + number;
          size = epilogue_ ? full_panels(group_channels_, panel, block.panels - number) : 1;
          const IntegerSums sums{block.sums[number] + p, count, multiplier, bases, static_cast<int>(size)};
          if (epilogue_)
            epilogue_->emit(
                call.result<float>(), pixel, count, block.group, panel,
                [&](const FloatOutput& out) { kernels_.floats(sums, out); }, added);
          else
            put_codes(call, sums, pixel, block.group, panel);
          for (int i = 0; i < count; ++i) bases[i] += size * kTileChannels;
        }
      }
    });
  }

  void fill_bases(const Window& window, const WeightCodes& weights, int64_t depth, int64_t offset) {
    const int64_t taps = window.kernel[0] * window.kernel[1];
    std::vector<int64_t> of_tap(taps);  // sums of a channel's weights
    for (int64_t o = 0; o < output().channels; ++o) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        of_tap[tap] = 0;
        for (int64_t d = 0; d < depth; ++d) of_tap[tap] += weights.at(o, tap * depth + d);
      }
      const auto inside = cases_->sums_inside(of_tap);
      for (int64_t number = 0; number < cases_->size(); ++number)
        bases_->at(o, number) = static_cast<int32_t>(offset * inside[number]);
    }
  }

  // total = multiplier * sum + base, and base is the border case's. Rising: total >= t, the opposite of
  // total <= t - 1; falling: total <= t.
  BitLimits bit_limits(const OpSpec& spec, const Thresholds<int32_t>& thresholds, int64_t multiplier) {
    const int64_t cases = cases_ ? cases_->size() : 1;
    BitLimits limits(spec, cases);
    for (int64_t c = 0; c < spec.channels; ++c) {
      const bool falling = thresholds.falling(c);
      if (!falling) limits.invert(c);
      for (int64_t number = 0; number < cases; ++number)
        limits.set(c, number,
                   floor_div(int64_t{*thresholds.of(c)} - (falling ? 0 : 1) - bases_->at(c, number), multiplier));
    }
    return limits;
  }

  // The first of 16 channels.
  int64_t slot(int64_t group, int64_t panel) const { return (group * panels_ + panel) * kTileChannels; }

  void put_codes(const Call& call, const IntegerSums& sums, int64_t pixel, int64_t group, int64_t panel) const {
    const auto write = [&](uint8_t* target, int64_t stride) {
      if (ramp_)
        kernels_.ramp(sums, ramp_->from(slot(group, panel)), target, stride);
      else
        kernels_.codes(sums, {limits_.data() + slot(group, panel) * levels_, flips_->panel(group, panel), levels_},
                       target, stride);
    };
    const int64_t inside = panel * kTileChannels, first = group * group_channels_ + inside;
    const int64_t wanted = std::min<int64_t>(kTileChannels, group_channels_ - inside);
    uint8_t codes[kTilePixels][kTileChannels];
    if (wanted == kTileChannels) {
      write(call.result<uint8_t>() + pixel * output().channels + first, output().channels);
      return;
    }
    write(codes[0], kTileChannels);
    for (int p = 0; p < sums.count; ++p)
      std::copy_n(codes[p], wanted, call.result<uint8_t>() + (pixel + p) * output().channels + first);
  }

  const ByteKernels& kernels_;
  Shape input_;
  int32_t multiplier_;
  int64_t groups_, group_channels_, panels_;  // panels: of one group
  std::optional<MatrixBlocks> matrices_;      // where there are none,
  std::optional<ByteBlocks> bytes_;           // and perhaps
  std::optional<PlaneBlocks> planes_;
  bool by_planes_ = false;
  std::string shape_;                 // where there are planes
  std::optional<BorderCases> cases_;  // where the grid has an offset; else there is one
  std::optional<PerChannel<int32_t>> bases_;
  std::optional<BitLimits> bit_limits_, plane_limits_;  // for codes of one bit, of sums of bytes and of planes
  std::optional<RampTable<int32_t>> ramp_;              // for other codes; where there is none, what follows
  int levels_ = 0;
  Buffer<int32_t> limits_;  // [group][panel][level][16]
  std::optional<PerChannel<int32_t>> flips_;
  std::optional<FloatEpilogue> epilogue_;  // for floats
};

// For weights that do not fit a byte: codes become the integers that they stand for when the planes are filled, so that
// the border's zeros add nothing to a sum, whatever the grid.
class QuantConv2d final : public Op {
 public:
  QuantConv2d(const OpSpec& spec, const Shape& input, const Window& window, const WeightCodes& weights, int64_t depth,
              const IntegerGrid& grid, const Kernels& kernels)
      : Op(output_shape(spec, window)),
        kernels_(kernels),
        input_(input),
        grid_(grid),
        product_(spec, input, window, depth, [&](int64_t o, int64_t tap, int64_t d) {
          return static_cast<int16_t>(weights.at(o, tap * depth + d));
        }) {
    if (has_tensor(spec, "thresholds"))
      thresholds_.emplace(spec, spec.channels);
    else
      epilogue_.emplace(spec, "scale");
  }

  bool makes_strips() const override { return true; }
  int64_t scratch_bytes() const override { return product_.planes_bytes(); }
  int64_t thread_scratch_bytes() const override { return product_.block_bytes(); }
  const char* kernel(bool) const override { return "integer_sums"; }

  void run(const Call& call) const override {
    fill_planes(call);
    product_.run(
        call, clearing(call, output()), kOneRow,
        [&](const IntegerTile& tile, int64_t pixel, const int64_t*, int64_t group, int64_t panel) {
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
  void fill_planes(const Call& call) const {
    product_.fill_planes(call, input_, [&](int64_t row, int16_t* line, const int64_t* columns) {
      const int64_t first = row * input_.width;
      for (int64_t i = 0; i < input_.width; ++i)
        for (int64_t c = 0; c < input_.channels; ++c)
          line[c * product_.plane_size() + columns[i]] =
              static_cast<int16_t>(grid_.integer(code_at(call, input_, first + i, c)));
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
  const Window window(spec, input);
  const IntegerGrid grid(spec.input_multiplier, spec.input_offset, input.bits);
  const int64_t depth = group_depth(spec, input, window), terms = spec.kernel[0] * spec.kernel[1] * depth;
  const WeightCodes weights(spec, terms);
  require(terms * grid.largest * weights.largest() <= kMaxSum, "a sum may overflow an int32");
  int64_t low = 0, high = 0;  // of the weights that there are: a grid's last code may be unused
  for (int64_t o = 0; o < spec.channels; ++o)
    for (int64_t n = 0; n < terms; ++n) {
      low = std::min(low, weights.at(o, n));
      high = std::max(high, weights.at(o, n));
    }
  // Bits come of sums of codes, before an offset comes to them: these must fit by themselves.
  const bool fit =
      output_shape(spec, window).bits != 1 || terms * ((int64_t{1} << input.bits) - 1) * weights.largest() <= kMaxSum;
  if (fit && ByteBlocks::fits(spec, low, high, kernels.bytes))
    return std::make_unique<CodeConv2d>(spec, input, window, weights, depth, std::max(-low, high), kernels);
  return std::make_unique<QuantConv2d>(spec, input, window, weights, depth, grid, kernels);
}

}  // namespace lowbit
