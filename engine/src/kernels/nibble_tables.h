// AVX2's binary product by blocks. A byte of a pixel names a table of how many bits differ between its two nibbles and
// any nibble of a weight; vpshufb looks up the nibbles of 16 channels in it. That is one look-up and one sum for 128
// products, and weights are taken apart once for 4 pixels. Included inside the target region.
#pragma once

namespace lowbit {
namespace {

constexpr int kPixelsAtOnce = 4;
constexpr size_t kWordBytes = 8;
constexpr size_t kByteWords = 7;       // a word adds up to 32 to a byte
constexpr size_t kSumWords = 7 * 128;  // and up to 64 to a sum of 16 bits

// Of each byte: in the first 16 places for its low nibble, in the others for its high one.
struct NibbleTables {
  alignas(32) uint8_t of[256][32];

  constexpr NibbleTables() : of() {
    for (unsigned byte = 0; byte < 256; ++byte)
      for (unsigned place = 0; place < 32; ++place) {
        const unsigned differ = (byte >> place / 16 * 4 ^ place) & 15;
        of[byte][place] = static_cast<uint8_t>((differ & 1) + (differ >> 1 & 1) + (differ >> 2 & 1) + (differ >> 3));
      }
  }
};

constexpr NibbleTables kNibbleTables;

// From two bytes of each channel make [low nibbles, high nibbles][16 channels], the second byte's in the upper halves.
void arrange_weights(const uint64_t* words, uint64_t* masks) {
  uint8_t nibbles[kWordBytes / 2][2][kTileChannels];
  for (size_t pair = 0; pair < kWordBytes / 2; ++pair)
    for (int half = 0; half < 2; ++half)
      for (int c = 0; c < kTileChannels; ++c) {
        const uint64_t first = words[c] >> (16 * pair + 4 * half);
        nibbles[pair][half][c] = static_cast<uint8_t>((first & 15) | (first >> 8 & 15) << 4);
      }
  __builtin_memcpy(masks, nibbles, sizeof nibbles);
}

size_t pixel_bytes(size_t depth) { return kBlockPixels * depth * kWordBytes * sizeof(uint16_t); }

// Writes where the table of each byte begins, in bytes, [pixel / 4][depth][pixel % 4][byte]; spare pixels are zeros.
void arrange_pixels(const uint64_t* plane, const int64_t* taps, size_t depth, const int64_t* pixels, int count,
                    std::byte* arranged) {
  for (int first = 0; first < count; first += kPixelsAtOnce)
    for (size_t k = 0; k < depth; ++k)
      for (int p = first; p < first + kPixelsAtOnce; ++p, arranged += kWordBytes * sizeof(uint16_t)) {
        const uint64_t word = p < count ? plane[taps[k] + pixels[p]] : 0;
        const __m128i bytes = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(static_cast<long long>(word)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(arranged), _mm_slli_epi16(bytes, 5));
      }
}

// What one byte of 4 pixels adds to the bytes of two panels.
[[gnu::always_inline]] inline void look_up(const uint16_t* starts, __m256i left, __m256i right,
                                           __m256i (&bytes)[kPixelsAtOnce][2]) {
#pragma GCC unroll 4
  for (int p = 0; p < kPixelsAtOnce; ++p) {
    const auto* tables = reinterpret_cast<const std::byte*>(kNibbleTables.of);
    const __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(tables + starts[p * kWordBytes]));
    bytes[p][0] = _mm256_add_epi8(bytes[p][0], _mm256_shuffle_epi8(table, left));
    bytes[p][1] = _mm256_add_epi8(bytes[p][1], _mm256_shuffle_epi8(table, right));
    // Else the compiler adds what was looked up first, for which it has no registers.
    asm("" : "+x"(bytes[p][0]), "+x"(bytes[p][1]));
  }
}

// Adds up to kByteWords words of 4 pixels and two panels.
void add_words(const uint16_t* starts, const uint64_t* masks, size_t words, __m256i (&sums)[kPixelsAtOnce][2]) {
  const __m256i nibble = _mm256_set1_epi8(15);
  __m256i bytes[kPixelsAtOnce][2];
#pragma GCC unroll 4
  for (int p = 0; p < kPixelsAtOnce; ++p) bytes[p][0] = bytes[p][1] = _mm256_setzero_si256();
  for (; words > 0; --words, starts += kPixelsAtOnce * kWordBytes, masks += kBlockChannels) {
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
      const __m256i left = load(masks + 4 * pair), right = load(masks + kTileChannels + 4 * pair);
      look_up(starts + 2 * pair, _mm256_and_si256(left, nibble), _mm256_and_si256(right, nibble), bytes);
      look_up(starts + 2 * pair + 1, _mm256_and_si256(_mm256_srli_epi16(left, 4), nibble),
              _mm256_and_si256(_mm256_srli_epi16(right, 4), nibble), bytes);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < kPixelsAtOnce; ++p)
    for (int panel = 0; panel < 2; ++panel) {
      const __m256i of_low = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(bytes[p][panel])),
                    of_high = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(bytes[p][panel], 1));
      sums[p][panel] = _mm256_add_epi16(sums[p][panel], _mm256_add_epi16(of_low, of_high));
    }
}

void store_sums(__m256i sums, bool add, int32_t* counts) {
  __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(sums)),
          high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(sums, 1));
  if (add) {
    low = _mm256_add_epi32(low, load(counts));
    high = _mm256_add_epi32(high, load(counts + 8));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(counts), low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(counts + 8), high);
}

void count(const std::byte* arranged, const uint64_t* masks, const int32_t*, size_t depth, int count, int panels,
           BlockCounts* counts) {
  for (int panel = 0; panel < panels; panel += 2, masks += depth * kBlockChannels) {
    const auto* starts = reinterpret_cast<const uint16_t*>(arranged);
    for (int first = 0; first < count; first += kPixelsAtOnce)
      for (size_t k = 0; k < depth;) {
        const bool more = k > 0;
        const size_t end = depth - k > kSumWords ? k + kSumWords : depth;
        __m256i sums[kPixelsAtOnce][2] = {};
        while (k < end) {
          const size_t words = end - k > kByteWords ? kByteWords : end - k;
          add_words(starts, masks + k * kBlockChannels, words, sums);
          starts += words * kPixelsAtOnce * kWordBytes;
          k += words;
        }
        for (int p = 0; p < kPixelsAtOnce; ++p)
          for (int i = 0; i < 2; ++i) store_sums(sums[p][i], more, counts[panel + i][first + p]);
      }
  }
}

void count_bits(const int32_t (*counts)[kTileChannels], int panels, const int32_t* limits, const uint64_t* falling,
                uint64_t* words) {
  for (int panel = 0; panel < panels; panel += 4) {
    uint64_t word = falling[panel / 4];
    for (int i = 0; i < 8 && panel + i / 2 < panels; ++i) {
      const int number = panel + i / 2, half = i % 2 * 8;
      const unsigned eight = within(load(counts[number * kBlockPixels] + half), limits + number * kTileChannels + half);
      word ^= uint64_t{eight} << 8 * i;
    }
    words[panel / 4] = word;
  }
}

void count_floats(const int32_t (*counts)[kTileChannels], int count, const int32_t* const* bases,
                  const FloatOutput& out) {
  for (int p = 0; p < count; ++p)
    for (int first = 0; first < kTileChannels; first += 8) store_dots(load(counts[p] + first), bases[p], out, p, first);
}

constexpr BlockKernels kBlocks{arrange_weights, pixel_bytes, arrange_pixels, count, count_bits, count_floats};

}  // namespace
}  // namespace lowbit
