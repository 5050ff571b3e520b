// Binary convolutions: counts of differing bits.
#include <bit>
#include <optional>

#include "binary_blocks.h"
#include "bit_limits.h"
#include "border_cases.h"
#include "convolution.h"
#include "matrix_blocks.h"
#include "measure.h"
#include "output_transform.h"

namespace lowbit {
namespace {

// The bases of a binary convolution with zero padding, by border case: its sums come from counts of differing bits.
//
// Inside the image, sum = n - 2 * count over the n bits of all taps. A tap outside reads words of zeros and adds the
// number of its weights' ones to the count, but must add nothing to the sum. So with base = n_inside + 2 *
// ones_outside, per border case and channel, sum = base - 2 * count.
PerChannel<int32_t> count_bases(const OpSpec& spec, int64_t depth, const BorderCases& cases) {
  const int64_t words = ceil_div(depth, 64), kh = spec.kernel[0], kw = spec.kernel[1];
  const auto weights = tensor<uint64_t>(spec, "weight_bits", {spec.channels, kh, kw, words});
  PerChannel<int32_t> bases(spec.channels, spec.groups, 0, cases.size());
  std::vector<int64_t> of_tap(kh * kw);
  for (int64_t o = 0; o < spec.channels; ++o) {
    int64_t ones = 0;
    for (int64_t tap = 0; tap < kh * kw; ++tap) {
      int64_t of_this = 0;
      for (const uint64_t word : weights.subspan((o * kh * kw + tap) * words, words)) of_this += std::popcount(word);
      of_tap[tap] = depth - 2 * of_this;
      ones += of_this;
    }
    int64_t number = 0;
    for (const int64_t inside : cases.sums_inside(of_tap))
      bases.at(o, number++) = static_cast<int32_t>(inside + 2 * ones);
  }
  return bases;
}

class BinaryConv2d : public Op {
 public:
  BinaryConv2d(const OpSpec& spec, const Shape& input, const Window& window, const Kernels& kernels, int bits)
      : Op({window.height, window.width, spec.channels, bits}),
        kernels_(kernels),
        input_(input),
        groups_(spec.groups),
        depth_(group_depth(spec, input, window)),
        product_(make_product(spec, input, window, depth_)),
        cases_(input, window) {
    if (MatrixBlocks::fits(spec, input, window, kernels.matrices))
      matrices_.emplace(make_matrices(spec, input, window, *kernels.matrices));
    else if (groups_ == 1 && fill_blocks(product_.panels(), kernels.blocks) && fit_blocks(product_, *kernels.blocks))
      blocks_.emplace(product_, *kernels.blocks);
    product_.prepare_words(kernels);
    shape_ = describe(spec, input, output().bits);
  }

  bool makes_strips() const override { return true; }
  int64_t scratch_bytes() const override {
    return std::max(product_.planes_bytes(), matrices_ ? matrices_->scratch_bytes() : int64_t{0});
  }
  int64_t thread_scratch_bytes() const override {
    return std::max({product_.block_bytes(), blocks_ ? blocks_->thread_scratch_bytes() : int64_t{0},
                     matrices_ ? matrices_->thread_scratch_bytes() : int64_t{0}});
  }

  // Blocks or tiles, for few pixels and for many: they give the same bits. Matrices are not measured: they are the
  // faster ones, except while somebody else keeps the unit busy, which says nothing about later.
  void tune(const Measure& measure) override {
    if (!blocks_) return;
    for (const int64_t fewest : {kMinBlockPixels, kManyPixels}) {
      bool& blocks = by_blocks_[fewest == kManyPixels];
      const int64_t batch = ceil_div(fewest, output().pixels());
      if (batch > kMostImages || (fewest < kManyPixels && output().pixels() >= kManyPixels)) continue;
      blocks = measure.first_is_faster(*this, input_, shape_, batch, [&](bool first) { blocks = first; });
    }
  }

 protected:
  // Calls emit(SumBlock) for all counts if there are pixels enough for blocks or matrices; else returns false. The same
  // for all strips of an image, for they share what the first has prepared.
  template <class RowOf, class Emit>
  bool run_blocks(const Call& call, const RowOf& row_of, const Emit& emit) const {
    if (!in_blocks(call.batch * output().pixels())) return false;
    if (matrices_) {
      matrices_->fill(call);
      matrices_->run(call, kNoBegin, row_of, emit);
    } else {
      fill_planes(call);
      blocks_->run(call, row_of, emit);
    }
    return true;
  }

  bool in_blocks(int64_t pixels) const {
    if (!matrices_ && !blocks_) return false;
    return pixels >= (matrices_ ? kMinMatrixPixels : kMinBlockPixels) && by_blocks_[pixels >= kManyPixels];
  }

  // What it calls for one image.
  const char* shown(const char* by_tiles) const {
    if (!in_blocks(output().pixels())) return by_tiles;
    return matrices_ ? "matrices.multiply" : "blocks.count";
  }

  // Calls emit(counts, pixels, panels, first pixel, case rows, panel) for up to 8 pixels of a block times all its
  // panels that are full, or one that is not.
  template <class Emit>
  void for_tiles(const SumBlock& block, int64_t most_panels, const Emit& emit) const {
    for (int64_t number = 0, size; number < block.panels; number += size) {
      const int64_t panel = block.first_panel + number;
      size = full_panels(product_.group_channels(), panel, std::min(block.panels - number, most_panels));
      for (int64_t p = 0; p < block.count; p += kTilePixels)
        emit(block.sums[number] + p, static_cast<int>(std::min<int64_t>(kTilePixels, block.count - p)),
             static_cast<int>(size), block.first_pixel + p, block.case_rows + p, panel);
    }
  }

  void fill_planes(const Call& call) const {
    const int64_t words = input_.words(), group_words = ceil_div(depth_, 64);
    const bool aligned = groups_ == 1 || depth_ % 64 == 0;
    product_.fill_planes(call, input_, [&](int64_t row, uint64_t* line, const int64_t* columns) {
      const int64_t plane_size = product_.plane_size();
      const uint64_t* x = call.input<uint64_t>() + row * input_.width * words;
      for (int64_t column = 0; column < input_.width; ++column, x += words) {
        const int64_t i = columns[column];
        if (aligned)
          for (int64_t w = 0; w < words; ++w) line[w * plane_size + i] = x[w];
        else
          for (int64_t group = 0; group < groups_; ++group)
            for (int64_t w = 0; w < group_words; ++w)
              line[(group * group_words + w) * plane_size + i] =
                  extract(x, group * depth_ + w * 64, std::min<int64_t>(64, depth_ - w * 64));
      }
    });
  }

  // Where `table` has the border case of a position within an image.
  auto rows_of(const PerChannel<int32_t>& table) const {
    return [&](int64_t position) { return table.row(cases_.of_position(position)); };
  }

  // The same of some pixels, for one panel of channels.
  static std::array<const int32_t*, kTilePixels> rows_at(const PerChannel<int32_t>& table, int count,
                                                         const int64_t* case_rows, int64_t group, int64_t panel) {
    std::array<const int32_t*, kTilePixels> rows;
    for (int p = 0; p < count; ++p) rows[p] = table.panel(group, panel) + case_rows[p];
    return rows;
  }

  const Kernels& kernels_;
  Shape input_;
  int64_t groups_, depth_;  // depth: input channels per group
  Product<uint64_t> product_;
  BorderCases cases_;
  std::optional<BinaryBlocks> blocks_;
  std::optional<MatrixBlocks> matrices_;

 private:
  static constexpr int64_t kMinBlockPixels = 4, kMinMatrixPixels = 8, kManyPixels = 64, kMostImages = 64;

  bool by_blocks_[2] = {true, true};  // from kMinBlockPixels and from kManyPixels on
  std::string shape_;

  // `count` bits (at most 64) of x from bit `start` on.
  static uint64_t extract(const uint64_t* x, int64_t start, int64_t count) {
    const int64_t word = start / 64, shift = start % 64;
    uint64_t bits = x[word] >> shift;
    if (shift + count > 64) bits |= x[word + 1] << (64 - shift);
    return count == 64 ? bits : bits & ((uint64_t{1} << count) - 1);
  }

  // Calls make(word_at), where word_at(o, tap, w) is a word of the weights' bits.
  template <class Make>
  static auto with_words(const OpSpec& spec, int64_t words, const Make& make) {
    const int64_t taps = spec.kernel[0] * spec.kernel[1];
    const auto bits = tensor<uint64_t>(spec, "weight_bits", {spec.channels, spec.kernel[0], spec.kernel[1], words});
    return make([&](int64_t o, int64_t tap, int64_t w) { return bits[(o * taps + tap) * words + w]; });
  }

  static Product<uint64_t> make_product(const OpSpec& spec, const Shape& input, const Window& window, int64_t depth) {
    const int64_t words = ceil_div(depth, 64);
    return with_words(spec, words,
                      [&](const auto& word_at) { return Product<uint64_t>(spec, input, window, words, word_at); });
  }

  // A weight is -1 where its bit is set, so that counts are of bits that differ.
  static MatrixBlocks make_matrices(const OpSpec& spec, const Shape& input, const Window& window,
                                    const MatrixKernels& kernels) {
    return with_words(spec, input.words(), [&](const auto& word_at) {
      const auto weight_at = [&](int64_t o, int64_t tap, int64_t w) { return ~word_at(o, tap, w); };
      return MatrixBlocks(spec, input, window, weight_at, true, kernels);
    });
  }
};

class BinaryConv2dFloat final : public BinaryConv2d {
 public:
  BinaryConv2dFloat(const OpSpec& spec, const Shape& input, const Window& window, const Kernels& kernels)
      : BinaryConv2d(spec, input, window, kernels, 0),
        bases_(count_bases(spec, depth_, cases_)),
        epilogue_(spec, "scale") {}

  const char* kernel(bool) const override { return shown("binary_floats"); }

  void run(const Call& call) const override { run(call, nullptr); }
  bool joins(const PixelwiseOp& next) const override { return next.is_sum(); }
  void run_joined(const PixelwiseOp&, const Call& call) const override { run(call, call.input<float>(1)); }

 private:
  void run(const Call& call, const float* added) const {
    if (run_blocks(call, rows_of(bases_), [&](const SumBlock& block) {
          const auto write = [&](auto counts, int count, int panels, int64_t pixel, const int64_t* case_rows,
                                 int64_t panel) {
            store(call, added, count, pixel, case_rows, 0, panel,
                  [&](const int32_t* const* bases, const FloatOutput& output) {
                    kernels_.counts->floats(counts, count, panels, bases, output);
                  });
          };
          for_tiles(block, block.panels, write);
        }))
      return;
    fill_planes(call);
    product_.run(
        call, kNoBegin, rows_of(bases_),
        [&](const BinaryTile& tiles, int64_t pixel, const int64_t* case_rows, int64_t group, int64_t panel) {
          product_.for_full_panels(tiles, panel, [&](const BinaryTile& tile, int64_t number) {
            store(call, added, tile.count, pixel, case_rows, group, number,
                  [&](const int32_t* const* bases, const FloatOutput& output) {
                    kernels_.binary_floats(tile, bases, output);
                  });
          });
        },
        kPanelsPerChunk);
  }

  // Calls compute(bases, FloatOutput) for a tile.
  template <class Compute>
  void store(const Call& call, const float* added, int count, int64_t pixel, const int64_t* case_rows, int64_t group,
             int64_t panel, const Compute& compute) const {
    const auto bases = rows_at(bases_, count, case_rows, group, panel);
    epilogue_.emit(
        call.result<float>(), pixel, count, group, panel,
        [&](const FloatOutput& output) { compute(bases.data(), output); }, added);
  }

  PerChannel<int32_t> bases_;
  FloatEpilogue epilogue_;
};

// 1-bit codes out: the thresholds become limits of the count, so that a kernel only counts and compares.
class BinaryConv2dBits final : public BinaryConv2d {
 public:
  BinaryConv2dBits(const OpSpec& spec, const Shape& input, const Window& window, const Kernels& kernels)
      : BinaryConv2d(spec, input, window, kernels, 1), limits_(spec, cases_.size()) {
    const Thresholds<int32_t> thresholds(spec, spec.channels);
    PerChannel<int32_t> bases = count_bases(spec, depth_, cases_);
    for (int64_t c = 0; c < spec.channels; ++c) {
      if (thresholds.falling(c)) limits_.invert(c);
      for (int64_t number = 0; number < cases_.size(); ++number) {
        // Rising: base - 2 * count >= t, so count <= floor((base - t) / 2). Falling: base - 2 * count <= t, so
        // count >= ceil((base - t) / 2), the opposite of count <= that - 1.
        const int64_t twice = int64_t{bases.at(c, number)} - *thresholds.of(c);
        limits_.set(c, number, thresholds.falling(c) ? ((twice + 1) >> 1) - 1 : twice >> 1);
      }
    }
  }

  const char* kernel(bool) const override { return shown("binary_bits"); }

  void run(const Call& call) const override {
    const auto row_of = rows_of(limits_.table());
    if (run_blocks(call, row_of, [&](const SumBlock& block) { limits_.write(call, block, kernels_.counts->bits); }))
      return;
    const int64_t words = output().words();
    fill_planes(call);
    product_.run(call, clearing(call, output()), row_of,
                 [&](const BinaryTile& tile, int64_t pixel, const int64_t* case_rows, int64_t group, int64_t panel) {
                   const auto limits = rows_at(limits_.table(), tile.count, case_rows, group, panel);
                   uint16_t bits[kTilePixels];
                   kernels_.binary_bits(tile, limits.data(), limits_.inverted(group, panel), bits);
                   const int64_t first = group * product_.group_channels() + panel * kTileChannels;
                   add_bits(call.result<uint64_t>() + pixel * words, words, first, bits, tile.count);
                 });
  }

 private:
  BitLimits limits_;
};

// Codes of 2 to 8 bits out, a byte each.
class BinaryConv2dCodes final : public BinaryConv2d {
 public:
  BinaryConv2dCodes(const OpSpec& spec, const Shape& input, const Window& window, const Kernels& kernels)
      : BinaryConv2d(spec, input, window, kernels, static_cast<int>(spec.bits)),
        bases_(count_bases(spec, depth_, cases_)),
        thresholds_(spec, spec.channels) {}

  const char* kernel(bool) const override { return shown("binary_subtract"); }

  void run(const Call& call) const override {
    if (run_blocks(call, rows_of(bases_), [&](const SumBlock& block) {
          const auto write = [&](auto counts, int count, int, int64_t pixel, const int64_t* case_rows, int64_t panel) {
            store(call, count, pixel, case_rows, 0, panel, [&](int32_t (*sums)[kTileChannels]) {
              for (int p = 0; p < count; ++p)
                for (int c = 0; c < kTileChannels; ++c) sums[p][c] -= 2 * counts[p][c];
            });
          };
          for_tiles(block, 1, write);
        }))
      return;
    fill_planes(call);
    product_.run(call, kNoBegin, rows_of(bases_),
                 [&](const BinaryTile& tile, int64_t pixel, const int64_t* case_rows, int64_t group, int64_t panel) {
                   store(call, tile.count, pixel, case_rows, group, panel,
                         [&](int32_t (*sums)[kTileChannels]) { kernels_.binary_subtract(tile, 1, sums); });
                 });
  }

 private:
  // subtract(sums) takes twice the counts of a tile from its bases.
  template <class Subtract>
  void store(const Call& call, int count, int64_t pixel, const int64_t* case_rows, int64_t group, int64_t panel,
             const Subtract& subtract) const {
    const auto bases = rows_at(bases_, count, case_rows, group, panel);
    int32_t sums[kTilePixels][kTileChannels];
    for (int p = 0; p < count; ++p) std::copy_n(bases[p], kTileChannels, sums[p]);
    subtract(sums);
    const int64_t inside = panel * kTileChannels, first = group * product_.group_channels() + inside;
    const int64_t wanted = std::min<int64_t>(kTileChannels, product_.group_channels() - inside);
    for (int p = 0; p < count; ++p)
      for (int64_t c = 0; c < wanted; ++c)
        call.result<uint8_t>()[(pixel + p) * output().channels + first + c] = thresholds_.code(sums[p][c], first + c);
  }

  PerChannel<int32_t> bases_;
  Thresholds<int32_t> thresholds_;
};

}  // namespace

std::unique_ptr<Op> make_binary_conv2d(const OpSpec& spec, const Shape& input, const Kernels& kernels) {
  require(input.bits == 1, "binary_conv2d needs 1-bit codes as input");
  const Window window(spec, input);
  if (!has_tensor(spec, "thresholds")) return std::make_unique<BinaryConv2dFloat>(spec, input, window, kernels);
  if (spec.bits == 1) return std::make_unique<BinaryConv2dBits>(spec, input, window, kernels);
  return std::make_unique<BinaryConv2dCodes>(spec, input, window, kernels);
}

}  // namespace lowbit
