// Chooses the instance of a kernel by the number of pixels, so that its loops over them unroll.
#pragma once

// All pixels of the tile at once.
#define LOWBIT_BY_COUNT(kernel, tile, ...) LOWBIT_UP_TO_EIGHT(kernel, (tile).count, tile, __VA_ARGS__)

// Up to four of `pixels` at a time, from pixel `first` on, which the arguments may name.
#define LOWBIT_BY_FOURS(kernel, pixels, ...)          \
  for (int first = 0; first < (pixels); first += 4) { \
    switch ((pixels) - first) {                       \
      LOWBIT_BELOW_FOUR(kernel, __VA_ARGS__)          \
      default:                                        \
        kernel<4>(__VA_ARGS__);                       \
    }                                                 \
  }

// Up to eight.
#define LOWBIT_BY_EIGHTS(kernel, pixels, ...)                 \
  for (int first = 0; first < (pixels); first += 8) {         \
    LOWBIT_UP_TO_EIGHT(kernel, (pixels) - first, __VA_ARGS__) \
  }

#define LOWBIT_UP_TO_EIGHT(kernel, count, ...) \
  switch (count) {                             \
    LOWBIT_BELOW_FOUR(kernel, __VA_ARGS__)     \
    case 4:                                    \
      kernel<4>(__VA_ARGS__);                  \
      break;                                   \
    case 5:                                    \
      kernel<5>(__VA_ARGS__);                  \
      break;                                   \
    case 6:                                    \
      kernel<6>(__VA_ARGS__);                  \
      break;                                   \
    case 7:                                    \
      kernel<7>(__VA_ARGS__);                  \
      break;                                   \
    default:                                   \
      kernel<8>(__VA_ARGS__);                  \
  }

#define LOWBIT_BELOW_FOUR(kernel, ...) \
  case 1:                              \
    kernel<1>(__VA_ARGS__);            \
    break;                             \
  case 2:                              \
    kernel<2>(__VA_ARGS__);            \
    break;                             \
  case 3:                              \
    kernel<3>(__VA_ARGS__);            \
    break;
