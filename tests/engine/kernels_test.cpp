// Every kernel table that this CPU runs against the scalar one, entry by entry, on random tiles. Prints the name of
// each table that is equal and what differs in the others; the exit status is 1 when something does.
// test_kernel_tables.py compiles it with the sanitizers: inputs are of the exact size, so that reading beyond them is
// seen.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "kernels/select.h"
#include "lowbit/engine.h"

namespace {

using namespace lowbit;

std::mt19937_64 random_bits(1);

int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }
float real() { return std::normal_distribution<float>()(random_bits); }

template <class T, class Make>
std::vector<T> filled(size_t size, const Make& make) {
  std::vector<T> values(size);
  for (T& value : values) value = make();
  return values;
}

template <class T>
struct TileData {
  std::vector<T> pixels, weights;
  Tile<T> tile;

  template <class Make>
  TileData(size_t depth, int count, const Make& pixel, const Make& weight)
      : pixels(filled<T>(depth * count, pixel)),
        weights(filled<T>(depth * kTileChannels, weight)),
        tile{pixels.data(), weights.data(), depth, count, 1} {}
};

// A table of 16 numbers for each pixel and panel.
struct TileRows {
  std::vector<std::vector<int32_t>> values;
  std::vector<const int32_t*> rows;

  template <class Make>
  TileRows(int count, const Make& make, int panels = 1) {
    for (int p = 0; p < count; ++p) values.push_back(filled<int32_t>(panels * kTileChannels, make));
    for (const auto& row : values) rows.push_back(row.data());
  }
};

// Of the exact size, at the start of a cache line, and all zero.
template <class T>
class Aligned {
 public:
  explicit Aligned(size_t size) : data_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64)))) {
    std::memset(static_cast<void*>(data_), 0, size * sizeof(T));
  }
  ~Aligned() { ::operator delete(data_, std::align_val_t(64)); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  T* data() { return data_; }

 private:
  T* data_;
};

// What a kernel writes, and what it must leave alone: rows beyond the last pixel, and what lies between rows.
constexpr int kStride = kTileChannels + 3;
template <class T>
using Results = std::vector<T>;

struct Comparison {
  const Kernels& kernels;
  bool equal = true;

  // Calls compute(table, results) for the scalar table and this one.
  template <class T, class Compute>
  void check(const char* entry, size_t depth, int count, size_t size, const Compute& compute) {
    Results<T> expected(size, T(77)), found = expected;
    compute(kScalarKernels, expected.data());
    compute(kernels, found.data());
    compare(entry, depth, count, expected, found);
  }

  template <class T>
  void compare(const char* entry, size_t depth, int count, const Results<T>& expected, const Results<T>& found) {
    if (std::memcmp(expected.data(), found.data(), expected.size() * sizeof(T)) == 0) return;
    std::printf("%s: %s differs from scalar at depth %zu, %d pixels\n", kernels.isa, entry, depth, count);
    equal = false;
  }
};

using Sums = int32_t (*)[kTileChannels];

// The words of a tile as a table's kernels read them.
struct Prepared {
  std::vector<uint64_t> pixels, weights;
  BinaryTile tile;

  Prepared(const Kernels& kernels, const BinaryTile& raw)
      : pixels(raw.pixels, raw.pixels + raw.depth * raw.count),
        weights(raw.weights, raw.weights + raw.depth * raw.panels * kTileChannels),
        tile{pixels.data(), weights.data(), raw.depth, raw.count, raw.panels} {
    if (kernels.prepare_words == nullptr) return;
    kernels.prepare_words(pixels.data(), raw.depth, raw.count);
    for (int panel = 0; panel < raw.panels; ++panel)
      kernels.prepare_words(weights.data() + panel * raw.depth * kTileChannels, raw.depth, kTileChannels);
  }
};

void check_binary(Comparison& comparison, size_t depth, int count) {
  const auto zeros = [] { return uint64_t{0}; };
  const auto any = [] { return random_bits(); };
  const TileData<uint64_t> mixed(depth, count, any, any);
  TileData<uint64_t> opposite(depth, count, zeros, zeros);
  for (uint64_t& word : opposite.weights) word = ~uint64_t{0};
  const auto shift = static_cast<int>(integer(0, 9));
  for (const BinaryTile& tile : {mixed.tile, opposite.tile}) {
    comparison.check<int32_t>("binary_subtract", depth, count, kTilePixels * kTileChannels,
                              [&](const Kernels& k, int32_t* out) {
                                k.binary_subtract(Prepared(k, tile).tile, shift, reinterpret_cast<Sums>(out));
                              });
    const auto middle = static_cast<int64_t>(32 * depth);
    const TileRows limits(count, [&] {
      constexpr int64_t kEnds[] = {INT32_MIN, -1, INT32_MAX};
      return static_cast<int32_t>(integer(0, 3) == 0 ? kEnds[integer(0, 2)] : middle + integer(-5, 5));
    });
    const auto inverted = static_cast<uint16_t>(random_bits());
    comparison.check<uint16_t>("binary_bits", depth, count, kTilePixels, [&](const Kernels& k, uint16_t* out) {
      k.binary_bits(Prepared(k, tile).tile, limits.rows.data(), inverted, out);
    });
  }
}

// Several panels at once, whose floats may be added to others, also in place.
void check_binary_floats(Comparison& comparison, size_t depth, int count, int panels) {
  const int channels = panels * kTileChannels, stride = channels + 3;
  const auto any = [] { return random_bits(); };
  const auto pixels = filled<uint64_t>(depth * count, any), weights = filled<uint64_t>(depth * channels, any);
  const BinaryTile tile{pixels.data(), weights.data(), depth, count, panels};
  const auto base = [] { return static_cast<int32_t>(integer(-(1 << 30), 1 << 30) >> integer(0, 30)); };
  const TileRows bases(count, base, panels);
  const auto scale = filled<float>(channels, real), bias = filled<float>(channels, real);
  const auto others = filled<float>((count - 1) * stride + channels, real);
  const auto check = [&](const auto& added) {
    comparison.check<float>("binary_floats", depth, count, kTilePixels * stride, [&](const Kernels& k, float* out) {
      k.binary_floats(Prepared(k, tile).tile, bases.rows.data(), {scale.data(), bias.data(), out, stride, added(out)});
    });
  };
  check([](float*) -> const float* { return nullptr; });
  check([&](float*) { return others.data(); });
  check([](float* out) { return out; });
}

// Pixels and channels by blocks, against the counts of every pixel and channel. Where `opposite`, every bit differs.
void check_blocks(Comparison& comparison, size_t depth, int count, int panels, bool opposite) {
  const BlockKernels& blocks = *comparison.kernels.blocks;
  const int64_t pitch = 2 * kBlockPixels;
  const auto plane = filled<uint64_t>(depth * pitch, [&] { return opposite ? ~uint64_t{0} : random_bits(); });
  std::vector<int64_t> taps(depth), pixels(count);
  for (size_t k = 0; k < depth; ++k) taps[k] = static_cast<int64_t>(k) * pitch;
  for (int64_t& pixel : pixels) pixel = integer(0, pitch - 1);
  std::shuffle(taps.begin(), taps.end(), random_bits);

  const auto weights =
      filled<uint64_t>(panels * depth * kTileChannels, [&] { return opposite ? uint64_t{0} : random_bits(); });
  Aligned<std::byte> masks(panels / blocks.panels * depth * blocks.mask_bytes);
  std::byte* mask = masks.data();
  for (int panel = 0; panel < panels; panel += blocks.panels)
    for (size_t k = 0; k < depth; ++k, mask += blocks.mask_bytes) {
      std::vector<uint64_t> words;
      for (int number = panel; number < panel + blocks.panels; ++number) {
        const uint64_t* of_panel = weights.data() + (number * depth + k) * kTileChannels;
        words.insert(words.end(), of_panel, of_panel + kTileChannels);
      }
      blocks.arrange_weights(words.data(), mask);
    }
  Aligned<std::byte> arranged(blocks.pixel_bytes(depth));
  Aligned<int32_t> counts(panels * kBlockPixels * kTileChannels);
  blocks.arrange_pixels(plane.data(), taps.data(), depth, pixels.data(), count, arranged.data());
  auto* found = reinterpret_cast<BlockSums*>(counts.data());
  blocks.count(arranged.data(), masks.data(), depth, count, panels, found);

  for (int p = 0; p < count; ++p) {
    Results<int32_t> expected(panels * kTileChannels), row(expected);
    for (int o = 0; o < panels * kTileChannels; ++o) {
      const uint64_t* words = weights.data() + o / kTileChannels * depth * kTileChannels + o % kTileChannels;
      for (size_t k = 0; k < depth; ++k)
        expected[o] += std::popcount(plane[taps[k] + pixels[p]] ^ words[k * kTileChannels]);
      row[o] = found[o / kTileChannels][p][o % kTileChannels];
    }
    comparison.compare("blocks.count", depth, count, expected, row);
  }
}

// Sums against limits just below them, at them and above, and at the ends; the words that lie between stay.
void check_sum_bits(Comparison& comparison, SumBits kernel, int count, int panels) {
  const int channels = panels * kTileChannels, words = (panels + 3) / 4, pitch = words + 1;
  Aligned<int32_t> memory(panels * kBlockPixels * kTileChannels);
  auto* sums = reinterpret_cast<BlockSums*>(memory.data());
  for (int i = 0; i < panels * kBlockPixels * kTileChannels; ++i)
    memory.data()[i] = static_cast<int32_t>(random_bits() >> integer(32, 60)) ^ static_cast<int32_t>(-integer(0, 1));
  const auto sum_of = [&](int p, int c) { return int64_t{sums[c / kTileChannels][p][c % kTileChannels]}; };

  std::vector<int64_t> places(count);
  for (int p = 0; p < count; ++p) places[p] = int64_t{p} * channels;
  std::shuffle(places.begin(), places.end(), random_bits);
  Results<int32_t> limits(count * channels);
  for (int p = 0; p < count; ++p)
    for (int c = 0; c < channels; ++c) {
      const int64_t ends[] = {INT32_MIN, -1, INT32_MAX};
      const int64_t limit = integer(0, 3) == 0 ? ends[integer(0, 2)] : sum_of(p, c) + integer(-1, 1);
      limits[places[p] + c] = static_cast<int32_t>(std::clamp<int64_t>(limit, INT32_MIN, INT32_MAX));
    }
  const auto inverted = filled<uint64_t>(words, [] { return random_bits(); });
  Results<uint64_t> expected(count * pitch, 77), written = expected;
  for (int p = 0; p < count; ++p) {
    std::copy_n(inverted.data(), words, expected.data() + p * pitch);
    for (int c = 0; c < channels; ++c)
      expected[p * pitch + c / 64] ^= static_cast<uint64_t>(sum_of(p, c) <= limits[places[p] + c]) << c % 64;
  }
  kernel(sums[0], count, panels, {limits.data(), places.data(), inverted.data()}, written.data(), pitch);
  comparison.compare("bits", panels, count, expected, written);
}

// Floats that counts become.
void check_count_floats(Comparison& comparison, int count, int panels) {
  const CountKernels& kernels = *comparison.kernels.counts;
  const int channels = panels * kTileChannels, stride = channels + 3;
  Aligned<int32_t> memory(panels * kBlockPixels * kTileChannels);
  auto* counts = reinterpret_cast<BlockSums*>(memory.data());
  for (int i = 0; i < panels * kBlockPixels * kTileChannels; ++i)
    memory.data()[i] = static_cast<int32_t>(integer(0, 1 << 24));
  const auto count_of = [&](int p, int c) { return counts[c / kTileChannels][p][c % kTileChannels]; };

  const TileRows bases(count, [] { return static_cast<int32_t>(integer(-(1 << 24), 1 << 24)); }, panels);
  const auto scale = filled<float>(channels, real), bias = filled<float>(channels, real);
  Results<float> expected(kTilePixels * stride, 77), written = expected;
  for (const bool adds : {false, true}) {  // to what was written before
    for (int p = 0; p < count; ++p)
      for (int c = 0; c < channels; ++c) {
        const float y = static_cast<float>(bases.rows[p][c] - 2 * count_of(p, c)) * scale[c] + bias[c];
        expected[p * stride + c] = adds ? y + expected[p * stride + c] : y;
      }
    kernels.floats(counts[0], count, panels, bases.rows.data(),
                   {scale.data(), bias.data(), written.data(), stride, adds ? written.data() : nullptr});
    comparison.compare("counts.floats", panels, count, expected, written);
  }
}

// Rows of codes with weights of one bit. Codes are the largest, and weights those of the channel's sign, or any.
void check_matrices(Comparison& comparison, size_t depth, int count, int panels, bool extreme) {
  const MatrixKernels& kernels = *comparison.kernels.matrices;
  const int64_t step = 64 * integer(1, 3), rows = 2 * kMatrixPixels;
  const auto plane = filled<uint8_t>(depth * 64 + rows * step, [&] { return extreme ? 255 : random_bits() & 255; });
  std::vector<int64_t> taps(depth);
  for (size_t k = 0; k < depth; ++k) taps[k] = static_cast<int64_t>(64 * k + integer(0, kMatrixPixels - 1) * step);
  std::shuffle(taps.begin(), taps.end(), random_bits);
  const int channels = panels * kTileChannels;
  const auto starts = filled<int32_t>(channels, [] { return static_cast<int32_t>(integer(-1000, 1 << 24)); });
  Aligned<uint8_t> weights(panels * depth * kMatrixWeights);
  for (size_t i = 0; i < panels * depth * kMatrixWeights; ++i)
    weights.data()[i] = extreme ? (i / 4 % 2 ? 255 : 0) : static_cast<uint8_t>(random_bits());

  Aligned<int32_t> memory(kMatrixBlocks * panels * kBlockPixels * kTileChannels);
  auto* sums = reinterpret_cast<BlockSums*>(memory.data());
  kernels.begin();
  kernels.multiply({plane.data(), step, taps.data(), depth, count, weights.data(), starts.data(), panels}, sums);
  kernels.end();
  for (int p = 0; p < count; ++p) {
    Results<int32_t> expected(starts), row(channels);
    for (int o = 0; o < channels; ++o) {
      const int c = o % kTileChannels;
      for (size_t n = 0; n < 64 * depth; ++n) {
        const size_t k = n / 64, at = n % 64;
        const uint8_t* packed = weights.data() + (o / kTileChannels * depth + k) * kMatrixWeights;
        const bool set = packed[(at / 32 * kTileChannels + c) * 4 + at % 4] >> at % 32 / 4 & 1;
        const int code = plane[taps[k] + p * step + at];
        expected[o] += set ? code : -code;
      }
      row[o] = sums[p / kBlockPixels * panels + o / kTileChannels][p % kBlockPixels][c];
    }
    comparison.compare("matrices.multiply", depth, count, expected, row);
  }
}

void check_spread(Comparison& comparison, size_t count) {
  const auto words = filled<uint64_t>(count, [] { return random_bits(); });
  Aligned<uint8_t> bytes(64 * count);
  comparison.kernels.matrices->spread(words.data(), count, bytes.data());
  Results<uint8_t> expected(64 * count), written(bytes.data(), bytes.data() + 64 * count);
  for (size_t i = 0; i < expected.size(); ++i) expected[i] = words[i / 64] >> i % 64 & 1;
  comparison.compare("matrices.spread", count, 1, expected, written);
}

// Rows of codes with signed bytes, from a plane whose codes are the largest that `bits` give, or any.
void check_bytes(Comparison& comparison, size_t length, size_t run_count, int bits, int64_t largest, int count,
                 int panels) {
  const ByteKernels& bytes = *comparison.kernels.bytes;
  constexpr size_t kSlack = 64;
  const size_t terms = length * run_count, multiple = bytes.depth_multiple;
  const size_t depth = (terms + multiple - 1) / multiple * multiple;
  const int64_t top = (1 << bits) - 1, pair = 2 * top * largest;
  const auto ends = [](int64_t low, int64_t high) {
    return integer(0, 2) == 0 ? (integer(0, 1) ? high : low) : integer(low, high);
  };
  const bool extreme = integer(0, 1) == 0;  // every product the largest, of one sign: sums that would saturate
  const auto plane = filled<uint8_t>(4 * length + 200 + kSlack, [&] { return extreme ? top : ends(0, top); });
  const auto runs = filled<int64_t>(run_count, [&] { return integer(0, 3 * static_cast<int64_t>(length)); });
  const auto pixels = filled<int64_t>(count, [] { return integer(0, 200); });
  std::vector<int> weights(panels * kTileChannels * depth);  // [channel][depth]
  for (int o = 0; o < panels * kTileChannels; ++o)
    for (size_t k = 0; k < terms; ++k)
      weights[o * depth + k] = static_cast<int>(extreme ? (o % 2 ? largest : -largest) : ends(-largest, largest));
  Aligned<int8_t> arranged_weights(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const size_t o = i / depth, k = i % depth;
    arranged_weights.data()[(o / 16 * depth + k / 4 * 4) * 16 + o % 16 * 4 + k % 4] = static_cast<int8_t>(weights[i]);
  }
  Aligned<uint8_t> arranged(kBlockPixels * depth + kSlack);
  Aligned<int32_t> sums(panels * kBlockPixels * kTileChannels);
  bytes.arrange_pixels(plane.data(), runs.data(), run_count, length, pixels.data(), count, depth, arranged.data());
  auto* found = reinterpret_cast<BlockSums*>(sums.data());

  const auto expect = [&](const char* entry, const auto& weight) {
    for (int p = 0; p < count; ++p) {
      Results<int32_t> expected(panels * kTileChannels), row(expected);
      for (int o = 0; o < panels * kTileChannels; ++o) {
        for (size_t k = 0; k < terms; ++k)
          expected[o] += weight(o, k) * plane[runs[k / length] + pixels[p] + k % length];
        row[o] = found[o / kTileChannels][p][o % kTileChannels];
      }
      comparison.compare(entry, depth, count, expected, row);
    }
  };
  if (bytes.begin != nullptr) bytes.begin();
  bytes.sums(arranged.data(), arranged_weights.data(), depth, count, panels, pair, found);
  if (bytes.end != nullptr) bytes.end();
  expect("bytes.sums", [&](int o, size_t k) { return weights[o * depth + k]; });
}

// What sums become: modulo 2^32 on the way, compared with limits of either direction.
void check_byte_outputs(Comparison& comparison, int count, int levels) {
  const ByteKernels& bytes = *comparison.kernels.bytes;
  const auto any = [] { return static_cast<int32_t>(random_bits() >> integer(32, 60)); };
  const auto sums = filled<int32_t>(kTilePixels * kTileChannels, any);
  const auto bases = filled<int32_t>(kTilePixels * kTileChannels, any);
  const auto flips = filled<int32_t>(kTileChannels, [] { return integer(0, 1) ? -1 : 0; });
  const auto multiplier = static_cast<int32_t>(integer(1, 5));
  const int32_t* rows[kTilePixels];
  for (int p = 0; p < count; ++p) rows[p] = bases.data() + (count - 1 - p) * kTileChannels;
  const IntegerSums all{reinterpret_cast<const int32_t (*)[kTileChannels]>(sums.data()), count, multiplier, rows};
  const auto integer_of = [&](int p, int c) {
    return static_cast<int32_t>(static_cast<uint32_t>(sums[p * kTileChannels + c]) * static_cast<uint32_t>(multiplier) +
                                static_cast<uint32_t>(rows[p][c]));
  };
  auto thresholds = filled<int32_t>(levels * kTileChannels, any);
  for (int c = 0; c < kTileChannels; ++c) thresholds[c] = integer_of(0, c) ^ flips[c];  // just passed

  Results<uint8_t> codes(kTilePixels * kStride, 77), written = codes;
  for (int p = 0; p < count; ++p)
    for (int c = 0; c < kTileChannels; ++c) {
      codes[p * kStride + c] = 0;
      for (int level = 0; level < levels; ++level)
        codes[p * kStride + c] += (integer_of(p, c) ^ flips[c]) >= thresholds[level * kTileChannels + c];
    }
  bytes.codes(all, {thresholds.data(), flips.data(), levels}, written.data(), kStride);
  comparison.compare("bytes.codes", levels, count, codes, written);
}

// Floats of several panels, which may be added to what was written before.
void check_byte_floats(Comparison& comparison, int count, int panels) {
  const int channels = panels * kTileChannels, stride = channels + 3;
  const auto any = [] { return static_cast<int32_t>(random_bits() >> integer(32, 60)); };
  const auto sums = filled<int32_t>(((panels - 1) * kBlockPixels + count) * kTileChannels, any);
  const TileRows bases(count, any, panels);
  const auto multiplier = static_cast<int32_t>(integer(1, 5));
  const IntegerSums all{reinterpret_cast<const int32_t (*)[kTileChannels]>(sums.data()), count, multiplier,
                        bases.rows.data(), panels};
  const auto scale = filled<float>(channels, real), bias = filled<float>(channels, real);
  Results<float> floats(kTilePixels * stride, 77), found = floats;
  for (const bool adds : {false, true}) {
    for (int p = 0; p < count; ++p)
      for (int c = 0; c < channels; ++c) {
        const int32_t sum = sums[(c / kTileChannels * kBlockPixels + p) * kTileChannels + c % kTileChannels];
        const auto integer = static_cast<int32_t>(static_cast<uint32_t>(sum) * static_cast<uint32_t>(multiplier) +
                                                  static_cast<uint32_t>(bases.rows[p][c]));
        const float y = static_cast<float>(integer) * scale[c] + bias[c];
        floats[p * stride + c] = adds ? y + floats[p * stride + c] : y;
      }
    comparison.kernels.bytes->floats(all,
                                     {scale.data(), bias.data(), found.data(), stride, adds ? found.data() : nullptr});
    comparison.compare("bytes.floats", panels, count, floats, found);
  }
}

// Codes of values near thresholds that rise evenly, which are held against all of them.
template <class T, class Write>
void check_ramp(Comparison& comparison, const char* entry, size_t count, const std::vector<T>& values, T step,
                const Write& write) {
  constexpr int kLevels = 255;
  const bool is_float = std::is_same_v<T, float>;
  const float slope = 1 / static_cast<float>(step);
  auto flips = filled<uint32_t>(count, [&] { return integer(0, 1) ? (is_float ? 0x80000000u : 0xffffffffu) : 0u; });
  auto rows = filled<int32_t>(count, [] { return kLevels * static_cast<int32_t>(integer(0, 2)); });
  std::vector<T> limits;
  for (int row = 0; row < 3; ++row)
    for (int level = 0; level < kLevels; ++level) limits.push_back(step * static_cast<T>(level - 40 * row));
  std::vector<float> slopes(count, slope), low(count, 0.5f), high(count, kLevels + 0.4375f), start;
  for (size_t i = 0; i < count; ++i) start.push_back(1 + 40 * static_cast<float>(rows[i] / kLevels));
  for (const auto& [slack, alike] : {std::pair{0.03125f, false}, {1.0f, false}, {0.03125f, true}, {1.0f, true}}) {
    if (alike) {
      std::fill(flips.begin(), flips.end(), flips[0]);
      std::fill(rows.begin(), rows.end(), rows[0]);
      std::fill(start.begin(), start.end(), start[0]);
    }
    const Ramp<T> ramp{slopes.data(), start.data(),  low.data(), high.data(), flips.data(),
                       rows.data(),   limits.data(), slack,      alike};
    Results<uint8_t> expected(count + 1, 77), found = expected;
    for (size_t i = 0; i < count; ++i) {
      T value = values[i];
      if (flips[i] != 0) value = is_float ? -value : static_cast<T>(-1 - value);
      expected[i] = 0;
      for (int level = 0; level < kLevels; ++level) expected[i] += value >= limits[rows[i] + level];
    }
    write(ramp, found.data());
    comparison.compare(entry, count, 1, expected, found);
  }
}

void check_ramps(Comparison& comparison, size_t count) {
  const auto floats = filled<float>(count, [] {
    const float value = 0.75f * static_cast<float>(integer(-300, 300));
    const int64_t kind = integer(0, 4);
    if (kind == 0) return std::numeric_limits<float>::quiet_NaN();
    if (kind == 1) return std::nextafter(value, -INFINITY);
    return kind == 2 ? value + real() : value;
  });
  check_ramp<float>(comparison, "float_ramp", count, floats, 0.75f, [&](const Ramp<float>& ramp, uint8_t* codes) {
    comparison.kernels.float_ramp(floats.data(), ramp, count, codes);
  });
  if (comparison.kernels.bytes == nullptr) return;
  const auto sums = filled<int32_t>(kTileChannels, [] { return static_cast<int32_t>(integer(-3000, 3000)); });
  const auto bases = filled<int32_t>(kTileChannels, [] { return static_cast<int32_t>(integer(-3, 3)); });
  const int32_t* const rows[1] = {bases.data()};
  std::vector<int32_t> values;
  for (int c = 0; c < kTileChannels; ++c) values.push_back(3 * sums[c] + bases[c]);
  const IntegerSums all{reinterpret_cast<const int32_t (*)[kTileChannels]>(sums.data()), 1, 3, rows};
  check_ramp<int32_t>(comparison, "bytes.ramp", kTileChannels, values, 32,
                      [&](const Ramp<int32_t>& ramp, uint8_t* codes) {
                        comparison.kernels.bytes->ramp(all, ramp, codes, kTileChannels);
                      });
}

void check_integers(Comparison& comparison, size_t depth, int count) {
  const auto largest = static_cast<int64_t>(std::sqrt(INT32_MAX / static_cast<double>(depth == 0 ? 1 : depth)));
  const int64_t end = std::min<int64_t>(largest, INT16_MAX);
  const auto any = [&] {
    return static_cast<int16_t>(integer(0, 2) == 0 ? (integer(0, 1) ? end : -end) : integer(-end, end));
  };
  const TileData<int16_t> data(depth, count, any, any);
  comparison.check<int32_t>(
      "integer_sums", depth, count, kTilePixels * kTileChannels,
      [&](const Kernels& k, int32_t* out) { k.integer_sums(data.tile, reinterpret_cast<Sums>(out)); });
}

// The scalar table rounds products before it adds them; all others fuse the two, in the same order.
void check_floats(Comparison& comparison, size_t depth, int count, int panels, bool gathered) {
  const int channels = panels * kTileChannels, stride = channels + 3;
  const auto pixels = filled<float>(depth * count, real), weights = filled<float>(depth * channels, real);
  const auto scale = filled<float>(channels, real), bias = filled<float>(channels, real);
  std::vector<int64_t> taps(depth);
  for (size_t k = 0; k < depth; ++k) taps[k] = gathered ? k * count : integer(0, (depth - 1) * count);
  const FloatTile tile{pixels.data(), weights.data(), depth, count, panels, gathered ? nullptr : taps.data()};
  Results<float> expected(kTilePixels * stride, 77), found = expected;
  for (int p = 0; p < count; ++p)
    for (int c = 0; c < channels; ++c) {
      const float* w = weights.data() + c / kTileChannels * depth * kTileChannels + c % kTileChannels;
      float sum = 0;
      for (size_t k = 0; k < depth; ++k) sum = std::fma(pixels[taps[k] + p], w[k * kTileChannels], sum);
      expected[p * stride + c] = sum * scale[c] + bias[c];
    }
  comparison.kernels.float_tile(tile, {scale.data(), bias.data(), found.data(), stride});
  comparison.compare("float_tile", depth, count, expected, found);

  auto thresholds = filled<float>(channels, real);
  const auto flips = filled<uint32_t>(channels, [] { return integer(0, 1) ? 0x80000000u : 0u; });
  for (int c = 0; c < channels; ++c)
    if (const int64_t kind = integer(0, 3); kind == 0)
      thresholds[c] = std::numeric_limits<float>::quiet_NaN();
    else if (kind == 1)
      thresholds[c] = flips[c] != 0 ? -expected[c] : expected[c];  // just passed
  Results<uint32_t> bits(kTilePixels, 77), written = bits;
  for (int p = 0; p < count; ++p) {
    bits[p] = 0;
    for (int c = 0; c < channels; ++c) {
      const float value = expected[p * stride + c];
      bits[p] |= static_cast<uint32_t>((flips[c] != 0 ? -value : value) >= thresholds[c]) << c;
    }
  }
  comparison.kernels.float_tile_bits(tile, {scale.data(), bias.data(), nullptr, 0}, {thresholds.data(), flips.data()},
                                     written.data());
  comparison.compare("float_tile_bits", depth, count, bits, written);
}

void check_float_bits(Comparison& comparison, size_t channels) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kSpecial[] = {0.0f, -0.0f, kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN(), 1.0f};
  const auto any = [&] { return integer(0, 1) ? kSpecial[integer(0, 5)] : real(); };
  constexpr size_t kPixels = 3;
  const size_t stride = channels + 2, pitch = (channels + 63) / 64 + 1;
  const auto x = filled<float>(kPixels * stride, any), thresholds = filled<float>(channels, any);
  const auto flips = filled<uint32_t>(channels, [] { return integer(0, 1) ? 0x80000000u : 0u; });
  comparison.check<uint64_t>("float_bits", channels, kPixels, kPixels * pitch, [&](const Kernels& k, uint64_t* out) {
    k.float_bits(x.data(), {thresholds.data(), flips.data()}, {kPixels, channels, stride}, out, pitch);
  });
  constexpr int kLevels = 3;
  const auto limits = filled<float>(kLevels * channels, any);
  comparison.check<uint8_t>("float_codes", channels, 1, channels + 1, [&](const Kernels& k, uint8_t* out) {
    k.float_codes(x.data(), limits.data(), channels, flips.data(), channels, kLevels, out);
  });
}

// Rows of some channels, and the same in place.
void check_rows(Comparison& comparison, size_t channels) {
  constexpr size_t kPixels = 3;
  const Rows rows{kPixels, channels, channels + 2};
  const size_t size = (kPixels - 1) * rows.stride + channels;
  const auto any = [] {
    const int64_t kind = integer(0, 7);
    return kind == 0 ? -0.0f : kind == 1 ? 0.0f : real();
  };
  const auto a = filled<float>(size, any), b = filled<float>(size, any);
  const auto scale = filled<float>(channels, any), shift = filled<float>(channels, any);
  const auto flips = filled<float>(channels, [] { return integer(0, 1) == 0 ? -0.0f : 0.0f; });
  const auto check = [&](const char* entry, const auto& compute) {
    comparison.check<float>(entry, channels, kPixels, size, [&](const Kernels& k, float* y) {
      compute(*k.rows, a.data(), y);
      Results<float> inside(a);
      compute(*k.rows, inside.data(), inside.data());
      for (size_t p = 0; p < kPixels; ++p)
        comparison.compare(entry, channels, kPixels,
                           Results<float>(y + p * rows.stride, y + p * rows.stride + channels),
                           Results<float>(&inside[p * rows.stride], &inside[p * rows.stride] + channels));
    });
  };
  check("rows.add", [&](const RowKernels& k, const float* x, float* y) { k.add(x, b.data(), y, rows); });
  check("rows.affine",
        [&](const RowKernels& k, const float* x, float* y) { k.affine(x, scale.data(), shift.data(), y, rows); });
  check("rows.clamp", [&](const RowKernels& k, const float* x, float* y) { k.clamp(x, -0.0f, 0.5f, y, rows); });
  for (const float divisor : {3.0f, 4.0f})
    check("rows.divide", [&](const RowKernels& k, const float* x, float* y) { k.divide(x, divisor, y, rows); });
  for (size_t count = 1; count <= kPixels; ++count) {
    const float* taps[] = {a.data() + rows.stride, a.data(), a.data() + 2 * rows.stride};
    comparison.check<float>("rows.maximum", channels, kPixels, channels + 1, [&](const Kernels& k, float* y) {
      k.rows->maximum(taps, count, flips.data(), y, channels);
    });
    comparison.check<float>("rows.sum", channels, kPixels, channels + 1,
                            [&](const Kernels& k, float* y) { k.rows->sum(taps, count, y, channels); });
  }
}

bool equals_scalar(const Kernels& kernels) {
  Comparison comparison{kernels};
  for (const size_t depth : {0, 1, 2, 3, 7, 8, 9, 12, 15, 16, 17, 20, 23, 31, 32, 33, 63, 72, 200})
    for (int count = 1; count <= kTilePixels; ++count) {
      check_binary(comparison, depth, count);
      check_integers(comparison, depth, count);
      for (int panels = 1; panels <= 3; ++panels) check_binary_floats(comparison, depth, count, panels);
      for (int panels = 1; panels <= kernels.float_panels; ++panels)
        for (const bool gathered : {true, false}) check_floats(comparison, depth, count, panels, gathered);
    }
  if (kernels.blocks != nullptr) {
    for (const size_t depth : {1, 2, 3, 4, 5, 9, 36, 72})
      for (const int count : {1, 2, 4, 7, 8, 15, 16, 17, 31, 32})
        for (const int vectors : {1, 2, 3, 5})
          check_blocks(comparison, depth, count, vectors * kernels.blocks->panels, false);
    for (const size_t depth : {3, 4, 6, 7, 1023, 1024, 2050})
      for (const bool opposite : {false, true})
        for (const int vectors : {1, 2}) check_blocks(comparison, depth, 5, vectors * kernels.blocks->panels, opposite);
  }
  for (int panels = 1; panels <= 9; ++panels) {
    for (const int count : {1, 2, 7, 8, 31, 32}) {
      if (kernels.counts != nullptr) check_sum_bits(comparison, kernels.counts->bits, count, panels);
      if (kernels.bytes != nullptr) check_sum_bits(comparison, kernels.bytes->bits, count, panels);
    }
    for (int count = 1; kernels.counts != nullptr && count <= kTilePixels; ++count)
      check_count_floats(comparison, count, panels);
  }
  if (kernels.matrices != nullptr) {
    for (const size_t depth : {1, 2, 3, 5, 8, 9, 36})
      for (const int count : {1, 2, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65, 80})
        for (const int panels : {1, 2, 3, 4, 5, 8})
          for (const bool extreme : {false, true}) check_matrices(comparison, depth, count, panels, extreme);
    for (const size_t count : {1, 2, 63}) check_spread(comparison, count);
  }
  if (kernels.bytes != nullptr) {
    for (const auto& [length, run_count] :
         {std::pair<size_t, size_t>{1, 1}, {9, 3}, {21, 7}, {64, 3}, {192, 6}, {65, 1}})
      for (const int count : {1, 7, 16, 17, 32})
        for (const int panels : {2, 4})
          for (const auto& [bits, largest] : {std::pair<int, int64_t>{1, 127}, {2, 1}, {4, 7}, {8, 64}, {8, 127}})
            check_bytes(comparison, length, run_count, bits, largest, count, panels);
    for (int count = 1; count <= kTilePixels; ++count)
      for (const int levels : {2, 3, 255}) check_byte_outputs(comparison, count, levels);
    for (int count = 1; count <= kTilePixels; ++count)
      for (const int panels : {1, 2, 3}) check_byte_floats(comparison, count, panels);
  }
  for (size_t channels = 1; channels <= 200; ++channels) check_float_bits(comparison, channels);
  for (size_t count = 1; count <= 200; ++count) check_ramps(comparison, count);
  for (size_t channels = 1; channels <= 70; ++channels) check_rows(comparison, channels);
  return comparison.equal;
}

}  // namespace

int main() {
  bool equal = true;
  for (const std::string& isa : available_isas()) {
    const Kernels& kernels = select_kernels(isa);
    if (&kernels == &kScalarKernels) continue;
    if (equals_scalar(kernels))
      std::printf("%s\n", kernels.isa);
    else
      equal = false;
  }
  return equal ? 0 : 1;
}
