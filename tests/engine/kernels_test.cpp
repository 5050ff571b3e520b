// Every kernel table that this CPU runs against the scalar one, entry by entry, on random tiles. Prints the name of
// each table that is equal and what differs in the others; the exit status is 1 when something does.
// test_kernel_tables.py compiles it with the sanitizers: inputs are of the exact size, so that reading beyond them is
// seen.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
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
        tile{pixels.data(), weights.data(), depth, count} {}
};

// A table of 16 numbers for each pixel.
struct Rows {
  std::vector<std::vector<int64_t>> values;
  std::vector<const int64_t*> rows;

  template <class Make>
  Rows(int count, const Make& make) {
    for (int p = 0; p < count; ++p) values.push_back(filled<int64_t>(kTileChannels, make));
    for (const auto& row : values) rows.push_back(row.data());
  }
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

void check_binary(Comparison& comparison, size_t depth, int count) {
  const auto zeros = [] { return uint64_t{0}; };
  const auto any = [] { return random_bits(); };
  const TileData<uint64_t> mixed(depth, count, any, any);
  TileData<uint64_t> opposite(depth, count, zeros, zeros);
  for (uint64_t& word : opposite.weights) word = ~uint64_t{0};
  for (const BinaryTile& tile : {mixed.tile, opposite.tile}) {
    comparison.check<int32_t>(
        "binary_counts", depth, count, kTilePixels * kTileChannels,
        [&](const Kernels& k, int32_t* out) { k.binary_counts(tile, reinterpret_cast<Sums>(out)); });
    const auto middle = static_cast<int64_t>(32 * depth);
    const Rows limits(count, [&] {
      constexpr int64_t kEnds[] = {INT64_MIN, INT32_MIN, -1, INT32_MAX, INT64_MAX};
      return integer(0, 3) == 0 ? kEnds[integer(0, 4)] : middle + integer(-5, 5);
    });
    const auto falling = static_cast<uint16_t>(random_bits());
    comparison.check<uint16_t>("binary_bits", depth, count, kTilePixels, [&](const Kernels& k, uint16_t* out) {
      k.binary_bits(tile, limits.rows.data(), falling, out);
    });
    const Rows bases(count, [] { return integer(-(1 << 30), 1 << 30) >> integer(0, 30); });
    const auto scale = filled<float>(kTileChannels, real), bias = filled<float>(kTileChannels, real);
    comparison.check<float>("binary_floats", depth, count, kTilePixels * kStride, [&](const Kernels& k, float* out) {
      k.binary_floats(tile, bases.rows.data(), {scale.data(), bias.data(), out, kStride});
    });
  }
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
void check_floats(Comparison& comparison, size_t depth, int count) {
  const TileData<float> data(depth, count, real, real);
  const auto scale = filled<float>(kTileChannels, real), bias = filled<float>(kTileChannels, real);
  Results<float> expected(kTilePixels * kStride, 77), found = expected;
  for (int p = 0; p < count; ++p)
    for (int c = 0; c < kTileChannels; ++c) {
      float sum = 0;
      for (size_t k = 0; k < depth; ++k)
        sum = std::fma(data.pixels[k * count + p], data.weights[k * kTileChannels + c], sum);
      expected[p * kStride + c] = sum * scale[c] + bias[c];
    }
  comparison.kernels.float_tile(data.tile, {scale.data(), bias.data(), found.data(), kStride});
  comparison.compare("float_tile", depth, count, expected, found);
}

void check_float_bits(Comparison& comparison, size_t channels) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kSpecial[] = {0.0f, -0.0f, kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN(), 1.0f};
  const auto any = [&] { return integer(0, 1) ? kSpecial[integer(0, 5)] : real(); };
  const auto x = filled<float>(channels, any), thresholds = filled<float>(channels, any);
  const auto flips = filled<uint32_t>(channels, [] { return integer(0, 1) ? 0x80000000u : 0u; });
  comparison.check<uint64_t>("float_bits", channels, 1, (channels + 63) / 64 + 1, [&](const Kernels& k, uint64_t* out) {
    k.float_bits(x.data(), thresholds.data(), flips.data(), channels, out);
  });
}

bool equals_scalar(const Kernels& kernels) {
  Comparison comparison{kernels};
  for (const size_t depth : {0, 1, 2, 3, 7, 8, 9, 12, 15, 16, 17, 20, 23, 31, 32, 33, 63, 72, 200})
    for (int count = 1; count <= kTilePixels; ++count) {
      check_binary(comparison, depth, count);
      check_integers(comparison, depth, count);
      check_floats(comparison, depth, count);
    }
  for (size_t channels = 1; channels <= 200; ++channels) check_float_bits(comparison, channels);
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
