// The table of inner loops. One file = one instruction set; scalar.cpp is the reference and fills every entry.
//
// All of them work on tiles: up to 8 pixels times 16 output channels. The pixels' inputs are gathered as
// pixels[depth][count], the weights as weights[depth][16], so that every kernel reads memory straight through, whatever
// the convolution's stride, dilation or border. Floats may stay where they are.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowbit {

inline constexpr int kTilePixels = 8;
inline constexpr int kTileChannels = 16;

template <class T>
struct Tile {
  const T* pixels;
  const T* weights;
  size_t depth;
  int count;       // pixels in this tile, 1 to 8
  int panels = 1;  // of 16 channels, one after the other: any number for binary_floats, see Kernels::float_panels

  // Where each of `depth` inputs of the first pixel lies behind `pixels`, and those of the others next to it; or null,
  // where they are gathered. For floats only.
  const int64_t* taps = nullptr;

  const T* at(size_t k) const { return pixels + (taps != nullptr ? taps[k] : static_cast<int64_t>(k) * count); }
};

using BinaryTile = Tile<uint64_t>;  // depth in 64-bit words, see Kernels::prepare_words
using FloatTile = Tile<float>;
using IntegerTile = Tile<int16_t>;  // what codes stand for: multiplier * code + offset, and 0 outside the image

// Where a tile's floats go: y = sum * scale + bias, each one rounding; pixel p's channels start at output + p * stride.
// What sums of integers become may be added to other floats, one more rounding, which lie as the output does, or in its
// place.
struct FloatOutput {
  const float* scale;
  const float* bias;
  float* output;
  ptrdiff_t stride;
  const float* added = nullptr;  // for binary_floats, CountKernels::floats and ByteKernels::floats
};

// A binary product by blocks: up to 32 pixels meet 32 or 64 channels, too many for the tiles above. Weights are laid
// out for it when a file is loaded, pixels when they are used.
inline constexpr int kBlockPixels = 32;

// Sums or counts of one panel: [pixel][channel].
using BlockSums = int32_t[kBlockPixels][kTileChannels];

struct BlockKernels {
  static constexpr int kMostPanels = 4;

  int panels;         // whose weights lie together: 2 or 4
  size_t mask_bytes;  // that a word of each of their channels becomes

  // Where words[panels][16] go, one of each channel.
  void (*arrange_weights)(const uint64_t* words, std::byte* masks);

  size_t (*pixel_bytes)(size_t depth);  // of one block, what arrange_pixels writes

  // Reads word k of pixel p, up to 32 of them, at plane[taps[k] + pixels[p]].
  void (*arrange_pixels)(const uint64_t* plane, const int64_t* taps, size_t depth, const int64_t* pixels, int count,
                         std::byte* arranged);

  // counts[panel][p][c] = number of bits in which pixel p and channel c of the panel differ. Of all panels some lie
  // together: masks[those][depth][mask_bytes].
  void (*count)(const std::byte* arranged, const std::byte* masks, size_t depth, int count, int panels,
                BlockSums* counts);
};

// What sums, or counts, are held against: those of pixel p against limits[places[p] + c]. All go on to the last panel.
struct SumLimits {
  const int32_t* limits;
  const int64_t* places;
  const uint64_t* inverted;
};

// Bit c of pixel p's words, `pitch` of them after the one before's, = (sums[p][c] <= its limit) xor bit c of inverted;
// panels are kBlockPixels rows apart, and a last word is filled up with zeros.
using SumBits = void (*)(const int32_t (*sums)[kTileChannels], int count, int panels, const SumLimits&, uint64_t* words,
                         ptrdiff_t pitch);

// What becomes of counts.
struct CountKernels {
  SumBits bits;

  // As binary_floats, of up to 8 pixels; panels as above.
  void (*floats)(const int32_t (*counts)[kTileChannels], int count, int panels, const int32_t* const* bases,
                 const FloatOutput&);
};

// A product of codes, a byte each, with signed bytes, by blocks: up to 32 pixels meet any even number of panels. A
// pixel has its codes in a row, zeros or anything else up to `depth`, where the weights are zero; so weights are
// [panel][depth / 4][16][4].

// Sums of up to 8 pixels on their way out: multiplier * sums[p][c] + bases[p][c], modulo 2^32.
struct IntegerSums {
  const int32_t (*sums)[kTileChannels];
  int count;
  int32_t multiplier;
  const int32_t* const* bases;
  int panels = 1;  // any number for ByteKernels::floats: their sums are kBlockPixels rows apart, bases side by side
};

// What the integers of 16 channels are held against, [levels][16]: x >= thresholds, both with their bits flipped where
// the channel falls (flips all ones, else zero); thresholds come flipped already.
struct IntegerLimits {
  const int32_t* thresholds;
  const int32_t* flips;
  int levels;
};

// Thresholds that rise almost evenly, for as many values as lie in a row. Where v is a value with its bits flipped, its
// place is v * slope + start, two roundings, cut to low..high. The code is the place cut to an integer, unless that is
// within `slack` of the next or the last: then limits[rows + k], where k + 1 is the integer nearest to the place, says
// whether it is k or k + 1. Limits come flipped already.
template <class T>
struct Ramp {
  const float* slope;
  const float* start;
  const float* low;
  const float* high;
  const uint32_t* flips;
  const int32_t* rows;
  const T* limits;
  float slack;
  bool alike = false;  // all values are as the first one here
};

struct ByteKernels {
  int64_t depth_multiple;
  int64_t planes;  // binary products that take no longer than one of bytes

  // Pixel p's row, `depth` bytes after the one before, is made of `length` bytes from each of plane[runs[i] +
  // pixels[p]]. 64 bytes beyond what is read or written belong to the buffers.
  void (*arrange_pixels)(const uint8_t* plane, const int64_t* runs, size_t run_count, size_t length,
                         const int64_t* pixels, int count, size_t depth, uint8_t* arranged);

  // sums[panel][p][c] = sum of products. `pair` is a bound of what two neighbours add.
  void (*sums)(const uint8_t* pixels, const int8_t* weights, size_t depth, int count, int panels, int64_t pair,
               BlockSums* sums);

  // codes[p * stride + c] = how many limits the integer passes.
  void (*codes)(const IntegerSums&, const IntegerLimits&, uint8_t* codes, ptrdiff_t stride);

  // The same for 16 channels whose limits rise almost evenly.
  void (*ramp)(const IntegerSums&, const Ramp<int32_t>&, uint8_t* codes, ptrdiff_t stride);

  void (*floats)(const IntegerSums&, const FloatOutput&);

  SumBits bits;

  // A thread makes sums between these two; null where that is nothing.
  void (*begin)() = nullptr;
  void (*end)() = nullptr;
};

// A product of codes, a byte each, with weights of one bit, 1 where it is set and -1 where not: some panels of up to 80
// pixels, which lie in this many BlockSums.
inline constexpr int kMatrixPixels = 80, kMatrixBlocks = 3;
inline constexpr int kMatrixTile = 16;                         // pixels that are read at a time, whatever their number
inline constexpr int kMatrixWeights = 64 * kTileChannels / 8;  // bytes of 64 weights of 16 channels

struct MatrixProduct {
  // 64 codes of pixel p under tap k: pixels[taps[k] + p * step].
  const uint8_t* pixels;
  int64_t step;
  const int64_t* taps;
  size_t depth;
  int count;

  const uint8_t* weights;  // [panel][depth][2][16][4]: bit r of byte [h][c][i] is channel c's weight 32 h + 4 r + i
  const int32_t* starts;   // [panel][16], to which the products come
  int panels;
};

struct MatrixKernels {
  // Bit i of a word becomes the byte bytes[i] of 64, 0 or 1.
  void (*spread)(const uint64_t* words, size_t count, uint8_t* bytes);

  // A thread multiplies between these two.
  void (*begin)();
  void (*end)();

  // The sums of the first kBlockPixels pixels, panel by panel, then those of the next.
  void (*multiply)(const MatrixProduct&, BlockSums* sums);
};

// What channels are held against: x >= thresholds, both with their sign flipped (bit 31 of flips set) where the
// channel falls; thresholds come flipped already.
struct FloatLimits {
  const float* thresholds;
  const uint32_t* flips;
};

// Pixels whose channels, or some of them, lie together; from one pixel to the next it is `stride` floats.
struct Rows {
  size_t pixels, channels, stride;
};

// Float loops; a result may lie where an input does.
struct RowKernels {
  void (*add)(const float* a, const float* b, float* y, const Rows&);
  void (*affine)(const float* x, const float* scale, const float* shift, float* y, const Rows&);  // per channel
  void (*prelu)(const float* x, const float* slope, float* y, const Rows&);  // x, or slope * x where x is below 0
  void (*clamp)(const float* x, float low, float high, float* y, const Rows&);

  void (*divide)(const float* x, float divisor, float* y, const Rows&);

  // Of the same channel of `count` pixels, at least one, in this order. A tap may lie where the result does. The
  // minimum of a channel whose flip is -0, not 0.
  void (*maximum)(const float* const* taps, size_t count, const float* flips, float* y, size_t channels);
  void (*sum)(const float* const* taps, size_t count, float* y, size_t channels);

  // Planes, one for each channel, become pixels, which lie elsewhere. Returns whether all numbers are finite.
  bool (*interleave)(const float* planes, size_t pixels, size_t channels, float* y);
};

struct Kernels {
  const char* isa;

  // sums[p][c] -= count << shift, modulo 2^32: the number of bits in which pixel p and channel c differ, at most 2^24.
  void (*binary_subtract)(const BinaryTile&, int shift, int32_t (*sums)[kTileChannels]);

  // Bit c of bits[p] = (count <= limits[p][c]) xor bit c of inverted.
  void (*binary_bits)(const BinaryTile&, const int32_t* const* limits, uint16_t inverted, uint16_t* bits);

  // sum = bases[p][c] - 2 * count, for the channels of all panels of the tile.
  void (*binary_floats)(const BinaryTile&, const int32_t* const* bases, const FloatOutput&);

  // sum = sum of products, in the order of depth: the same bits wherever the pixel lies in its tile. Every instruction
  // set but scalar fuses a product with its sum into one rounding.
  void (*float_tile)(const FloatTile&, const FloatOutput&);

  // Bit c of bits[p] = what float_tile would write for pixel p and channel c passes its limit; no float is written.
  void (*float_tile_bits)(const FloatTile&, const FloatOutput&, const FloatLimits&, uint32_t* bits);

  // sums[p][c] = sum of products; the sum of their absolute values fits an int32, and none is -2^15.
  void (*integer_sums)(const IntegerTile&, int32_t (*sums)[kTileChannels]);

  // Bit c of a pixel's words, which begin `pitch` after those of the one before = x[c] passes its limit, as above. Tail
  // bits are zero.
  void (*float_bits)(const float* x, const FloatLimits&, const Rows&, uint64_t* words, size_t pitch);

  // codes[c] = how many of the limits thresholds[level * pitch + c] x[c] passes, as above.
  void (*float_codes)(const float* x, const float* thresholds, size_t pitch, const uint32_t* flips, size_t channels,
                      int levels, uint8_t* codes);

  // The codes of `count` values in a row.
  void (*float_ramp)(const float* x, const Ramp<float>&, size_t count, uint8_t* codes);

  const RowKernels* rows;

  // For binary products of more than a few pixels; null where the tiles are as good.
  const BlockKernels* blocks = nullptr;

  // For products of codes with weights that fit a byte; null where integer_sums is as good.
  const ByteKernels* bytes = nullptr;

  // Panels that float_tile and float_tile_bits take at once, 1 or 2.
  int float_panels = 1;

  // For what becomes of blocks or matrices.
  const CountKernels* counts = nullptr;

  // For products with weights of one bit; null where there is no unit for matrices.
  const MatrixKernels* matrices = nullptr;

  // What becomes of words[depth][count], pixels or weights, before binary_subtract, binary_bits and binary_floats read
  // them; null where they read words as they are.
  void (*prepare_words)(uint64_t* words, size_t depth, int count) = nullptr;
};

extern const Kernels kScalarKernels;
#ifdef LOWBIT_AVX2
extern const Kernels kAvx2Kernels;
#endif
#ifdef LOWBIT_AVX_VNNI
Kernels avx_vnni_kernels();  // the AVX2 kernels, and products of bytes
#endif
#ifdef LOWBIT_AVX512
extern const Kernels kAvx512Kernels;
#endif
#ifdef LOWBIT_AVX512_VPOPCNTDQ
extern const Kernels kAvx512VpopcntdqKernels;
#endif
#ifdef LOWBIT_NEON
extern const Kernels kNeonKernels;
#endif
#ifdef LOWBIT_AMX
Kernels amx_kernels();  // the AVX-512 kernels, and matrices
#endif

}  // namespace lowbit
