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

template <size_t N>
struct Number {
  static constexpr size_t value = N;
};

// Calls work(Wide or Single, Number<N>, c) for all of `channels`, for N chunks of them at a time.
template <class Work>
inline void for_many_chunks(size_t channels, const Work& work) {
  constexpr size_t kMany = 4;
  size_t c = 0;
  for (; c + kMany * kRegisterFloats <= channels; c += kMany * kRegisterFloats) work(Wide{}, Number<kMany>{}, c);
  for (; c + kRegisterFloats <= channels; c += kRegisterFloats) work(Wide{}, Number<1>{}, c);
  for (; c < channels; ++c) work(Single{}, Number<1>{}, c);
}

// The first of two that are equal, or not ordered. An instruction set may have its own for its registers.
template <class T>
T larger(T a, T b) {
  return a < b ? b : a;
}

template <class T>
T smaller(T a, T b) {
  return b < a ? b : a;
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
      chunk.store(y, c, smaller(larger(chunk.load(x, c), least), most));
    });
}

void divide(const float* x, float divisor, float* y, const Rows& rows) {
  constexpr uint32_t kMantissa = (1u << 23) - 1;
  const bool of_two = (__builtin_bit_cast(uint32_t, divisor) & kMantissa) == 0;  // a power: its inverse is exact
  const float factor = 1.0f / divisor;
  for (size_t p = 0; p < rows.pixels; ++p, x += rows.stride, y += rows.stride)
    for_chunks(rows.channels, [&](auto chunk, size_t c) {
      using T = typename decltype(chunk)::Type;
      const T value = chunk.load(x, c);
      chunk.store(y, c, of_two ? value * (factor - T{}) : value / (divisor - T{}));
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
  for_many_chunks(channels, [&](auto chunk, auto number, size_t c) {
    using T = typename decltype(chunk)::Type;
    constexpr size_t kNumber = decltype(number)::value, kStep = sizeof(T) / sizeof(float);
    T flip[kNumber], most[kNumber];
#pragma GCC unroll 4
    for (size_t n = 0; n < kNumber; ++n) {
      flip[n] = chunk.load(flips, c + n * kStep);
      most[n] = flipped(chunk.load(taps[0], c + n * kStep), flip[n]);
    }
    for (size_t tap = 1; tap < count; ++tap) {
      const float* x = taps[tap] + c;
#pragma GCC unroll 4
      for (size_t n = 0; n < kNumber; ++n) most[n] = larger(most[n], flipped(chunk.load(x, n * kStep), flip[n]));
    }
#pragma GCC unroll 4
    for (size_t n = 0; n < kNumber; ++n) chunk.store(y, c + n * kStep, flipped(most[n], flip[n]));
  });
}

void sum(const float* const* taps, size_t count, float* y, size_t channels) {
  for_many_chunks(channels, [&](auto chunk, auto number, size_t c) {
    using T = typename decltype(chunk)::Type;
    constexpr size_t kNumber = decltype(number)::value, kStep = sizeof(T) / sizeof(float);
    T total[kNumber];
#pragma GCC unroll 4
    for (size_t n = 0; n < kNumber; ++n) total[n] = chunk.load(taps[0], c + n * kStep);
    for (size_t tap = 1; tap < count; ++tap) {
      const float* x = taps[tap] + c;
#pragma GCC unroll 4
      for (size_t n = 0; n < kNumber; ++n) total[n] = total[n] + chunk.load(x, n * kStep);
    }
#pragma GCC unroll 4
    for (size_t n = 0; n < kNumber; ++n) chunk.store(y, c + n * kStep, total[n]);
  });
}

// Three colours are a number that the compiler can use.
bool interleave(const float* planes, size_t pixels, size_t channels, float* __restrict y) {
  if (channels == 3)
    for (size_t i = 0; i < pixels; ++i)
      for (size_t c = 0; c < 3; ++c) y[i * 3 + c] = planes[c * pixels + i];
  else
    for (size_t i = 0; i < pixels; ++i)
      for (size_t c = 0; c < channels; ++c) y[i * channels + c] = planes[c * pixels + i];
  constexpr uint32_t kInfinity = 0x7f800000;
  uint32_t largest = 0;
  for (size_t i = 0; i < pixels * channels; ++i) {
    const uint32_t magnitude = __builtin_bit_cast(uint32_t, planes[i]) & ~(1u << 31);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < kInfinity;
}

constexpr RowKernels kRows{add, affine, prelu, clamp, divide, maximum, sum, interleave};

}  // namespace
}  // namespace lowbit
