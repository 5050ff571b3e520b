// What one core can do at most: loops that multiply and add, or compare and count, and touch no memory. A layer's speed
// is held against the best loop that its instruction set has for its kind of product.
#include <algorithm>
#include <bit>
#include <chrono>
#include <limits>
#include <stdexcept>
#include <string>

#include "lowbit/engine.h"
#if defined(LOWBIT_AVX2) || defined(LOWBIT_AVX512)
#include "kernels/target.h"
#endif
#ifdef LOWBIT_AMX
#include "kernels/amx_tiles.h"
#endif
#ifdef LOWBIT_NEON
#include <arm_neon.h>
#endif

// The compiler must believe that a value changed, or it computes a product once for all rounds.
#if defined(LOWBIT_NEON)
#define LOWBIT_OPAQUE(value) asm volatile("" : "+w"(value))
#else
#define LOWBIT_OPAQUE(value) asm volatile("" : "+v"(value))
#endif

namespace lowbit {
namespace {

// Sums that do not wait for each other: latency times ports, and they fit 16 registers. LOWBIT_CHAINS has so many.
constexpr int kChains = 12;

// A loop whose step, made of x, w and the sum of a chain, gives the next sum. The sums have names of their own: those
// of an array the compiler keeps twice, for which AVX2 has not the registers.
#define LOWBIT_CHAIN(name, step) \
  {                              \
    auto& sum = name;            \
    LOWBIT_OPAQUE(x);            \
    sum = step;                  \
  }
#define LOWBIT_FOUR(a, b, c, d, step) \
  LOWBIT_CHAIN(a, step) LOWBIT_CHAIN(b, step) LOWBIT_CHAIN(c, step) LOWBIT_CHAIN(d, step)
#define LOWBIT_CHAINS(name, Sum, Factor, step)                               \
  void name(int64_t rounds) {                                                \
    Sum a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{}, i{}, j{}, k{}, l{};          \
    Factor x{}, w{};                                                         \
    LOWBIT_OPAQUE(w);                                                        \
    for (; rounds > 0; --rounds) {                                           \
      LOWBIT_FOUR(a, b, c, d, step)                                          \
      LOWBIT_FOUR(e, f, g, h, step)                                          \
      LOWBIT_FOUR(i, j, k, l, step)                                          \
    }                                                                        \
    for (Sum sum : {a, b, c, d, e, f, g, h, i, j, k, l}) LOWBIT_OPAQUE(sum); \
  }

// Three nibbles of a pair of pixels and of a vector of channels, looked up and taken apart. In text: what a closure
// captures the compiler leaves in memory.
#define LOWBIT_LOOK_UP(first, second, shuffle)              \
  {                                                         \
    LOWBIT_OPAQUE(x);                                       \
    const Bytes one = (Bytes)shuffle(x, w);                 \
    LOWBIT_OPAQUE(x);                                       \
    const Bytes two = one + (Bytes)shuffle(x, w);           \
    LOWBIT_OPAQUE(x);                                       \
    const Bytes three = two + (Bytes)shuffle(x, w);         \
    first = (Vector)((Bytes)first + (three & 15));          \
    second = (Vector)((Words)second + ((Words)three >> 4)); \
  }
#define LOWBIT_LOOK_UPS(name, Type, shuffle)                             \
  void name(int64_t rounds) {                                            \
    using Vector = Type;                                                 \
    using Bytes = uint8_t __attribute__((vector_size(sizeof(Vector))));  \
    using Words = uint16_t __attribute__((vector_size(sizeof(Vector)))); \
    Vector a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{}, x{}, w{};             \
    LOWBIT_OPAQUE(w);                                                    \
    for (; rounds > 0; --rounds) {                                       \
      LOWBIT_LOOK_UP(a, b, shuffle)                                      \
      LOWBIT_LOOK_UP(c, d, shuffle)                                      \
      LOWBIT_LOOK_UP(e, f, shuffle)                                      \
      LOWBIT_LOOK_UP(g, h, shuffle)                                      \
    }                                                                    \
    for (Vector sum : {a, b, c, d, e, f, g, h}) LOWBIT_OPAQUE(sum);      \
  }

// Plain C++, as in kernels/scalar.cpp: what the compiler makes of it, in the L1 cache.
constexpr int kPlain = 64;

template <class Sum, class Factor>
void plain_products(int64_t rounds) {
  Sum sums[kPlain] = {};
  Factor x[kPlain] = {}, w[kPlain] = {};
  for (; rounds > 0; --rounds) {
    asm volatile("" : : "r"(sums), "r"(x), "r"(w) : "memory");
    for (int i = 0; i < kPlain; ++i) sums[i] += static_cast<Sum>(x[i]) * static_cast<Sum>(w[i]);
  }
}

void plain_counts(int64_t rounds) {
  uint64_t x[kPlain] = {}, w[kPlain] = {};
  int64_t count = 0;
  for (; rounds > 0; --rounds) {
    asm volatile("" : "+r"(count) : "r"(x), "r"(w) : "memory");
    for (int i = 0; i < kPlain; ++i) count += std::popcount(x[i] ^ w[i]);
  }
}

}  // namespace
}  // namespace lowbit

#ifdef LOWBIT_AVX2
LOWBIT_TARGET_OPEN("avx2,fma")
namespace lowbit {
namespace {

LOWBIT_CHAINS(fma_256, __m256, __m256, _mm256_fmadd_ps(x, w, sum))

// Products of bytes, added up in 16 bits, which is enough for some sums of few bits.
LOWBIT_CHAINS(maddubs_256, __m256i, __m256i, _mm256_add_epi16(sum, _mm256_maddubs_epi16(x, w)))

__m256i carry_256(__m256i& sum, __m256i a, __m256i b) {
  const __m256i differ = _mm256_xor_si256(a, b);
  const __m256i carried = _mm256_or_si256(_mm256_and_si256(a, b), _mm256_and_si256(differ, sum));
  sum = _mm256_xor_si256(sum, differ);
  return carried;
}

LOWBIT_LOOK_UPS(look_ups_256, __m256i, _mm256_shuffle_epi8)

// Harley and Seal: eight words a round, one of which is counted.
void carry_save_256(int64_t rounds) {
  const __m256i digits = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                          0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i low = _mm256_set1_epi8(15);
  __m256i ones{}, twos{}, fours{}, counts{}, x{}, w{};
  LOWBIT_OPAQUE(w);
  for (; rounds > 0; --rounds) {
    __m256i bits[8];
#pragma GCC unroll 8
    for (__m256i& word : bits) {
      LOWBIT_OPAQUE(x);
      word = _mm256_xor_si256(x, w);
    }
    const __m256i a = carry_256(ones, bits[0], bits[1]), b = carry_256(ones, bits[2], bits[3]);
    const __m256i c = carry_256(ones, bits[4], bits[5]), d = carry_256(ones, bits[6], bits[7]);
    const __m256i left = carry_256(twos, a, b), right = carry_256(twos, c, d);
    const __m256i eights = carry_256(fours, left, right);
    const __m256i bytes =
        _mm256_add_epi8(_mm256_shuffle_epi8(digits, _mm256_and_si256(eights, low)),
                        _mm256_shuffle_epi8(digits, _mm256_and_si256(_mm256_srli_epi16(eights, 4), low)));
    counts = _mm256_add_epi64(counts, _mm256_sad_epu8(bytes, _mm256_setzero_si256()));
  }
  LOWBIT_OPAQUE(ones);
  LOWBIT_OPAQUE(twos);
  LOWBIT_OPAQUE(fours);
  LOWBIT_OPAQUE(counts);
}

}  // namespace
}  // namespace lowbit
LOWBIT_TARGET_CLOSE
#endif

#ifdef LOWBIT_AVX_VNNI
LOWBIT_TARGET_OPEN("avx2,avxvnni")
namespace lowbit {
namespace {

LOWBIT_CHAINS(vnni_256, __m256i, __m256i, _mm256_dpbusd_avx_epi32(sum, x, w))

}  // namespace
}  // namespace lowbit
LOWBIT_TARGET_CLOSE
#endif

#ifdef LOWBIT_AVX512
LOWBIT_TARGET_OPEN("avx512f,avx512dq,avx512bw,avx512vl,fma")
namespace lowbit {
namespace {

LOWBIT_CHAINS(fma_512, __m512, __m512, _mm512_fmadd_ps(x, w, sum))

// As above.
LOWBIT_CHAINS(maddubs_512, __m512i, __m512i, _mm512_add_epi16(sum, _mm512_maddubs_epi16(x, w)))

}  // namespace
}  // namespace lowbit
#include "kernels/full_adders.h"
namespace lowbit {
namespace {

LOWBIT_LOOK_UPS(look_ups_512, __m512i, _mm512_shuffle_epi8)

void carry_save_512(int64_t rounds) {
  const __m512i digits = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i low = _mm512_set1_epi8(15);
  __m512i ones{}, twos{}, fours{}, counts{}, x{}, w{};
  LOWBIT_OPAQUE(w);
  for (; rounds > 0; --rounds) {
    __m512i bits[8];
#pragma GCC unroll 8
    for (__m512i& word : bits) {
      LOWBIT_OPAQUE(x);
      word = _mm512_xor_si512(x, w);
    }
    // Every second one is a parity.
    const __m512i a = carry_beside(bits[1], ones, bits[0]), b = carry_beside(bits[3], bits[1], bits[2]);
    const __m512i c = carry_beside(bits[5], bits[3], bits[4]), d = carry_beside(bits[7], bits[5], bits[6]);
    ones = bits[7];
    const __m512i left = carry(twos, a, b), right = carry(twos, c, d);
    const __m512i eights = carry(fours, left, right);
    const __m512i bytes =
        _mm512_add_epi8(_mm512_shuffle_epi8(digits, _mm512_and_si512(eights, low)),
                        _mm512_shuffle_epi8(digits, _mm512_and_si512(_mm512_srli_epi16(eights, 4), low)));
    counts = _mm512_add_epi64(counts, _mm512_sad_epu8(bytes, _mm512_setzero_si512()));
  }
  LOWBIT_OPAQUE(ones);
  LOWBIT_OPAQUE(twos);
  LOWBIT_OPAQUE(fours);
  LOWBIT_OPAQUE(counts);
}

}  // namespace
}  // namespace lowbit
LOWBIT_TARGET_CLOSE
#endif

#ifdef LOWBIT_AVX512_VPOPCNTDQ
LOWBIT_TARGET_OPEN("avx512f,avx512dq,avx512bw,avx512vl,avx512vpopcntdq,avx512vnni")
namespace lowbit {
namespace {

LOWBIT_CHAINS(vnni_512, __m512i, __m512i, _mm512_dpbusd_epi32(sum, x, w))

// Full adders whose sums are there: two words a step, of which one is counted.
void popcount_512(int64_t rounds) {
  __m512i counts[8]{}, sums[8]{}, x{}, w{};
  LOWBIT_OPAQUE(w);
  for (; rounds > 0; --rounds) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      LOWBIT_OPAQUE(x);
      const __m512i bits = _mm512_xor_si512(x, w);
      LOWBIT_OPAQUE(x);
      const __m512i sum = _mm512_xor_si512(x, w);
      const __m512i carried = carry_beside(sum, sums[i], bits);
      counts[i] = _mm512_add_epi64(counts[i], _mm512_popcnt_epi64(carried));
      sums[i] = sum;
    }
  }
  for (__m512i& count : counts) LOWBIT_OPAQUE(count);
}

}  // namespace
}  // namespace lowbit
LOWBIT_TARGET_CLOSE
#endif

#ifdef LOWBIT_AMX
LOWBIT_TARGET_OPEN("avx512f,amx-tile,amx-int8")
namespace lowbit {
namespace {

// Two tiles of pixels by two of weights, all zero.
void tiles(int64_t rounds) {
  _tile_loadconfig(&kTiles);
  for (; rounds > 0; --rounds) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
}

}  // namespace
}  // namespace lowbit
LOWBIT_TARGET_CLOSE
#endif

#ifdef LOWBIT_NEON
namespace lowbit {
namespace {

LOWBIT_CHAINS(fma_neon, float32x4_t, float32x4_t, vfmaq_f32(sum, x, w))

LOWBIT_CHAINS(multiply_neon, int32x4_t, int16x8_t, vmlal_s16(sum, vget_low_s16(x), vget_low_s16(w)))

LOWBIT_CHAINS(count_neon, uint16x8_t, uint8x16_t, vpadalq_u8(sum, vcntq_u8(veorq_u8(x, w))))

}  // namespace
}  // namespace lowbit
#endif

namespace lowbit {
namespace {

struct Loop {
  std::string_view isa, kind;
  int64_t products;  // of a round
  void (*run)(int64_t rounds);
};

std::vector<Loop> loops() {
  std::vector<Loop> all{{"scalar", "float", kPlain, plain_products<float, float>},
                        {"scalar", "integer", kPlain, plain_products<int32_t, int16_t>},
                        {"scalar", "binary", kPlain * 64, plain_counts}};
#ifdef LOWBIT_AVX2
  all.push_back({"avx2", "float", kChains * 8, fma_256});
  all.push_back({"avx2", "integer", kChains * 32, maddubs_256});
  all.push_back({"avx2", "binary", 8 * 256, carry_save_256});
  all.push_back({"avx2", "binary", 4 * 3 * 256, look_ups_256});
#endif
#ifdef LOWBIT_AVX_VNNI
  all.push_back({"avx_vnni", "integer", kChains * 32, vnni_256});
#endif
#ifdef LOWBIT_AVX512
  all.push_back({"avx512", "float", kChains * 16, fma_512});
  all.push_back({"avx512", "integer", kChains * 64, maddubs_512});
  all.push_back({"avx512", "binary", 8 * 512, carry_save_512});
  all.push_back({"avx512", "binary", 4 * 3 * 512, look_ups_512});
#endif
#ifdef LOWBIT_AVX512_VPOPCNTDQ
  all.push_back({"avx512_vpopcntdq", "integer", kChains * 64, vnni_512});
  all.push_back({"avx512_vpopcntdq", "binary", 8 * 2 * 512, popcount_512});
#endif
#ifdef LOWBIT_AMX
  all.push_back({"amx", "integer", 4 * 16 * 16 * 64, tiles});
  all.push_back({"amx", "binary", 4 * 16 * 16 * 64, tiles});  // of bits that have become bytes
#endif
#ifdef LOWBIT_NEON
  all.push_back({"neon", "float", kChains * 4, fma_neon});
  all.push_back({"neon", "integer", kChains * 4, multiply_neon});
  all.push_back({"neon", "binary", kChains * 128, count_neon});
#endif
  return all;
}

// Products a second: the best of some runs, for what disturbs a run only makes it slower.
double speed(const Loop& loop) {
  using Clock = std::chrono::steady_clock;
  constexpr double kLongEnough = 2e-4;
  constexpr int kRuns = 10;
  const auto seconds = [&](int64_t rounds) {
    const auto start = Clock::now();
    loop.run(rounds);
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  int64_t rounds = 1 << 8;
  while (seconds(rounds) < kLongEnough) rounds *= 2;
  double fastest = std::numeric_limits<double>::infinity();
  for (int run = 0; run < kRuns; ++run) fastest = std::min(fastest, seconds(rounds));
  return static_cast<double>(rounds * loop.products) / fastest;
}

}  // namespace

double peak(std::string_view kind, std::string_view isa) {
  const auto built = built_isas(), available = available_isas();
  if (std::find(available.begin(), available.end(), isa) == available.end())
    throw std::invalid_argument("this CPU and build have no instruction set '" + std::string(isa) + "'");
  // An instruction set includes those after it; but avx_vnni is for CPUs without AVX-512, which does not bring it.
  const auto from = std::find(built.begin(), built.end(), isa);
  const auto includes = [&](std::string_view other) {
    return other == isa || (other != "avx_vnni" && std::find(from, built.end(), other) != built.end());
  };
  double best = 0;
  for (const Loop& loop : loops())
    if (loop.kind == kind && includes(loop.isa)) best = std::max(best, speed(loop));
  if (best == 0) throw std::invalid_argument("there is no peak of the kind '" + std::string(kind) + "'");
  return best;
}

}  // namespace lowbit
