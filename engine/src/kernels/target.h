// The x86 intrinsics, and what opens and closes a region whose functions are compiled for more than the base
// instruction set. Standard headers must be included before it, and nothing from std:: may be instantiated inside: the
// linker could keep that copy for everybody.
#pragma once

#define LOWBIT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#include <immintrin.h>
#define LOWBIT_TARGET_OPEN(features) \
  LOWBIT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LOWBIT_TARGET_CLOSE _Pragma("clang attribute pop")
#else
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12's header leaves lanes undefined on purpose and then warns
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#define LOWBIT_TARGET_OPEN(features) _Pragma("GCC push_options") LOWBIT_PRAGMA(GCC target(features))
#define LOWBIT_TARGET_CLOSE _Pragma("GCC pop_options")
#endif
