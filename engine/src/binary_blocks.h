// The binary product by blocks of 32 pixels and 32 or 64 channels, where the instruction set has kernels for them.
#pragma once

#include "convolution.h"

namespace lowbit {

// The weights of a product of one group, laid out for blocks.
class BlockWeights {
 public:
  BlockWeights(const Product<uint64_t>& product, const BlockKernels& kernels)
      : panel_bytes_(product.taps().size() * kernels.mask_bytes / kernels.panels),
        panels_(round_up(product.panels(), kernels.panels)),
        masks_(panels_ * panel_bytes_) {
    const int64_t together = kernels.panels;
    std::byte* masks = masks_.data();
    for (int64_t first = 0; first < panels_; first += together)
      for (size_t k = 0; k < product.taps().size(); ++k, masks += kernels.mask_bytes) {
        uint64_t words[BlockKernels::kMostPanels * kTileChannels] = {};
        for (int64_t number = first; number < std::min(first + together, product.panels()); ++number)
          std::copy_n(product.panel(0, number) + k * kTileChannels, kTileChannels,
                      words + (number - first) * kTileChannels);
        kernels.arrange_weights(words, masks);
      }
  }

  int64_t panels() const { return panels_; }
  const std::byte* masks(int64_t panel) const { return masks_.data() + panel * panel_bytes_; }

 private:
  int64_t panel_bytes_;
  int64_t panels_;  // rounded up to those that lie together
  Buffer<std::byte> masks_;
};

// Whether there are blocks, and so many panels that less than a third of what fills them is spare.
inline bool fill_blocks(int64_t panels, const BlockKernels* kernels) {
  return kernels != nullptr && 2 * round_up(panels, kernels->panels) < 3 * panels;
}

// Whether sums are short enough for blocks: for all of a long one they would take much memory.
inline bool fit_blocks(const Product<uint64_t>& product, const BlockKernels& kernels) {
  constexpr size_t kMostPixelBytes = 4 << 20;
  return kernels.pixel_bytes(product.taps().size()) <= kMostPixelBytes;
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
      kernels_.count(arranged, weights_.masks(panel), depth_, size, static_cast<int>(end - panel), counts);
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
