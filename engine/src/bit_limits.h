// From sums to codes of one bit: each channel has a limit of its sums.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "convolution.h"

namespace lowbit {

// Bit of channel c = (sum <= limit of c) xor whether c is inverted, for each of some border cases.
class BitLimits {
 public:
  BitLimits(const OpSpec& spec, int64_t cases)
      : group_channels_(spec.channels / spec.groups),
        group_words_(ceil_div(group_channels_, 64)),
        output_words_(ceil_div(spec.channels, 64)),
        shares_words_(spec.groups > 1 && group_channels_ % 64 != 0),
        limits_(spec.channels, spec.groups, kNone, cases),
        inverted_(spec.groups * group_words_) {}

  void invert(int64_t channel) {
    const int64_t inside = channel % group_channels_;
    inverted_[channel / group_channels_ * group_words_ + inside / 64] |= uint64_t{1} << inside % 64;
  }
  void set(int64_t channel, int64_t number, int64_t limit) {
    limits_.at(channel, number) =
        static_cast<int32_t>(std::clamp<int64_t>(limit, kNone, std::numeric_limits<int32_t>::max()));
  }

  const PerChannel<int32_t>& table() const { return limits_; }
  uint16_t inverted(int64_t group, int64_t panel) const {
    return static_cast<uint16_t>(inverted_words(group, panel)[0] >> panel % 4 * kTileChannels);
  }

  // Whether groups share words, which are to be cleared then before anything is written.
  bool shares_words() const { return shares_words_; }

  // Writes the bits of a block whose case rows are of the table.
  void write(const Call& call, const SumBlock& block, SumBits bits) const {
    uint64_t* codes = call.result<uint64_t>() + block.first_pixel * output_words_;
    const auto write = [&](int64_t number, int64_t panels, uint64_t* words, int64_t pitch) {
      const int64_t panel = block.first_panel + number;
      bits(block.sums[number], static_cast<int>(block.count), static_cast<int>(panels),
           {limits_.panel(block.group, panel), block.case_rows, inverted_words(block.group, panel)}, words, pitch);
    };
    if (!shares_words_) {
      write(0, block.panels, codes + block.group * group_words_ + block.first_panel / 4, output_words_);
      return;
    }
    for (int64_t number = 0; number < block.panels; number += 4) {
      uint64_t words[kBlockPixels];
      write(number, std::min<int64_t>(block.panels - number, 4), words, 1);
      add_bits(codes, output_words_, block.group * group_channels_ + (block.first_panel + number) * kTileChannels,
               words, static_cast<int>(block.count));
    }
  }

 private:
  static constexpr int64_t kNone = std::numeric_limits<int32_t>::min();  // spare channels: no sum is that low, so bit 0

  const uint64_t* inverted_words(int64_t group, int64_t panel) const {
    return inverted_.data() + group * group_words_ + panel / 4;
  }

  int64_t group_channels_, group_words_, output_words_;
  bool shares_words_;
  PerChannel<int32_t> limits_;
  std::vector<uint64_t> inverted_;  // [group][word]
};

}  // namespace lowbit
