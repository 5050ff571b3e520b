// The product of codes with weights by their bits: a binary product for each bit of a code and each bit of a weight.
//
// A weight that stands for unit * (2 * code - largest code), or +-unit for one bit, has a multiple of unit for each
// bit, positive where it is set and negative where not. So a code's bit b, worth 2^i, and a weight's bit v, worth 2^j,
// add 2^(i + j) * unit * b * (2v - 1), which over a whole sum is 2^(i + j) * unit * (ones of v - bits that differ).
// Codes of zero at the border add nothing.
#pragma once

#include <bit>

#include "convolution.h"

namespace lowbit {

class PlaneBlocks {
 public:
  // Whether a product has so few bits, and weights on such a grid, that this may be the faster way.
  static bool fits(const OpSpec& spec, int bits, int64_t depth) {
    return spec.groups == 1 && depth >= kLeastDepth && bits * spec.weight_width <= kMostProducts &&
           2 * spec.weight_offset == -spec.weight_multiplier * ((int64_t{1} << spec.weight_width) - 1);
  }

  PlaneBlocks(const OpSpec& spec, const Shape& input, const Window& window, int64_t depth, const WeightCodes& weights,
              const Kernels& kernels)
      : kernels_(kernels),
        input_(input),
        width_(spec.weight_width),
        unit_(static_cast<int32_t>(spec.weight_multiplier / 2)),
        panels_(ceil_div(spec.channels, kTileChannels)),
        channels_(spec.channels),
        product_(make_product(spec, input, window, depth, weights)),
        starts_(panels_ * kTileChannels, 0) {
    const size_t taps = product_.taps().size();
    for (int64_t j = 0; j < width_; ++j)
      for (int64_t c = 0; c < panels_ * kTileChannels; ++c) {
        const uint64_t* words = product_.panel(0, j * panels_ + c / kTileChannels) + c % kTileChannels;
        int64_t ones = 0;
        for (size_t k = 0; k < taps; ++k) ones += std::popcount(words[k * kTileChannels]);
        starts_[c] += static_cast<uint32_t>(ones * ((1 << input.bits) - 1) << j);
      }
  }

  int64_t products() const { return input_.bits * width_; }
  int32_t unit() const { return unit_; }  // what 1 stands for in the sums
  int64_t scratch_bytes() const { return product_.planes_bytes(); }
  int64_t thread_scratch_bytes() const { return sums_offset() + panels_ * sizeof(BlockSums); }
  const char* kernel() const { return "planes.binary_subtract"; }

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
  template <class Begin, class Emit>
  void run(const Call& call, const Begin& begin, const Emit& emit) const {
    const Span span = product_.span(call);
    const int64_t most = most_pixels(), blocks = ceil_div(span.count, most);
    const int64_t chunk_panels = panels_at_once(panels_, blocks, call.pool.size());
    const int64_t bits = input_.bits, size_of_tile = product_.taps().size() * kTilePixels;
    for_items(call, span, most, panels_, chunk_panels, [&](const Item& item) {
      auto* gathered = reinterpret_cast<uint64_t*>(item.memory);  // [tile][bit]
      auto* sums = reinterpret_cast<BlockSums*>(item.memory + sums_offset());
      const int64_t count = item.count, first = item.place, panel = item.panel, end = item.end;
      const int64_t channel = panel * kTileChannels, end_channel = std::min(end * kTileChannels, channels_);
      begin(first, count, channel, end_channel);
      int64_t offsets[kBlockPixels], positions[kBlockPixels];
      product_.locate(item.first, count, offsets, positions);
      for (int64_t p = 0; p < count; p += kTilePixels) {
        const int size = static_cast<int>(std::min<int64_t>(kTilePixels, count - p));
        for (int64_t i = 0; i < bits; ++i)
          product_.gather(product_.planes_of(call, 0, i), offsets + p, size,
                          gathered + (p / kTilePixels * bits + i) * size_of_tile);
      }
      for (int64_t number = panel; number < end; ++number)
        for (int64_t p = 0; p < count; p += kTilePixels)
          add_up(gathered + p / kTilePixels * bits * size_of_tile,
                 static_cast<int>(std::min<int64_t>(kTilePixels, count - p)), number, sums[number - panel] + p);
      emit(SumBlock{sums, first, count, positions, 0, panel, end - panel});
      call.done({first, count, channel, end_channel});
    });
  }

 private:
  static constexpr int64_t kLeastDepth = 32, kMostProducts = 8;

  // The channels of each bit of the weights follow those of the bit before, from a panel of their own on.
  static Product<uint64_t> make_product(const OpSpec& spec, const Shape& input, const Window& window, int64_t depth,
                                        const WeightCodes& weights) {
    const int64_t padded = round_up(spec.channels, kTileChannels);
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

  void add_up(const uint64_t* gathered, int size, int64_t panel, int32_t (*sums)[kTileChannels]) const {
    const size_t depth = product_.taps().size();
    for (int p = 0; p < size; ++p)
      std::memcpy(sums[p], starts_.data() + panel * kTileChannels, kTileChannels * sizeof(int32_t));
    for (int64_t i = 0; i < input_.bits; ++i)
      for (int64_t j = 0; j < width_; ++j)
        kernels_.binary_subtract(
            {gathered + i * depth * kTilePixels, product_.panel(0, j * panels_ + panel), depth, size},
            static_cast<int>(i + j), sums);
  }

  // As many as the first cache holds, in whole tiles.
  int64_t most_pixels() const {
    const int64_t tile = product_.taps().size() * kTilePixels * sizeof(uint64_t) * input_.bits;
    return std::clamp<int64_t>(kBlockBytes / tile, 1, kBlockPixels / kTilePixels) * kTilePixels;
  }

  int64_t sums_offset() const {
    return round_up(most_pixels() * product_.taps().size() * sizeof(uint64_t) * input_.bits, kAlignment);
  }

  const Kernels& kernels_;
  Shape input_;
  int64_t width_;
  int32_t unit_;
  int64_t panels_, channels_;
  Product<uint64_t> product_;
  Buffer<uint32_t> starts_;  // the sum of a channel if no bit differs
};

}  // namespace lowbit
