// The product of codes with weights of one bit where the instruction set multiplies matrices.
//
// A copy of the input has a byte for each code, and a row of whole 64s for a pixel. What outputs of one image see under
// a tap lies in such rows, in the order of the outputs, and is multiplied where it lies. Lines have a border of zeros,
// and rows that go on from one line to the next make something of it that is left. Where they are short there is a
// copy of them for each column of taps instead, without a border.
#pragma once

#include <bit>

#include "convolution.h"

namespace lowbit {

class MatrixBlocks {
 public:
  static bool fits(const OpSpec& spec, const Shape& input, const Window& window, const MatrixKernels* kernels) {
    return kernels != nullptr && spec.groups == 1 && spec.channels > kTileChannels &&
           window.kernel[0] * window.kernel[1] * row_bytes(input) <= kMostTerms &&
           Layout(input, window).rows() * row_bytes(input) <= kMostBytes;
  }

  // Bit i of weight_at(o, tap, word) is set where the weight of channel 64 * word + i is 1, else it is -1. Where
  // `differ`, sums begin with the number of the latter: of 1-bit codes they then count those of 1 whose weight is 1 and
  // those of 0 whose weight is -1.
  template <class WeightAt>
  MatrixBlocks(const OpSpec& spec, const Shape& input, const Window& window, const WeightAt& weight_at, bool differ,
               const MatrixKernels& kernels)
      : kernels_(kernels),
        input_(input),
        window_(window),
        layout_(input, window),
        row_bytes_(row_bytes(input)),
        channels_(spec.channels),
        panels_(ceil_div(channels_, kTileChannels)),
        starts_(panels_ * kTileChannels, 0) {
    const int64_t words = input.words(), taps = window.kernel[0] * window.kernel[1];
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t word = 0; word < words; ++word)
        taps_.push_back(layout_.of_tap(window, tap) * row_bytes_ + 64 * word);
    weights_.assign(panels_ * taps * words * kMatrixWeights, 0xff);  // of spare channels: no sum is below its start
    for (int64_t o = 0; o < channels_; ++o) {
      const int64_t panel = o / kTileChannels, c = o % kTileChannels;
      for (int64_t k = 0; k < taps * words; ++k) {
        const uint64_t bits = weight_at(o, k / words, k % words);
        if (differ) starts_[o] += std::popcount(~bits);
        uint8_t* weights = weights_.data() + (panel * taps * words + k) * kMatrixWeights + 4 * c;
        for (int i = 0; i < 4; ++i) {
          const uint64_t fourths = every_fourth(bits >> i);
          weights[i] = static_cast<uint8_t>(fourths);
          weights[4 * kTileChannels + i] = static_cast<uint8_t>(fourths >> 32);
        }
      }
    }
  }

  // Whole tiles are read, also of the last rows.
  int64_t scratch_bytes() const { return (layout_.rows() + kMatrixTile - 1) * row_bytes_; }
  int64_t thread_scratch_bytes() const { return kMatrixBlocks * kPanelsPerChunk * sizeof(BlockSums); }

  void fill(const Call& call) const {
    if (!call.begins()) return;
    const int64_t lines = input_.height + 2 * window_.padding[0];
    call.pool.run(static_cast<size_t>(call.batch * lines), [&](size_t number, int) {
      const int64_t image = number / lines, line = number % lines, y = line - window_.padding[0];
      for (int64_t part = 0; part < layout_.parts; ++part) {
        const int64_t row = image * layout_.rows() + layout_.of_line(part, line);
        uint8_t* bytes = static_cast<uint8_t*>(call.scratch) + row * row_bytes_;
        if (y >= 0 && y < input_.height)
          fill_line(call, image * input_.height + y, layout_.first(window_, part), bytes);
        else
          std::fill_n(bytes, layout_.columns * row_bytes_, uint8_t{0});
      }
    });
  }

  // Calls begin(Part) for every item of work, and emit(SumBlock) for pixels of it that lie together. Channels begin
  // with a word of bits.
  template <class Begin, class RowOf, class Emit>
  void run(const Call& call, const Begin& begin, const RowOf& row_of, const Emit& emit) const {
    const Span span = call.span(window_.height, window_.width);
    if (span.count == 0) return;
    const int64_t threads = call.pool.size(), blocks = ceil_div(span.count, kMatrixPixels);
    const int64_t chunk_panels = panels_at_once(panels_, blocks, static_cast<int>(threads));
    const int64_t parts = threads == 1 ? 1 : ceil_div(2 * threads, ceil_div(panels_, chunk_panels));
    for_items(call, span, ceil_div(blocks, parts) * kMatrixPixels, panels_, chunk_panels, [&](const Item& item) {
      const Part part = item.part(1, channels_);
      begin(part);
      kernels_.begin();
      for (int64_t done = 0, pixels; done < item.count; done += pixels) {
        const Rows rows = rows_from(item.first + done, item.count - done, row_of);
        const int64_t pixel = item.place + done;
        pixels = rows.pixels;
        for (int64_t panel = item.panel; panel < item.end; panel += kPanelsPerChunk)
          multiply(call, rows, pixel, panel, std::min(panel + kPanelsPerChunk, item.end), item.memory, emit);
        call.done({pixel, pixels, part.channel, part.end});
      }
      kernels_.end();
    });
  }

 private:
  static constexpr int64_t kMostBytes = 64 << 20;  // of an image
  static constexpr int64_t kMostTerms = 1 << 16;   // of a sum
  static constexpr int64_t kShortLine = 5;

  // Where the rows of an image lie: [phase or copy][line][column]. For a stride of s, lines 0, s, 2s, ... come first,
  // then 1, s + 1, ..., so that those of outputs follow each other, and so do columns, unless lines are short: then
  // copy number i has what the outputs of a line see under column i of the taps.
  struct Layout {
    bool copies;
    int64_t phases, phase_lines, parts, columns;  // phases: of lines; parts: phases of columns, or copies

    Layout(const Shape& input, const Window& window)
        : copies(window.width < kShortLine),
          phases(window.height > 1 ? window.stride[0] : 1),
          phase_lines(ceil_div(input.height + 2 * window.padding[0], phases)),
          parts(copies ? window.kernel[1] : window.stride[1]),
          columns(copies ? window.width : ceil_div(input.width + 2 * window.padding[1], parts)) {}

    int64_t rows() const { return parts * phases * phase_lines * columns; }
    int64_t of_line(int64_t part, int64_t line) const {
      return ((part * phases + line % phases) * phase_lines + line / phases) * columns;
    }
    int64_t of_tap(const Window& window, int64_t tap) const {
      const int64_t line = tap / window.kernel[1] * window.dilation[0], number = tap % window.kernel[1];
      if (copies) return of_line(number, line);
      const int64_t column = number * window.dilation[1];
      return of_line(column % parts, line) + column / parts;
    }
    // The column of the input that the first one of a part is.
    int64_t first(const Window& window, int64_t part) const {
      return (copies ? part * window.dilation[1] : part) - window.padding[1];
    }
  };

  // Outputs whose sums lie side by side: the first of them, and the row that it is.
  struct Run {
    int64_t first, count, row;
  };

  // What outputs see of a tap: rows of bytes from `start` on, and which of them are outputs.
  struct Rows {
    int64_t start, case_rows[kMatrixPixels], pixels = 0;
    int count = 0, run_count = 0;
    Run runs[kMatrixPixels];
  };

  // Bits 0, 4, ..., 28 side by side, and bits 32, 36, ..., 60 from bit 32 on.
  static uint64_t every_fourth(uint64_t bits) {
    bits &= 0x1111111111111111;
    bits = (bits | bits >> 3) & 0x0303030303030303;
    bits = (bits | bits >> 6) & 0x000f000f000f000f;
    return (bits | bits >> 12) & 0x000000ff000000ff;
  }

  static int64_t row_bytes(const Shape& input) { return round_up(input.channels, 64); }

  // From column `first` of a line of the input on, which may lie in the border.
  void fill_line(const Call& call, int64_t line, int64_t first, uint8_t* bytes) const {
    const int64_t stride = window_.stride[1], columns = layout_.columns;
    const int64_t begin = std::min(ceil_div(std::max<int64_t>(-first, 0), stride), columns);
    const int64_t end = std::clamp(ceil_div(std::max<int64_t>(input_.width - first, 0), stride), begin, columns);
    std::fill_n(bytes, begin * row_bytes_, uint8_t{0});
    std::fill_n(bytes + end * row_bytes_, (columns - end) * row_bytes_, uint8_t{0});
    const int64_t pixel = line * input_.width + first, step = stride == 1 ? end - begin : 1;
    for (int64_t column = begin; column < end; column += step)
      copy(call, pixel + column * stride, step, bytes + column * row_bytes_);
  }

  // Pixels that lie side by side.
  void copy(const Call& call, int64_t pixel, int64_t count, uint8_t* bytes) const {
    if (input_.bits == 1)
      kernels_.spread(call.input<uint64_t>() + pixel * input_.words(), static_cast<size_t>(count * input_.words()),
                      bytes);
    else
      std::copy_n(call.input<uint8_t>() + pixel * input_.channels, count * row_bytes_, bytes);
  }

  // As many of the outputs from `first` on, up to `most`, as a product's rows have.
  template <class RowOf>
  Rows rows_from(int64_t first, int64_t most, const RowOf& row_of) const {
    Rows rows;
    int64_t offsets[kMatrixPixels];
    most = std::min<int64_t>(most, kMatrixPixels);
    locate(window_, layout_.columns, 1, layout_.rows(), first, most, row_of, offsets, rows.case_rows);
    rows.start = offsets[0];
    for (; rows.pixels < most; ++rows.pixels) {
      const int64_t row = offsets[rows.pixels] - rows.start;
      if (row >= kMatrixPixels || row >= rows.count + kMatrixTile) break;
      if (row == 0 || row != rows.count || row % kBlockPixels == 0)  // sums of kBlockPixels rows lie together
        rows.runs[rows.run_count++] = {rows.pixels, 0, row};
      ++rows.runs[rows.run_count - 1].count;
      rows.count = static_cast<int>(row) + 1;
    }
    return rows;
  }

  // Multiplies some panels, and calls emit for each run; `pixel` is where the first output lies.
  template <class Emit>
  void multiply(const Call& call, const Rows& rows, int64_t pixel, int64_t panel, int64_t end, std::byte* memory,
                const Emit& emit) const {
    auto* sums = reinterpret_cast<BlockSums*>(memory);
    const int64_t panels = end - panel;
    kernels_.multiply({static_cast<const uint8_t*>(call.scratch) + rows.start * row_bytes_, row_bytes_, taps_.data(),
                       taps_.size(), rows.count, weights_.data() + panel * taps_.size() * kMatrixWeights,
                       starts_.data() + panel * kTileChannels, static_cast<int>(panels)},
                      sums);
    for (int i = 0; i < rows.run_count; ++i) {
      const Run& run = rows.runs[i];
      const BlockSums* block = sums + run.row / kBlockPixels * panels;
      const auto* of_run = reinterpret_cast<const BlockSums*>(block[0] + run.row % kBlockPixels);
      emit(SumBlock{of_run, pixel + run.first, run.count, rows.case_rows + run.first, 0, panel, panels});
    }
  }

  const MatrixKernels& kernels_;
  Shape input_;
  Window window_;
  Layout layout_;
  int64_t row_bytes_, channels_, panels_;
  std::vector<int64_t> taps_;  // in bytes
  Buffer<uint8_t> weights_;    // as MatrixProduct has them
  Buffer<int32_t> starts_;
};

}  // namespace lowbit
