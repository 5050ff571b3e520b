// A pixel's runs of bytes, put in a row by vectors. Included inside the target region.
#pragma once

namespace lowbit {
namespace {

void arrange_rows(const uint8_t* plane, const int64_t* runs, size_t run_count, size_t length, const int64_t* pixels,
                  int count, size_t depth, uint8_t* arranged) {
  for (int p = 0; p < count; ++p) {
    uint8_t* row = arranged + p * depth;
    for (size_t run = 0; run < run_count; ++run, row += length) {
      const uint8_t* from = plane + runs[run] + pixels[p];
      if (length <= 32)  // so that fewer copies cross the end of a cache line
        __builtin_memcpy(row, from, 32);
      else
        for (size_t i = 0; i < length; i += 64) __builtin_memcpy(row + i, from + i, 64);
    }
  }
}

}  // namespace
}  // namespace lowbit
