// What AVX-512 makes of counts that a block or AMX has left in memory. Included inside the target region.
#pragma once

namespace lowbit {
namespace {

// Of 16 channels for each panel, from `channel` on.
template <int Panels, bool Adds>
void panel_floats(const int32_t (*counts)[kTileChannels], int count, int64_t channel, const int32_t* const* bases,
                  const FloatOutput& out) {
  __m512 scale[Panels], bias[Panels];
  for (int i = 0; i < Panels; ++i) {
    scale[i] = _mm512_loadu_ps(out.scale + channel + i * kTileChannels);
    bias[i] = _mm512_loadu_ps(out.bias + channel + i * kTileChannels);
  }
  counts += channel / kTileChannels * kBlockPixels;
  float* y = out.output + channel;
  const float* added = Adds ? out.added + channel : nullptr;
  const ptrdiff_t stride = out.stride;
  for (int p = 0; p < count; ++p, y += stride, added += Adds ? stride : 0) {
    const int32_t* base = bases[p] + channel;
#pragma GCC unroll 4
    for (int i = 0; i < Panels; ++i) {
      const __m512i row = _mm512_load_si512(counts[i * kBlockPixels + p]);
      const __m512i dots = _mm512_sub_epi32(_mm512_loadu_si512(base + i * kTileChannels), _mm512_add_epi32(row, row));
      __m512 value = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dots), scale[i]), bias[i]);
      if constexpr (Adds) value = _mm512_add_ps(value, _mm512_loadu_ps(added + i * kTileChannels));
      _mm512_storeu_ps(y + i * kTileChannels, value);
    }
  }
}

template <bool Adds>
void all_floats(const int32_t (*counts)[kTileChannels], int count, int panels, const int32_t* const* bases,
                const FloatOutput& out) {
  int panel = 0;
  for (; panel + 4 <= panels; panel += 4) panel_floats<4, Adds>(counts, count, panel * kTileChannels, bases, out);
  for (; panel < panels; ++panel) panel_floats<1, Adds>(counts, count, panel * kTileChannels, bases, out);
}

void count_floats(const int32_t (*counts)[kTileChannels], int count, int panels, const int32_t* const* bases,
                  const FloatOutput& out) {
  if (out.added != nullptr)
    all_floats<true>(counts, count, panels, bases, out);
  else
    all_floats<false>(counts, count, panels, bases, out);
}

}  // namespace
}  // namespace lowbit
