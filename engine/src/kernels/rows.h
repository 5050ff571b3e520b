// Float loops over the channels of pixels, the same source for every instruction set: the including file defines
// kRegisterFloats, how many floats a register of its own holds. Included inside the target region, so that each file
// compiles it for itself. Each step is one float32 rounding, so all give the same bits.
#pragma once

namespace lowbit {
namespace {

// A vector of GCC and Clang, which both know arithmetic, comparison and ?: for it.
typedef float Lanes __attribute__((vector_size(kRegisterFloats * sizeof(float))));
typedef uint32_t LaneBits __attribute__((vector_size(kRegisterFloats * sizeof(float))));

// Copies, for channels lie at any address, and Clang takes a reference to a vector to be aligned like one.
template <class T>
struct Chunk {
  using Type = T;
  static T load(const float* values, size_t i) {
    T chunk;
    __builtin_memcpy(&chunk, values + i, sizeof(T));
    return chunk;
  }
  static void store(float* values, size_t i, T chunk) { __builtin_memcpy(values + i, &chunk, sizeof(T)); }
};

using Wide = Chunk<Lanes>;
using Single = Chunk<float>;

// Calls work(Wide or Single, c) for all of `channels`.
template <class Work>
inline void for_chunks(size_t channels, const Work& work) {
  size_t c = 0;
  for (; c + kRegisterFloats <= channels; c += kRegisterFloats) work(Wide{}, c);
  for (; c < channels; ++c) work(Single{}, c);
}

void add(const float* a, const float* b, float* y, const Rows& rows) {
  for (size_t p = 0; p < rows.pixels; ++p, a += rows.stride, b += rows.stride, y += rows.stride)
    for_chunks(rows.channels, [&](auto chunk, size_t c) { chunk.store(y, c, chunk.load(a, c) + chunk.load(b, c)); });
}

void affine(const float* x, const float* scale, const float* shift, float* y, const Rows& rows) {
  for_chunks(rows.channels, [&](auto chunk, size_t c) {
    const auto factor = chunk.load(scale, c), term = chunk.load(shift, c);
    for (size_t p = 0; p < rows.pixels; ++p) {
      const size_t at = p * rows.stride + c;
      chunk.store(y, at, chunk.load(x, at) * factor + term);
    }
  });
}

void prelu(const float* x, const float* slope, float* y, const Rows& rows) {
  for_chunks(rows.channels, [&](auto chunk, size_t c) {
    using T = typename decltype(chunk)::Type;
    const T factor = chunk.load(slope, c);
    for (size_t p = 0; p < rows.pixels; ++p) {
      const size_t at = p * rows.stride + c;
      const T value = chunk.load(x, at), falls = factor * value;
      chunk.store(y, at, value >= T{} ? value : falls);
    }
  });
}

void clamp(const float* x, float low, float high, float* y, const Rows& rows) {
  for (size_t p = 0; p < rows.pixels; ++p, x += rows.stride, y += rows.stride)
    for_chunks(rows.channels, [&](auto chunk, size_t c) {
      using T = typename decltype(chunk)::Type;
      const T least = low - T{}, most = high - T{};  // of a zero with its sign
      const T raised = chunk.load(x, c) < least ? least : chunk.load(x, c);
      chunk.store(y, c, most < raised ? most : raised);
    });
}

void divide(const float* x, float divisor, float* y, const Rows& rows) {
  for (size_t p = 0; p < rows.pixels; ++p, x += rows.stride, y += rows.stride)
    for_chunks(rows.channels, [&](auto chunk, size_t c) {
      using T = typename decltype(chunk)::Type;
      chunk.store(y, c, chunk.load(x, c) / (divisor - T{}));
    });
}

// x, or its opposite where the sign bit of `flips`, which is a zero, is set.
inline Lanes flipped(Lanes x, Lanes flips) {
  return __builtin_bit_cast(Lanes, __builtin_bit_cast(LaneBits, x) ^ __builtin_bit_cast(LaneBits, flips));
}
inline float flipped(float x, float flips) {
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, x) ^ __builtin_bit_cast(uint32_t, flips));
}

void maximum(const float* const* taps, size_t count, const float* flips, float* y, size_t channels) {
  for_chunks(channels, [&](auto chunk, size_t c) {
    using T = typename decltype(chunk)::Type;
    const T flip = chunk.load(flips, c);
    T most = flipped(chunk.load(taps[0], c), flip);
    for (size_t tap = 1; tap < count; ++tap) {
      const T next = flipped(chunk.load(taps[tap], c), flip);
      most = most < next ? next : most;
    }
    chunk.store(y, c, flipped(most, flip));
  });
}

void sum(const float* const* taps, size_t count, float* y, size_t channels) {
  for_chunks(channels, [&](auto chunk, size_t c) {
    using T = typename decltype(chunk)::Type;
    T total = chunk.load(taps[0], c);
    for (size_t tap = 1; tap < count; ++tap) total = total + chunk.load(taps[tap], c);
    chunk.store(y, c, total);
  });
}

constexpr RowKernels kRows{add, affine, prelu, clamp, divide, maximum, sum};

}  // namespace
}  // namespace lowbit
