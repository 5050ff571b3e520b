// The product of codes, a byte each, with weights of a signed byte each, by blocks of 32 pixels.
//
// A copy of the input with a border of zeros keeps the channels of a pixel together, so that what a pixel sees of a
// group is a few runs of bytes: one per row of taps where neighbouring taps are neighbours in memory, else one per tap.
// Put in a row they leave no gaps: the depth is taps times channels, rounded up once.
#pragma once

#include "convolution.h"

namespace lowbit {

class ByteBlocks {
 public:
  // Whether the product of codes with weights from `low` to `high` is one for `kernels`.
  static bool fits(const OpSpec& spec, int64_t low, int64_t high, const ByteKernels* kernels) {
    return kernels != nullptr && low >= std::numeric_limits<int8_t>::min() &&
           high <= std::numeric_limits<int8_t>::max() &&
           (spec.groups == 1 || spec.channels / spec.groups > kTileChannels);
  }

  // No weight is larger than `largest`, whatever its sign.
  ByteBlocks(const OpSpec& spec, const Shape& input, const Window& window, int64_t depth, const WeightCodes& weights,
             int64_t largest, const ByteKernels& kernels)
      : kernels_(kernels),
        input_(input),
        window_(window),
        groups_(spec.groups),
        channels_(spec.channels),
        padded_width_(input.width + 2 * window.padding[1]),
        padded_rows_(input.height + 2 * window.padding[0]),
        pair_(pair(input.bits, largest)),
        panels_(ceil_div(channels_ / groups_, kTileChannels)) {
    const bool joined = groups_ == 1 && window.dilation[1] == 1;
    run_bytes_ = joined ? window.kernel[1] * depth : depth;
    for (int64_t ky = 0; ky < window.kernel[0]; ++ky)
      for (int64_t kx = 0; kx < (joined ? 1 : window.kernel[1]); ++kx)
        runs_.push_back((ky * window.dilation[0] * padded_width_ + kx * window.dilation[1]) * input.channels);
    const int64_t terms = window.kernel[0] * window.kernel[1] * depth;
    depth_ = round_up(terms, kernels.depth_multiple);
    arrange(weights, terms);
  }

  int64_t panels() const { return panels_; }  // of one group
  int64_t scratch_bytes() const {
    return round_up(input_.channels * padded_width_ * padded_rows_, kAlignment) + kSlack;
  }
  int64_t thread_scratch_bytes() const { return sums_offset() + even_panels() * sizeof(BlockSums); }
  const char* kernel() const { return "bytes.sums"; }

  // Copies the input into the padded images, codes of 1 bit as bytes.
  void fill(const Call& call) const {
    if (!call.begins()) return;
    const int64_t channels = input_.channels, border = window_.padding[1] * channels, length = input_.width * channels;
    call.pool.run(static_cast<size_t>(call.batch * padded_rows_), [&](size_t row, int) {
      const int64_t image = row / padded_rows_, y = row % padded_rows_ - window_.padding[0];
      auto* line =
          static_cast<uint8_t*>(call.scratch) + image * scratch_bytes() + row % padded_rows_ * padded_width_ * channels;
      if (y < 0 || y >= input_.height) {
        std::fill_n(line, padded_width_ * channels, uint8_t{0});
        return;
      }
      std::fill_n(line, border, uint8_t{0});
      std::fill_n(line + border + length, border, uint8_t{0});
      const int64_t first = (image * input_.height + y) * input_.width;
      if (input_.bits != 1)
        std::copy_n(call.input<uint8_t>() + first * channels, length, line + border);
      else
        for (int64_t i = 0; i < input_.width; ++i)
          for (int64_t c = 0; c < channels; ++c)
            line[border + i * channels + c] = static_cast<uint8_t>(code_at(call, input_, first + i, c));
    });
  }

  // Calls begin(Part) for every item of work, then emit(SumBlock) for each of its groups. Weights that fill the cache
  // stay there while all pixels pass by.
  template <class Begin, class RowOf, class Emit>
  void run(const Call& call, const Begin& begin, const RowOf& row_of, const Emit& emit) const {
    const Span span = call.span(window_.height, window_.width);
    const int64_t blocks = ceil_div(span.count, kBlockPixels);
    const int64_t at_once = panels_at_once(even_panels(), blocks, call.pool.size());
    const int64_t cached = std::max<int64_t>(kMostWeightBytes / (depth_ * kTileChannels) / 4 * 4, kPanelsPerChunk);
    const int64_t chunk_panels = groups_ > 1 ? even_panels() : std::min(at_once, cached);
    const int64_t most = call.pool.size() > 1 && blocks < 2 * kMostBlocks * call.pool.size() ? 1 : blocks_at_once();
    for_items(call, span, most * kBlockPixels, even_panels(), chunk_panels, [&](const Item& item) {
      auto* arranged = reinterpret_cast<uint8_t*>(item.memory);
      auto* sums = reinterpret_cast<BlockSums*>(arranged + sums_offset());
      const int64_t count = item.count, panel = item.panel, end = item.end;
      const Part part = item.part(groups_, channels_);
      begin(part);
      int64_t offsets[kMostBlocks * kBlockPixels], case_rows[kMostBlocks * kBlockPixels];
      locate(window_, window_.stride[0] * padded_width_ * input_.channels, window_.stride[1] * input_.channels,
             scratch_bytes(), item.first, count, row_of, offsets, case_rows);
      if (kernels_.begin != nullptr) kernels_.begin();
      for (int64_t group = 0; group < groups_; ++group) {
        kernels_.arrange_pixels(static_cast<const uint8_t*>(call.scratch) + group * (input_.channels / groups_),
                                runs_.data(), runs_.size(), run_bytes_, offsets, static_cast<int>(count), depth_,
                                arranged);
        const int8_t* weights = weights_.data() + (group * even_panels() + panel) * depth_ * kTileChannels;
        for (int64_t p = 0; p < count; p += kBlockPixels) {
          const int64_t size = std::min<int64_t>(kBlockPixels, count - p);
          kernels_.sums(arranged + p * depth_, weights, depth_, static_cast<int>(size), static_cast<int>(end - panel),
                        pair_, sums);
          emit(SumBlock{sums, part.first + p, size, case_rows + p, group, panel, std::min(end, panels_) - panel});
        }
      }
      if (kernels_.end != nullptr) kernels_.end();
      call.done(part);
    });
  }

 private:
  static constexpr int64_t kSlack = 64;                 // see ByteKernels::arrange_pixels
  static constexpr int64_t kMostWeightBytes = 3 << 18;  // that stay in the L2 cache
  static constexpr int64_t kMostBlocks = 4;

  static int64_t pair(int64_t bits, int64_t largest) { return 2 * ((int64_t{1} << bits) - 1) * largest; }

  int64_t even_panels() const { return round_up(panels_, 2); }
  // Several where they fit the L1 cache: what is arranged is then in it when it is read, and no longer on its way
  // there.
  int64_t blocks_at_once() const {
    constexpr int64_t kMostArranged = 24 << 10;
    return std::clamp<int64_t>(kMostArranged / (kBlockPixels * depth_), 1, kMostBlocks);
  }
  int64_t sums_offset() const { return round_up(blocks_at_once() * kBlockPixels * depth_ + kSlack, kAlignment); }

  void arrange(const WeightCodes& weights, int64_t terms) {
    weights_.assign(groups_ * even_panels() * depth_ * kTileChannels, 0);
    const int64_t group_channels = channels_ / groups_;
    for (int64_t o = 0; o < channels_; ++o) {
      const int64_t inside = o % group_channels, panel = o / group_channels * even_panels() + inside / kTileChannels;
      int8_t* of_channel = weights_.data() + panel * depth_ * kTileChannels + inside % kTileChannels * 4;
      for (int64_t n = 0; n < terms; ++n)
        of_channel[n / 4 * 4 * kTileChannels + n % 4] = static_cast<int8_t>(weights.at(o, n));
    }
  }

  const ByteKernels& kernels_;
  Shape input_;
  Window window_;
  int64_t groups_, channels_, padded_width_, padded_rows_, pair_, panels_, run_bytes_, depth_;
  std::vector<int64_t> runs_;
  Buffer<int8_t> weights_;  // [group][panel][depth / 4][16][4]
};

}  // namespace lowbit
