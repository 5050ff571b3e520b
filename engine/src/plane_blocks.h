// The product of codes with weights by their bits: a binary product for each bit of a code and each bit of a weight.
//
// A weight that stands for unit * (2 * code - largest code), or +-unit for one bit, has a multiple of unit for each
// bit, positive where it is set and negative where not. So a code's bit b, worth 2^i, and a weight's bit v, worth 2^j,
// add 2^(i + j) * unit * b * (2v - 1), which over a whole sum is 2^(i + j) * unit * (ones of v - bits that differ).
// Codes of zero at the border add nothing.
#pragma once

#include <bit>
#include <optional>

#include "binary_blocks.h"
#include "convolution.h"

namespace lowbit {

class PlaneBlocks {
 public:
  // Whether a product has so few bits, and weights on such a grid, that this may be the faster way, and its layouts, of
  // which there may be three with blocks, take no more memory than what weights are counted for.
  static bool fits(const OpSpec& spec, int bits, int64_t depth, const Kernels& kernels) {
    const int64_t words = spec.weight_width * padded_channels(spec, kernels) * ceil_div(depth, 64);
    const int64_t counted = round_up(spec.channels, kTileChannels) * depth * 4;
    return 3 * words * static_cast<int64_t>(sizeof(uint64_t)) <= counted && spec.groups == 1 && depth >= kLeastDepth &&
           bits * spec.weight_width <= kMostProducts &&
           2 * spec.weight_offset == -spec.weight_multiplier * ((int64_t{1} << spec.weight_width) - 1);
  }

  PlaneBlocks(const OpSpec& spec, const Shape& input, const Window& window, int64_t depth, const WeightCodes& weights,
              const Kernels& kernels)
      : kernels_(kernels),
        input_(input),
        width_(spec.weight_width),
        unit_(static_cast<int32_t>(spec.weight_multiplier / 2)),
        panels_(padded_channels(spec, kernels) / kTileChannels),
        channels_(spec.channels),
        few_pixels_(window.height * window.width < kTilePixels),
        product_(make_product(spec, input, window, depth, weights, panels_ * kTileChannels)),
        starts_(panels_ * kTileChannels, 0) {
    if (fill_blocks(panels(spec), kernels.blocks) && fit_blocks(product_, *kernels.blocks))
      blocks_.emplace(product_, *kernels.blocks);
    const size_t taps = product_.taps().size();
    for (int64_t j = 0; j < width_; ++j)
      for (int64_t c = 0; c < panels_ * kTileChannels; ++c) {
        const uint64_t* words = product_.panel(0, j * panels_ + c / kTileChannels) + c % kTileChannels;
        int64_t ones = 0;
        for (size_t k = 0; k < taps; ++k) ones += std::popcount(words[k * kTileChannels]);
        starts_[c] += static_cast<uint32_t>(ones * ((1 << input.bits) - 1) << j);
      }
    product_.prepare_words(kernels);
  }

  int64_t products() const { return input_.bits * width_; }
  int32_t unit() const { return unit_; }  // what 1 stands for in the sums
  int64_t scratch_bytes() const { return product_.planes_bytes(); }
  int64_t thread_scratch_bytes() const {
    return counts_offset() + (blocks_ ? panels_ * static_cast<int64_t>(sizeof(BlockSums)) : 0);
  }
  const char* kernel() const { return blocks_ && !few_pixels_ ? "planes.blocks.count" : "planes.binary_subtract"; }

  // Copies the input into planes, one for each bit of 64 channels.
  void fill(const Call& call) const {
    const int64_t words = ceil_div(input_.channels, 64), set = words * product_.plane_size();
    product_.fill_planes(call, input_, [&](int64_t row, uint64_t* line, const int64_t* columns) {
      for (int64_t x = 0; x < input_.width; ++x)
        for (int64_t w = 0; w < words; ++w) {
          uint64_t* word = line + w * product_.plane_size() + columns[x];
          const int64_t pixel = row * input_.width + x;
          if (input_.bits == 1)
            *word = call.input<uint64_t>()[pixel * words + w];
          else
            split(call.input<uint8_t>() + pixel * input_.channels + w * 64,
                  std::min<int64_t>(64, input_.channels - w * 64), word, set);
        }
    });
  }

  // As ByteBlocks::run; there is one group.
  template <class Begin, class RowOf, class Emit>
  void run(const Call& call, const Begin& begin, const RowOf& row_of, const Emit& emit) const {
    const Span span = product_.span(call);
    const int64_t most = most_pixels(), blocks = ceil_div(span.count, most);
    const int64_t chunk_panels = panels_at_once(panels_, blocks, call.pool.size());
    for_items(call, span, most, panels_, chunk_panels, [&](const Item& item) {
      auto* sums = reinterpret_cast<BlockSums*>(item.memory + sums_offset());
      const int64_t count = item.count, panel = item.panel;
      const int64_t end = std::min(item.end, ceil_div(channels_, kTileChannels));
      const Part part = item.part(1, channels_);
      begin(part);
      int64_t offsets[kBlockPixels], case_rows[kBlockPixels];
      product_.locate(item, row_of, offsets, case_rows);
      for (int64_t number = panel; number < item.end; ++number)
        for (int64_t p = 0; p < count; ++p)
          std::memcpy(sums[number - panel][p], starts_.data() + number * kTileChannels, sizeof(sums[0][0]));
      if (blocks_ && count >= kTilePixels)
        subtract_blocks(call, item, offsets, sums);
      else
        subtract_tiles(call, item, end, offsets, sums);
      emit(SumBlock{sums, part.first, count, case_rows, 0, panel, end - panel});
      call.done(part);
    });
  }

 private:
  static constexpr int64_t kLeastDepth = 32, kMostProducts = 8;

  static int64_t panels(const OpSpec& spec) { return ceil_div(spec.channels, kTileChannels); }

  // Of one bit of the weights: panels that blocks have together are of one bit.
  static int64_t padded_channels(const OpSpec& spec, const Kernels& kernels) {
    const int64_t together = fill_blocks(panels(spec), kernels.blocks) ? kernels.blocks->panels : 1;
    return round_up(panels(spec), together) * kTileChannels;
  }

  // The channels of each bit of the weights, `padded` in number, follow those of the bit before.
  static Product<uint64_t> make_product(const OpSpec& spec, const Shape& input, const Window& window, int64_t depth,
                                        const WeightCodes& weights, int64_t padded) {
    OpSpec by_bit = spec;
    by_bit.channels = spec.weight_width * padded;
    const auto word_at = [&](int64_t row, int64_t tap, int64_t w) {
      const int64_t o = row % padded, bit = row / padded, end = std::min(depth, w * 64 + 64);
      uint64_t word = 0;
      for (int64_t d = w * 64; o < spec.channels && d < end; ++d)
        word |= (weights.code(o, tap * depth + d) >> bit & 1) << d % 64;
      return word;
    };
    return {by_bit, input, window, ceil_div(depth, 64), word_at, input.bits};
  }

  // The lowest bit of each of eight bytes, side by side: a product moves them together.
  static uint64_t lowest_bits(uint64_t bytes) { return (bytes & 0x0101010101010101) * 0x0102040810204080 >> 56; }

  // Bit i of up to 64 codes goes to word[i * pitch].
  void split(const uint8_t* codes, int64_t count, uint64_t* word, int64_t pitch) const {
    uint64_t eights[8] = {};
    std::memcpy(eights, codes, count);
    for (int i = 0; i < input_.bits; ++i) {
      uint64_t bits = 0;
      for (int n = 0; n < 8; ++n) bits |= lowest_bits(eights[n] >> i) << 8 * n;
      word[i * pitch] = bits;
    }
  }

  // Takes what differs from the sums, by tiles; of panels that blocks take together, those from `end` on are spare.
  void subtract_tiles(const Call& call, const Item& item, int64_t end, const int64_t* offsets, BlockSums* sums) const {
    const size_t depth = product_.taps().size(), size_of_tile = depth * kTilePixels;
    auto* gathered = reinterpret_cast<uint64_t*>(item.memory);  // [tile][bit]
    const auto for_tiles = [&](const auto& work) {
      uint64_t* tile = gathered;
      for (int64_t p = 0; p < item.count; p += kTilePixels)
        for (int64_t i = 0; i < input_.bits; ++i, tile += size_of_tile)
          work(p, static_cast<int>(std::min<int64_t>(kTilePixels, item.count - p)), i, tile);
    };
    for_tiles([&](int64_t p, int size, int64_t i, uint64_t* tile) {
      product_.gather(product_.planes_of(call, 0, i), offsets + p, size, tile);
    });
    for (int64_t number = item.panel; number < end; ++number)
      for_tiles([&](int64_t p, int size, int64_t i, const uint64_t* tile) {
        for (int64_t j = 0; j < width_; ++j)
          kernels_.binary_subtract({tile, product_.panel(0, j * panels_ + number), depth, size},
                                   static_cast<int>(i + j), sums[number - item.panel] + p);
      });
  }

  // The same by blocks.
  void subtract_blocks(const Call& call, const Item& item, const int64_t* offsets, BlockSums* sums) const {
    const BlockKernels& kernels = *kernels_.blocks;
    const size_t depth = product_.taps().size();
    const int size = static_cast<int>(item.count), panels = static_cast<int>(item.end - item.panel);
    auto* counts = reinterpret_cast<BlockSums*>(item.memory + counts_offset());
    for (int64_t i = 0; i < input_.bits; ++i) {
      kernels.arrange_pixels(product_.planes_of(call, 0, i), product_.taps().data(), depth, offsets, size, item.memory);
      for (int64_t j = 0; j < width_; ++j) {
        const int64_t first = j * panels_ + item.panel;
        kernels.count(item.memory, blocks_->masks(first), depth, size, panels, counts);
        for (int number = 0; number < panels; ++number)
          for (int p = 0; p < size; ++p)
            for (int c = 0; c < kTileChannels; ++c)
              sums[number][p][c] = static_cast<int32_t>(static_cast<uint32_t>(sums[number][p][c]) -
                                                        (static_cast<uint32_t>(counts[number][p][c]) << (i + j)));
      }
    }
  }

  // By blocks, as many as they take; else what the first cache holds, in whole tiles.
  int64_t most_pixels() const {
    if (blocks_) return kBlockPixels;
    const int64_t tile = product_.taps().size() * kTilePixels * sizeof(uint64_t) * input_.bits;
    return std::clamp<int64_t>(kBlockBytes / tile, 1, kBlockPixels / kTilePixels) * kTilePixels;
  }

  // Of the tiles of all bits, or the block of one.
  int64_t sums_offset() const {
    const size_t depth = product_.taps().size(), pixels = blocks_ ? kTilePixels : most_pixels();
    const size_t tiles = pixels * depth * sizeof(uint64_t) * input_.bits + Product<uint64_t>::kRowBytes;
    return round_up(static_cast<int64_t>(blocks_ ? std::max(tiles, kernels_.blocks->pixel_bytes(depth)) : tiles),
                    kAlignment);
  }
  int64_t counts_offset() const { return sums_offset() + panels_ * static_cast<int64_t>(sizeof(BlockSums)); }

  const Kernels& kernels_;
  Shape input_;
  int64_t width_;
  int32_t unit_;
  int64_t panels_;  // of each bit of the weights
  int64_t channels_;
  bool few_pixels_;  // in an image
  Product<uint64_t> product_;
  std::optional<BlockWeights> blocks_;
  Buffer<uint32_t> starts_;  // the sum of a channel if no bit differs
};

}  // namespace lowbit
