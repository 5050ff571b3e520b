// AVX2's binary product by blocks. A nibble of a pixel and one of the next pixel name a table: how many bits differ
// between either and any nibble of a weight, the first number in the low half of a byte, the second in the high one.
// vpshufb looks up the nibbles of 32 channels in it. That is one look-up for 256 products, and three fit the halves of
// a byte before these are taken apart. A table that was fetched meets 64 channels, where there are so many. Included
// inside the target region.
#pragma once

namespace lowbit {
namespace {

constexpr size_t kNibbles = 16;                   // of a word
constexpr size_t kRowWords = kBlockChannels / 8;  // of a nibble of each channel, a byte each
constexpr size_t kByteNibbles = 60;  // of up to 4 each: (1 + 16 + 256) * 4 * 60 fits 16 bits, see add_nibbles
constexpr size_t kSumNibbles = 65535 / (4 * kByteNibbles) * kByteNibbles;

struct NibbleTables {
  alignas(16) uint8_t of[256][16];

  constexpr NibbleTables() : of() {
    for (unsigned pair = 0; pair < 256; ++pair)
      for (unsigned nibble = 0; nibble < 16; ++nibble)
        of[pair][nibble] = static_cast<uint8_t>(__builtin_popcount((pair & 15) ^ nibble) |
                                                __builtin_popcount(pair >> 4 ^ nibble) << 4);
  }
};

constexpr NibbleTables kNibbleTables;

// Nibbles in the order of those of pixels, those of eight channels of a panel beside those of the other's, as unpacking
// them will want it: [nibble][channel / 8][panel][channel % 8].
void arrange_weights(const uint64_t* words, uint64_t* masks) {
  auto* bytes = reinterpret_cast<uint8_t*>(masks);
  for (size_t nibble = 0; nibble < kNibbles; ++nibble)
    for (int c = 0; c < kTileChannels; c += 8)
      for (int panel = 0; panel < 2; ++panel)
        for (int i = 0; i < 8; ++i)
          *bytes++ = words[panel * kTileChannels + c + i] >> (nibble % 8 * 8 + nibble / 8 * 4) & 15;
}

size_t pixel_bytes(size_t depth) { return kBlockPixels / 2 * depth * kNibbles * sizeof(uint16_t); }

// Writes where tables begin, in bytes, [pixel / 2][depth][nibble], first the low nibbles of all bytes; a spare pixel is
// zeros.
void arrange_pixels(const uint64_t* plane, const int64_t* taps, size_t depth, const int64_t* pixels, int count,
                    std::byte* arranged) {
  constexpr uint64_t kLow = 0x0f0f0f0f0f0f0f0f;
  for (int p = 0; p < count; p += 2)
    for (size_t k = 0; k < depth; ++k, arranged += kNibbles * sizeof(uint16_t)) {
      const uint64_t* words = plane + taps[k];
      const uint64_t first = words[pixels[p]], second = p + 1 < count ? words[pixels[p + 1]] : 0;
      const uint64_t low = (first & kLow) | (second & kLow) << 4, high = (first >> 4 & kLow) | (second & ~kLow);
      const __m128i pairs = _mm_set_epi64x(static_cast<long long>(high), static_cast<long long>(low));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(arranged), _mm256_slli_epi16(_mm256_cvtepu8_epi16(pairs), 4));
    }
}

// What N nibbles, up to three, of P pairs of pixels and Q pairs of panels add: to the bytes of a pair's first pixel,
// and to the words of its second one, without a mask between the two bytes of a word: add_nibbles takes off what comes
// of that.
template <int P, int Q, int N>
[[gnu::always_inline]] inline void look_up(const uint16_t* starts, const uint64_t* masks, size_t pitch,
                                           __m256i (&sums)[P][Q][2]) {
  const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    __m256i differ[Q];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) {
      const auto* start = reinterpret_cast<const std::byte*>(kNibbleTables.of) + starts[p * pitch + n];
      const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(start)));
#pragma GCC unroll 2
      for (int q = 0; q < Q; ++q) {
        const __m256i looked_up = _mm256_shuffle_epi8(table, load(masks + (q * pitch + n) * kRowWords));
        differ[q] = n == 0 ? looked_up : _mm256_add_epi8(differ[q], looked_up);
      }
    }
#pragma GCC unroll 2
    for (int q = 0; q < Q; ++q) {
      sums[p][q][0] = _mm256_add_epi8(sums[p][q][0], _mm256_and_si256(differ[q], nibble));
      sums[p][q][1] = _mm256_add_epi16(sums[p][q][1], _mm256_srli_epi16(differ[q], 4));
      // Else the compiler adds what was looked up first, for which it has no registers.
      asm("" : "+x"(sums[p][q][0]), "+x"(sums[p][q][1]));
    }
  }
}

// Adds up to kByteNibbles nibbles to the sums, [first or second pixel][panel of the pair].
template <int P, int Q>
void add_nibbles(const uint16_t* starts, const uint64_t* masks, size_t pitch, size_t nibbles,
                 __m256i (&sums)[P][Q][2][2]) {
  const __m256i zero = _mm256_setzero_si256();
  __m256i bytes[P][Q][2];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
    for (int q = 0; q < Q; ++q) bytes[p][q][0] = bytes[p][q][1] = zero;
  for (; nibbles >= 3; nibbles -= 3, starts += 3, masks += 3 * kRowWords) look_up<P, Q, 3>(starts, masks, pitch, bytes);
  if (nibbles == 2) look_up<P, Q, 2>(starts, masks, pitch, bytes);
  if (nibbles == 1) look_up<P, Q, 1>(starts, masks, pitch, bytes);
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
    for (int q = 0; q < Q; ++q) {
      auto& of = bytes[p][q];
      // In a word of the second pixel stand its own counts of both bytes and, times 16, what the upper byte has of the
      // first one.
      of[1] = _mm256_sub_epi16(of[1], _mm256_slli_epi16(_mm256_srli_epi16(of[0], 8), 4));
      for (int i = 0; i < 2; ++i) {
        sums[p][q][i][0] = _mm256_add_epi16(sums[p][q][i][0], _mm256_unpacklo_epi8(of[i], zero));
        sums[p][q][i][1] = _mm256_add_epi16(sums[p][q][i][1], _mm256_unpackhi_epi8(of[i], zero));
      }
    }
}

void store_counts(__m256i sums, bool add, int32_t* counts) {
  __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(sums)),
          high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(sums, 1));
  if (add) {
    low = _mm256_add_epi32(low, load(counts));
    high = _mm256_add_epi32(high, load(counts + 8));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(counts), low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(counts + 8), high);
}

// P pairs of pixels from pair `first` on, and Q pairs of panels.
template <int P, int Q>
void count_pairs(const uint16_t* arranged, const uint64_t* masks, size_t depth, int first, BlockSums* counts) {
  const size_t pitch = depth * kNibbles;
  const uint16_t* starts = arranged + first * pitch;
  for (size_t n = 0; n < pitch;) {
    const bool more = n > 0;
    const size_t end = pitch - n > kSumNibbles ? n + kSumNibbles : pitch;
    __m256i sums[P][Q][2][2] = {};
    while (n < end) {
      const size_t nibbles = end - n > kByteNibbles ? kByteNibbles : end - n;
      add_nibbles(starts + n, masks + n * kRowWords, pitch, nibbles, sums);
      n += nibbles;
    }
    for (int p = 0; p < P; ++p)
      for (int q = 0; q < Q; ++q)
        for (int i = 0; i < 2; ++i)
          for (int panel = 0; panel < 2; ++panel)
            store_counts(sums[p][q][i][panel], more, counts[2 * q + panel][2 * (first + p) + i]);
  }
}

// All pairs of pixels, P at a time.
template <int P, int Q>
void count_panels(const uint16_t* arranged, const uint64_t* masks, size_t depth, int pairs, BlockSums* counts) {
  int first = 0;
  for (; first + P <= pairs; first += P) count_pairs<P, Q>(arranged, masks, depth, first, counts);
  for (; first < pairs; ++first) count_pairs<1, Q>(arranged, masks, depth, first, counts);
}

void count(const std::byte* arranged, const uint64_t* masks, const int32_t*, size_t depth, int count, int panels,
           BlockSums* counts) {
  const auto* starts = reinterpret_cast<const uint16_t*>(arranged);
  const int pairs = (count + 1) / 2;
  for (; panels >= 4; panels -= 4, masks += 2 * depth * kNibbles * kRowWords, counts += 4)
    count_panels<2, 2>(starts, masks, depth, pairs, counts);
  if (panels > 0) count_panels<4, 1>(starts, masks, depth, pairs, counts);
}

void count_floats(const int32_t (*counts)[kTileChannels], int count, int panels, const int32_t* const* bases,
                  const FloatOutput& out) {
  for (int first = 0; first < panels * kTileChannels; first += 8) {
    const auto* panel = counts + first / kTileChannels * kBlockPixels;
    store_sums(count, out, first,
               [&](int p) { return dots(load(panel[p] + first % kTileChannels), bases[p] + first); });
  }
}

constexpr BlockKernels kBlocks{kNibbles * kRowWords / kBlockChannels, arrange_weights, pixel_bytes, arrange_pixels,
                               count};
constexpr CountKernels kCounts{sum_bits, count_floats};

}  // namespace
}  // namespace lowbit
