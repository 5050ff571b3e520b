// The binary product by blocks of 32 pixels and 32 channels, where the instruction set has kernels for them.
#pragma once

#include <bit>

#include "convolution.h"

namespace lowbit {

// The weights of a product of one group, laid out for blocks.
class BlockWeights {
 public:
  BlockWeights(const Product<uint64_t>& product, const BlockKernels& kernels)
      : panel_words_(product.taps().size() * kTileChannels * kernels.mask_words),
        panels_(round_up(product.panels(), 2)),
        masks_(panels_ * panel_words_, 0),
        ones_(panels_ * kTileChannels, 0) {
    const size_t depth = product.taps().size();
    uint64_t* masks = masks_.data();
    for (int64_t first = 0; first < panels_; first += 2)
      for (size_t k = 0; k < depth; ++k, masks += kBlockChannels * kernels.mask_words) {
        uint64_t words[kBlockChannels] = {};
        for (int64_t number = first; number < std::min(first + 2, product.panels()); ++number)
          for (int c = 0; c < kTileChannels; ++c) {
            const uint64_t word = product.panel(0, number)[k * kTileChannels + c];
            words[(number - first) * kTileChannels + c] = word;
            ones_[number * kTileChannels + c] += std::popcount(word);
          }
        kernels.arrange_weights(words, masks);
      }
  }

  int64_t panels() const { return panels_; }
  const uint64_t* masks(int64_t panel) const { return masks_.data() + panel * panel_words_; }
  const int32_t* ones(int64_t panel) const { return ones_.data() + panel * kTileChannels; }

 private:
  int64_t panel_words_;
  int64_t panels_;  // an even number
  Buffer<uint64_t> masks_;
  Buffer<int32_t> ones_;
};

// Whether there are blocks for a product, and sums short enough: for all of a long one they would take much memory.
inline bool fit_blocks(const Product<uint64_t>& product, const BlockKernels* kernels) {
  constexpr size_t kMostPixelBytes = 4 << 20;
  return kernels != nullptr && kernels->pixel_bytes(product.taps().size()) <= kMostPixelBytes;
}

class BinaryBlocks {
 public:
  BinaryBlocks(const Product<uint64_t>& product, const BlockKernels& kernels)
      : product_(product), kernels_(kernels), depth_(product.taps().size()), weights_(product, kernels) {}

  int64_t thread_scratch_bytes() const { return counts_offset() + weights_.panels() * sizeof(BlockSums); }

  // Calls emit(SumBlock) for every block; its channels begin with a word of bits.
  template <class RowOf, class Emit>
  void run(const Call& call, const RowOf& row_of, const Emit& emit) const {
    const Span span = product_.span(call);
    const int64_t blocks = ceil_div(span.count, kBlockPixels);
    const int64_t panels = weights_.panels(), chunk_panels = panels_at_once(panels, blocks, call.pool.size());
    for_items(call, span, kBlockPixels, panels, chunk_panels, [&](const Item& item) {
      std::byte* arranged = item.memory;
      auto* counts = reinterpret_cast<BlockSums*>(arranged + counts_offset());
      const int64_t panel = item.panel, end = item.end;
      const Part part = item.part(1, product_.channels());
      int64_t offsets[kBlockPixels], case_rows[kBlockPixels];
      product_.locate(item, row_of, offsets, case_rows);
      const int size = static_cast<int>(item.count);
      kernels_.arrange_pixels(product_.planes_of(call, 0), product_.taps().data(), depth_, offsets, size, arranged);
      kernels_.count(arranged, weights_.masks(panel), weights_.ones(panel), depth_, size, static_cast<int>(end - panel),
                     counts);
      emit(SumBlock{counts, part.first, part.count, case_rows, 0, panel, std::min(end, product_.panels()) - panel});
      call.done(part);
    });
  }

 private:
  int64_t counts_offset() const { return round_up(static_cast<int64_t>(kernels_.pixel_bytes(depth_)), kAlignment); }

  const Product<uint64_t>& product_;
  const BlockKernels& kernels_;
  size_t depth_;
  BlockWeights weights_;
};

}  // namespace lowbit
