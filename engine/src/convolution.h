// What the convolutions share: a product of pixels with repacked weights, and what comes before and after it.
//
// The input is first copied into planes: one per channel (floats, integers) or per 64-bit word of channels (bits), with
// a border of zeros. There, the input of output pixel p under tap k lies at taps[k] + pixels[p], for every stride,
// dilation and border, and neighbouring pixels are neighbours in memory, so that a tile is gathered mostly by whole
// vectors: a row has its columns 0, s, 2s, ... first, then 1, s + 1, ..., for a stride of s.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#include "op.h"

namespace lowbit {

inline constexpr size_t kBlockBytes =
    16 << 10;  // gathered pixels that meet each weight panel in turn: a third of the L1 cache
inline constexpr int64_t kBlockTiles = 8;
inline constexpr int64_t kMaxInteger = (1 << 15) - 1;
inline constexpr int64_t kPanelsPerChunk = 4;

// Panels that an item of work covers, of all of one group: where there are few blocks of pixels, threads share each by
// 64 channels, a whole word of output bits.
inline int64_t panels_at_once(int64_t panels, int64_t blocks, int threads) {
  return blocks < 2 * threads && threads > 1 ? kPanelsPerChunk : panels;
}

// How many panels from `panel` on, of at most `most`, take all of a tile's channels: a kernel can write these at once.
// One if it is not full itself.
inline int64_t full_panels(int64_t group_channels, int64_t panel, int64_t most) {
  return std::clamp<int64_t>(group_channels / kTileChannels - panel, 1, most);
}

// Where the input of output pixels first..first+count-1 starts in padded images, `down` elements from a row of them to
// the next, `right` to the next pixel and `image_size` to the next image; and for each what row_of(its number within
// its image) says: where a table by border case has its row.
template <class RowOf>
void locate(const Window& window, int64_t down, int64_t right, int64_t image_size, int64_t first, int64_t count,
            const RowOf& row_of, int64_t* offsets, int64_t* case_rows) {
  const int64_t width = window.width, height = window.height;
  int64_t image = first / (height * width), y = first / width % height, x = first % width;
  for (int64_t p = 0; p < count; x = 0) {  // a row of pixels at a time
    const int64_t offset = image * image_size + y * down, position = y * width, end = std::min(count, p + width - x);
    for (; p < end; ++p, ++x) {
      offsets[p] = offset + x * right;
      case_rows[p] = row_of(position + x);
    }
    if (++y < height) continue;
    y = 0;
    ++image;
  }
}

// What an item of a convolution's work covers: some panels of some pixels.
struct Item {
  int64_t first, count;  // pixels, numbered through the batch
  int64_t place;         // of the first in memory
  int64_t panel, end;    // panels of each group
  std::byte* memory;     // of its thread

  // The same in memory, of an output of so many channels: of several groups it has all panels.
  Part part(int64_t groups, int64_t channels) const {
    return {place, count, panel * kTileChannels, groups > 1 ? channels : std::min(end * kTileChannels, channels)};
  }
};

// Calls work(Item) for `block` pixels at a time of a span, and for `chunk` of the panels: all pixels pass by the same
// weights before the next ones.
template <class Work>
void for_items(const Call& call, const Span& span, int64_t block, int64_t panels, int64_t chunk, const Work& work) {
  const int64_t blocks = ceil_div(span.count, block);
  call.pool.run(static_cast<size_t>(blocks * ceil_div(panels, chunk)), [&](size_t number, int thread) {
    const int64_t start = number % blocks * block, panel = number / blocks * chunk;
    work(Item{span.first + start, std::min(block, span.count - start), span.place + start, panel,
              std::min(panel + chunk, panels), call.thread_scratch + thread * call.thread_bytes});
  });
}

// Sums, or counts, that are there, of some panels of up to 32 pixels.
struct SumBlock {
  const BlockSums* sums;       // [panel]
  int64_t first_pixel, count;  // as they lie in memory
  const int64_t* case_rows;    // of each pixel, see locate
  int64_t group, first_panel, panels;
};

// The product loop that most convolutions share; T is float, uint64_t or int16_t.
template <class T>
class Product {
 public:
  static constexpr int64_t kRowBytes = kTilePixels * sizeof(T);  // of one tap in a whole tile

  // `depth` is channels (or words) per group; `weight_at(o, tap, d)` is the weight of output channel o. The input has
  // `sets` of planes, which all meet the same weights.
  template <class WeightAt>
  Product(const OpSpec& spec, const Shape& input, const Window& window, int64_t depth, const WeightAt& weight_at,
          int64_t sets = 1)
      : window_(window),
        groups_(spec.groups),
        channels_(spec.channels),
        set_planes_(groups_ * depth),
        planes_(sets * set_planes_),
        padded_height_(input.height + 2 * window.padding[0]),
        phases_(window.width > 1 ? window.stride[1] : 1),
        padded_width_(round_up(input.width + 2 * window.padding[1], phases_)),
        panels_(ceil_div(group_channels(), kTileChannels)) {
    for (int64_t x = 0; x < input.width; ++x) columns_.push_back(column(x + window.padding[1]));
    const int64_t kernel = window.kernel[0] * window.kernel[1];
    for (int64_t tap = 0; tap < kernel; ++tap)
      for (int64_t d = 0; d < depth; ++d)
        taps_.push_back((d * padded_height_ + tap / window.kernel[1] * window.dilation[0]) * padded_width_ +
                        column(tap % window.kernel[1] * window.dilation[1]));
    weights_.assign(groups_ * panels_ * taps_.size() * kTileChannels, T{});
    for (int64_t o = 0; o < channels_; ++o) {
      const int64_t inside = o % group_channels();
      T* weights = weights_.data() + panel_start(o / group_channels(), inside / kTileChannels) + inside % kTileChannels;
      for (int64_t tap = 0; tap < kernel; ++tap)
        for (int64_t d = 0; d < depth; ++d, weights += kTileChannels) *weights = weight_at(o, tap, d);
    }
  }

  // From now on, the words of weights and of gathered pixels are what these kernels read.
  void prepare_words(const Kernels& kernels)
    requires std::is_same_v<T, uint64_t>
  {
    prepare_ = kernels.prepare_words;
    if (prepare_ == nullptr) return;
    for (int64_t number = 0; number < groups_ * panels_; ++number)
      prepare_(weights_.data() + panel_start(0, number), taps_.size(), kTileChannels);
  }

  int64_t channels() const { return channels_; }
  int64_t group_channels() const { return channels_ / groups_; }
  int64_t panels() const { return panels_; }  // of one group
  int64_t planes() const { return planes_; }
  int64_t plane_size() const { return padded_height_ * padded_width_; }
  int64_t planes_bytes() const { return round_up(planes_ * plane_size() * sizeof(T) + kRowBytes, kAlignment); }
  const std::vector<int64_t>& taps() const { return taps_; }
  Span span(const Call& call) const { return call.span(window_.height, window_.width); }
  int64_t block_bytes() const { return block_tiles() * kTilePixels * taps_.size() * sizeof(T) + kRowBytes; }

  // Fills the planes; spread(row y of an image, line, columns) must write every plane's element of input pixel (y, x)
  // to line[plane * plane_size() + columns[x]].
  template <class Spread>
  void fill_planes(const Call& call, const Shape& input, const Spread& spread) const {
    if (!call.begins()) return;
    call.pool.run(static_cast<size_t>(call.batch * padded_height_), [&](size_t row, int) {
      T* line = planes_of(call, row / padded_height_) + row % padded_height_ * padded_width_;
      const int64_t y = static_cast<int64_t>(row % padded_height_) - window_.padding[0];
      const bool inside = y >= 0 && y < input.height;
      if (!inside || padded_width_ > input.width)
        for (int64_t plane = 0; plane < planes_; ++plane) std::fill_n(line + plane * plane_size(), padded_width_, T{});
      if (inside) spread(row / padded_height_ * input.height + y, line, columns_.data());
    });
  }

  // Calls emit(tile, first pixel, case rows, group, panel) for every tile: pixels are numbered as they lie in memory,
  // and for the rows see locate. Before the tiles of an item of work, begin(Part) is called. A tile has `step` panels
  // from the one that is named on, or what is left of the item's.
  template <class Begin, class RowOf, class Emit>
  void run(const Call& call, const Begin& begin, const RowOf& row_of, const Emit& emit, int64_t step = 1) const {
    const Span span = this->span(call);
    const int64_t block = block_pixels(span.count, call.pool.size());
    const int64_t blocks = ceil_div(span.count, block);
    const int64_t chunk_panels = groups_ == 1 ? panels_at_once(panels_, blocks, call.pool.size()) : panels_;
    const auto depth = taps_.size();
    for_items(call, span, block, panels_, chunk_panels, [&](const Item& item) {
      T* gathered = reinterpret_cast<T*>(item.memory);
      const int64_t count = item.count;
      const Part part = item.part(groups_, channels_);
      begin(part);
      int64_t offsets[kBlockTiles * kTilePixels], case_rows[kBlockTiles * kTilePixels];
      locate(item, row_of, offsets, case_rows);
      for (int64_t group = 0; group < groups_; ++group) {
        const T* plane = static_cast<const T*>(call.scratch) + group * (set_planes_ / groups_) * plane_size();
        for (int64_t p = 0; p < count; p += kTilePixels) {
          const int size = static_cast<int>(std::min<int64_t>(kTilePixels, count - p));
          if (!in_place(offsets + p, size)) gather(plane, offsets + p, size, gathered + p * depth);
        }
        for (int64_t number = item.panel; number < item.end; number += step) {
          const int size_panels = static_cast<int>(std::min(step, item.end - number));
          for (int64_t p = 0; p < count; p += kTilePixels) {
            const int size = static_cast<int>(std::min<int64_t>(kTilePixels, count - p));
            const bool whole = in_place(offsets + p, size);
            const T* pixels = whole ? plane + offsets[p] : gathered + p * depth;
            emit(Tile<T>{pixels, panel(group, number), depth, size, size_panels, whole ? taps_.data() : nullptr},
                 part.first + p, case_rows + p, group, number);
          }
        }
      }
      call.done(part);
    });
  }

  // Calls compute(tile, panel) for those panels of a tile that are full, and for one that is not.
  template <class Compute>
  void for_full_panels(const Tile<T>& tile, int64_t panel, const Compute& compute) const {
    for (int64_t done = 0, size; done < tile.panels; done += size) {
      size = full_panels(group_channels(), panel + done, tile.panels - done);
      const T* weights = tile.weights + done * tile.depth * kTileChannels;
      compute(Tile<T>{tile.pixels, weights, tile.depth, tile.count, static_cast<int>(size), tile.taps}, panel + done);
    }
  }

  const T* panel(int64_t group, int64_t number) const { return weights_.data() + panel_start(group, number); }
  T* planes_of(const Call& call, int64_t image, int64_t set = 0) const {
    return static_cast<T*>(call.scratch) + image * (planes_bytes() / sizeof(T)) + set * set_planes_ * plane_size();
  }

  // Of the pixels of an item.
  template <class RowOf>
  void locate(const Item& item, const RowOf& row_of, int64_t* offsets, int64_t* case_rows) const {
    lowbit::locate(window_, window_.stride[0] * padded_width_, 1, planes_bytes() / sizeof(T), item.first, item.count,
                   row_of, offsets, case_rows);
  }

  // Whether up to 8 pixels, or what they see, need not be gathered: they are neighbours, and floats.
  static bool in_place(const int64_t* pixels, int count) {
    return std::is_same_v<T, float> && pixels[count - 1] == pixels[0] + count - 1;
  }

  // What up to 8 pixels see, as a tile has it. Runs of neighbours are copied whole, with what lies behind them: the
  // next copy writes over that, and behind the last tap, as behind the last plane, there are kRowBytes for it.
  void gather(const T* plane, const int64_t* pixels, int count, T* const tile) const {
    int starts[kTilePixels], runs = 0;
    for (int p = 0; p < count; ++p)
      if (p == 0 || pixels[p] != pixels[p - 1] + 1) starts[runs++] = p;
    const auto copy = [&](const auto& of_tap) {
      T* row = tile;
      for (const int64_t tap : taps_) {
        of_tap(plane + tap, row);
        row += count;
      }
    };
    if (const int64_t first = pixels[0]; runs == 1)  // as mostly, without a loop in the loop
      copy([&](const T* from, T* row) { std::memcpy(row, from + first, kRowBytes); });
    else
      copy([&](const T* from, T* row) {
        for (int run = 0; run < runs; ++run) std::memcpy(row + starts[run], from + pixels[starts[run]], kRowBytes);
      });
    if constexpr (std::is_same_v<T, uint64_t>)
      if (prepare_ != nullptr) prepare_(tile, taps_.size(), count);
  }

 private:
  // Where a row has the padded image's column x.
  int64_t column(int64_t x) const { return x % phases_ * (padded_width_ / phases_) + x / phases_; }

  size_t panel_start(int64_t group, int64_t number) const {
    return (group * panels_ + number) * taps_.size() * kTileChannels;
  }

  int64_t block_tiles() const {
    return std::clamp<int64_t>(kBlockBytes / (taps_.size() * kTilePixels * sizeof(T)), 1, kBlockTiles);
  }

  // Pixels per item of work: a whole block, or less so that every thread gets some.
  int64_t block_pixels(int64_t pixels, int threads) const {
    if (threads == 1) return block_tiles() * kTilePixels;
    const int64_t tiles = ceil_div(pixels, kTilePixels);
    return std::clamp<int64_t>(tiles / (2 * threads), 1, block_tiles()) * kTilePixels;
  }

  Window window_;
  int64_t groups_, channels_, set_planes_, planes_, padded_height_, phases_, padded_width_, panels_;
  std::vector<int64_t> taps_, columns_;
  Buffer<T> weights_;  // [group][panel][tap][16], zero beyond the last channel
  decltype(Kernels::prepare_words) prepare_ = nullptr;
};

// Checks what all convolutions have in common; returns input channels per group.
inline int64_t group_depth(const OpSpec& spec, const Shape& input, const Window& window) {
  require(spec.channels >= 1 && spec.channels <= kMaxExtent && spec.groups >= 1 && spec.groups <= kMaxExtent,
          "channels or groups are out of range");
  require(spec.channels % spec.groups == 0 && input.channels % spec.groups == 0,
          "the groups divide the channels unevenly");
  const int64_t depth = input.channels / spec.groups;
  require(spec.kernel[0] * spec.kernel[1] <= kMaxTaps / depth, "the sum has too many products");
  require(window.height * window.width * spec.channels <= kMaxElements, "the output is too large");
  return depth;
}

// A table per output channel (and per border case), padded to whole panels of each group: a kernel reads 16 channels.
template <class T>
class PerChannel {
 public:
  PerChannel(int64_t channels, int64_t groups, T fill, int64_t cases = 1)
      : group_channels_(channels / groups),
        padded_(round_up(group_channels_, kTileChannels)),
        case_size_(groups * padded_),
        values_(cases * case_size_, fill) {}

  T& at(int64_t channel, int64_t number = 0) {
    return values_[number * case_size_ + channel / group_channels_ * padded_ + channel % group_channels_];
  }
  const T* panel(int64_t group, int64_t panel, int64_t number = 0) const {
    return values_.data() + row(number) + group * padded_ + panel * kTileChannels;
  }
  int64_t row(int64_t number) const { return number * case_size_; }  // from the first case

 private:
  int64_t group_channels_, padded_, case_size_;
  Buffer<T> values_;
};

// What codes stand for: multiplier * code + offset, in an int16.
struct IntegerGrid {
  int64_t multiplier, offset, largest;  // largest: of the absolute values

  IntegerGrid(int64_t multiplier, int64_t offset, int64_t bits) : multiplier(multiplier), offset(offset) {
    require(bits >= 1 && bits <= 8, "codes must have 1 to 8 bits");
    require(multiplier >= 1 && multiplier <= kMaxInteger && offset >= -kMaxInteger && offset <= kMaxInteger,
            "a grid is out of range");
    largest = std::max(std::abs(offset), std::abs(integer((1 << bits) - 1)));
    require(largest <= kMaxInteger, "a grid is out of range");
  }

  int64_t integer(int64_t code) const { return multiplier * code + offset; }
};

// The weight's codes as the integers that they stand for, checked: |multiplier * code + offset| <= kMaxInteger.
class WeightCodes {
 public:
  WeightCodes(const OpSpec& spec, int64_t terms)
      : grid_(spec.weight_multiplier, spec.weight_offset, spec.weight_width),
        width_(spec.weight_width),
        words_(ceil_div(terms * width_, 64)),
        codes_(tensor<uint64_t>(spec, "weight_codes", {spec.channels, words_})) {}

  int64_t largest() const { return grid_.largest; }
  bool are_signs() const { return width_ == 1 && grid_.multiplier == 2 && grid_.offset == -1; }

  // The integer of output channel o's weight number n.
  int64_t at(int64_t o, int64_t n) const { return grid_.integer(static_cast<int64_t>(code(o, n))); }

  // Its code, which may cross into the next word.
  uint64_t code(int64_t o, int64_t n) const {
    const int64_t bit = n * width_, shift = bit % 64;
    const uint64_t* word = codes_.data() + o * words_ + bit / 64;
    uint64_t code = word[0] >> shift;
    if (shift + width_ > 64) code |= word[1] << (64 - shift);
    return code & ((uint64_t{1} << width_) - 1);
  }

 private:
  IntegerGrid grid_;
  int64_t width_, words_;
  std::span<const uint64_t> codes_;
};

// sum * scale + bias into (pixel, channel).
class FloatEpilogue {
 public:
  FloatEpilogue(const OpSpec& spec, const char* scale_name)
      : channels_(spec.channels),
        group_channels_(spec.channels / spec.groups),
        scale_(channels_, spec.groups, 0.0f),
        bias_(channels_, spec.groups, 0.0f) {
    const auto bias = bias_of(spec, channels_);
    for (int64_t c = 0; c < channels_; ++c) {
      scale_.at(c) = scale_name == nullptr ? 1.0f : tensor<float>(spec, scale_name, {channels_})[c];
      bias_.at(c) = bias[c];
    }
  }

  // A tile of its own: [pixel][16], spare channels included.
  FloatOutput tile(float* values, int64_t group, int64_t panel) const {
    return {scale_.panel(group, panel), bias_.panel(group, panel), values, kTileChannels};
  }

  // Calls compute(FloatOutput) for the tile at (pixel, group, panel), or for full_panels from that one on; a panel that
  // is not full goes by way of a copy. What compute writes comes to `added`, if that is given, which lies as the output
  // does.
  template <class Compute>
  void emit(float* output, int64_t pixel, int count, int64_t group, int64_t panel, const Compute& compute,
            const float* added = nullptr) const {
    const int64_t inside = panel * kTileChannels, wanted = std::min<int64_t>(kTileChannels, group_channels_ - inside);
    const int64_t at = pixel * channels_ + group * group_channels_ + inside;
    const float *scale = scale_.panel(group, panel), *bias = bias_.panel(group, panel);
    if (added != nullptr) added += at;
    if (wanted == kTileChannels) return compute(FloatOutput{scale, bias, output + at, channels_, added});
    float values[kTilePixels * kTileChannels];
    compute(tile(values, group, panel));
    for (int p = 0; p < count; ++p)
      for (int64_t c = 0; c < wanted; ++c) {
        const float value = values[p * kTileChannels + c];
        output[at + p * channels_ + c] = added == nullptr ? value : value + added[p * channels_ + c];
      }
  }

 private:
  int64_t channels_, group_channels_;
  PerChannel<float> scale_, bias_;
};

// The code of one channel of a pixel of the input; pixels are numbered through the batch.
inline int64_t code_at(const Call& call, const Shape& input, int64_t pixel, int64_t channel) {
  if (input.bits != 1) return call.input<uint8_t>()[pixel * input.channels + channel];
  return call.input<uint64_t>()[pixel * input.words() + channel / 64] >> channel % 64 & 1;
}

// Adds 16 or 32 bits of each of some pixels, `pitch` words apart, to words that were cleared; the first is `channel`.
// Bits beyond the last word are zeros.
template <class Bits>
void add_bits(uint64_t* words, int64_t pitch, int64_t channel, const Bits* bits, int count) {
  constexpr int64_t kWidth = 8 * sizeof(Bits);
  const int64_t shift = channel % 64;
  words += channel / 64;
  for (int p = 0; p < count; ++p) words[p * pitch] |= uint64_t{bits[p]} << shift;
  if (shift + kWidth <= 64) return;
  for (int p = 0; p < count; ++p)
    if (const uint64_t rest = uint64_t{bits[p]} >> (64 - shift); rest != 0) words[p * pitch + 1] |= rest;
}

// To be called before the tiles of some channels of some pixels, for codes of any number of bits: clears the words that
// 1-bit ones fall into, for the bits of a pixel are joined to words piece by piece.
inline auto clearing(const Call& call, const Shape& output) {
  return [&](const Part& part) {
    if (output.bits != 1) return;
    for (int64_t p = part.first; p < part.first + part.count; ++p) {
      uint64_t* words = call.result<uint64_t>() + p * output.words();
      std::fill(words + part.channel / 64, words + ceil_div(part.end, 64), 0);
    }
  };
}

inline constexpr auto kNoBegin = [](const Part&) {};
inline constexpr auto kOneRow = [](int64_t) { return int64_t{0}; };  // of a table without border cases, or of none

}  // namespace lowbit
