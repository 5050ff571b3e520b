// The binary product by blocks, of AVX2 and of AVX-512 that cannot count bits. A nibble of a pixel and one of the next
// pixel name a table: how many bits differ between either and any nibble of a weight, the first number in the low half
// of a byte, the second in the high one. vpshufb looks up a nibble of each of 32 or 64 channels in it. That is one
// look-up for 256 or 512 products, and three fit the halves of a byte before these are taken apart. A table that was
// fetched meets as many channels again, where there are so many. Included inside the target region, by a file that has
// defined for its Vector:
//   load(pointer), repeated(pointer to 16 bytes), looked_up(table, indices) of each 16 bytes,
//   low_bytes(a) and high_bytes(a), those of each 16 bytes made wide, as 16 bits;
//   store_counts(words, add, counts, row), of every second panel: 32 bits each, or added to what is there.
#pragma once

namespace lowbit {
namespace {

constexpr size_t kNibbles = 16;  // of a word
constexpr int kVectorPanels = sizeof(Vector) / kTileChannels;
static_assert(kVectorPanels <= BlockKernels::kMostPanels);
constexpr int kPairsAtTwo = sizeof(Vector) == 64 ? 4 : 2;  // of pixels, that two vectors leave registers for
constexpr size_t kByteNibbles = 60;  // of up to 4 each: (1 + 16 + 256) * 4 * 60 fits 16 bits, see add_nibbles
constexpr size_t kSumNibbles = 65535 / (4 * kByteNibbles) * kByteNibbles;

using Bytes = uint8_t __attribute__((vector_size(sizeof(Vector))));
using Words = uint16_t __attribute__((vector_size(sizeof(Vector))));

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

// Nibbles in the order of those of pixels, a vector of all channels each, those of eight channels of a panel beside
// those of the next one's, as making them wide will want it: [nibble][panel / 2][channel / 8][panel % 2][channel % 8].
void arrange_weights(const uint64_t* words, std::byte* masks) {
  for (size_t nibble = 0; nibble < kNibbles; ++nibble)
    for (int pair = 0; pair < kVectorPanels; pair += 2)
      for (int c = 0; c < kTileChannels; c += 8)
        for (int panel = pair; panel < pair + 2; ++panel)
          for (int i = 0; i < 8; ++i)
            *masks++ =
                static_cast<std::byte>(words[panel * kTileChannels + c + i] >> (nibble % 8 * 8 + nibble / 8 * 4) & 15);
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

template <class Lanes>
Vector add(Vector a, Vector b) {
  return (Vector)((Lanes)a + (Lanes)b);
}

// What N nibbles, up to three, of P pairs of pixels and Q vectors of channels add: to the bytes of a pair's first
// pixel, and to the words of its second one, without a mask between the two bytes of a word: add_nibbles takes off what
// comes of that.
template <int P, int Q, int N>
[[gnu::always_inline]] inline void look_up(const uint16_t* starts, const std::byte* masks, size_t pitch,
                                           Vector (&sums)[P][Q][2]) {
  const auto nibble = (Vector)(Bytes{} + 15);
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    Vector differ[Q];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) {
      const Vector table = repeated(reinterpret_cast<const std::byte*>(kNibbleTables.of) + starts[p * pitch + n]);
#pragma GCC unroll 2
      for (int q = 0; q < Q; ++q) {
        const Vector more = looked_up(table, load(masks + (q * pitch + n) * sizeof(Vector)));
        differ[q] = n == 0 ? more : add<Bytes>(differ[q], more);
      }
    }
#pragma GCC unroll 2
    for (int q = 0; q < Q; ++q) {
      sums[p][q][0] = add<Bytes>(sums[p][q][0], differ[q] & nibble);
      sums[p][q][1] = add<Words>(sums[p][q][1], (Vector)((Words)differ[q] >> 4));
      // Else the compiler adds what was looked up first, for which it has no registers.
      asm("" : "+v"(sums[p][q][0]), "+v"(sums[p][q][1]));
    }
  }
}

// Adds up to kByteNibbles nibbles to the sums, [first or second pixel][even or odd panels].
template <int P, int Q>
void add_nibbles(const uint16_t* starts, const std::byte* masks, size_t pitch, size_t nibbles,
                 Vector (&sums)[P][Q][2][2]) {
  Vector bytes[P][Q][2];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
    for (int q = 0; q < Q; ++q) bytes[p][q][0] = bytes[p][q][1] = Vector{};
  for (; nibbles >= 3; nibbles -= 3, starts += 3, masks += 3 * sizeof(Vector))
    look_up<P, Q, 3>(starts, masks, pitch, bytes);
  if (nibbles == 2) look_up<P, Q, 2>(starts, masks, pitch, bytes);
  if (nibbles == 1) look_up<P, Q, 1>(starts, masks, pitch, bytes);
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
    for (int q = 0; q < Q; ++q) {
      auto& of = bytes[p][q];
      // In a word of the second pixel stand its own counts of both bytes and, times 16, what the upper byte has of the
      // first one.
      of[1] = (Vector)((Words)of[1] - ((Words)of[0] >> 8 << 4));
      for (int i = 0; i < 2; ++i) {
        sums[p][q][i][0] = add<Words>(sums[p][q][i][0], low_bytes(of[i]));
        sums[p][q][i][1] = add<Words>(sums[p][q][i][1], high_bytes(of[i]));
      }
    }
}

// P pairs of pixels from pair `first` on, and Q vectors of channels.
template <int P, int Q>
void count_pairs(const uint16_t* arranged, const std::byte* masks, size_t depth, int first, BlockSums* counts) {
  const size_t pitch = depth * kNibbles;
  const uint16_t* starts = arranged + first * pitch;
  for (size_t n = 0; n < pitch;) {
    const bool more = n > 0;
    const size_t end = pitch - n > kSumNibbles ? n + kSumNibbles : pitch;
    Vector sums[P][Q][2][2] = {};
    while (n < end) {
      const size_t nibbles = end - n > kByteNibbles ? kByteNibbles : end - n;
      add_nibbles(starts + n, masks + n * sizeof(Vector), pitch, nibbles, sums);
      n += nibbles;
    }
    for (int p = 0; p < P; ++p)
      for (int q = 0; q < Q; ++q)
        for (int i = 0; i < 2; ++i)
          for (int panel = 0; panel < 2; ++panel)
            store_counts(sums[p][q][i][panel], more, counts + q * kVectorPanels + panel, 2 * (first + p) + i);
  }
}

// All pairs of pixels, P at a time.
template <int P, int Q>
void count_panels(const uint16_t* arranged, const std::byte* masks, size_t depth, int pairs, BlockSums* counts) {
  int first = 0;
  for (; first + P <= pairs; first += P) count_pairs<P, Q>(arranged, masks, depth, first, counts);
  if constexpr (P > 2)
    for (; first + 2 <= pairs; first += 2) count_pairs<2, Q>(arranged, masks, depth, first, counts);
  for (; first < pairs; ++first) count_pairs<1, Q>(arranged, masks, depth, first, counts);
}

void count(const std::byte* arranged, const std::byte* masks, size_t depth, int count, int panels, BlockSums* counts) {
  const auto* starts = reinterpret_cast<const uint16_t*>(arranged);
  const int pairs = (count + 1) / 2;
  constexpr int kBoth = 2 * kVectorPanels;
  for (; panels >= kBoth; panels -= kBoth, masks += 2 * depth * kNibbles * sizeof(Vector), counts += kBoth)
    count_panels<kPairsAtTwo, 2>(starts, masks, depth, pairs, counts);
  if (panels > 0) count_panels<4, 1>(starts, masks, depth, pairs, counts);
}

constexpr BlockKernels kBlocks{kVectorPanels, kNibbles * sizeof(Vector), arrange_weights, pixel_bytes, arrange_pixels,
                               count};

}  // namespace
}  // namespace lowbit
