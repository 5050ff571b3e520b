#include "kernels/select.h"

#ifdef LOWBIT_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdexcept>
#include <string>

#include "lowbit/engine.h"

namespace lowbit {
namespace {

#ifdef LOWBIT_AMX
// Linux gives a process the tiles, 8 KB a thread, only when it asks for them.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}
#endif

struct Built {
  const Kernels* kernels;
  bool runs;  // on this CPU
};

// The best first.
std::vector<Built> built() {
  std::vector<Built> tables;
#ifdef LOWBIT_AVX512
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#ifdef LOWBIT_AVX512_VPOPCNTDQ
  const bool vpopcntdq = avx512 && __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512vnni");
#ifdef LOWBIT_AMX
  static const Kernels amx = amx_kernels();
  const bool has_tiles = __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("gfni") && may_use_tiles();
  tables.push_back({&amx, vpopcntdq && has_tiles});
#endif
  tables.push_back({&kAvx512VpopcntdqKernels, vpopcntdq});
#endif
  tables.push_back({&kAvx512Kernels, avx512});
#endif
#ifdef LOWBIT_AVX2
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef LOWBIT_AVX_VNNI
  static const Kernels avx_vnni = avx_vnni_kernels();
  tables.push_back({&avx_vnni, avx2 && __builtin_cpu_supports("avxvnni")});
#endif
  tables.push_back({&kAvx2Kernels, avx2});
#endif
#ifdef LOWBIT_NEON
  tables.push_back({&kNeonKernels, true});
#endif
  tables.push_back({&kScalarKernels, true});
  return tables;
}

}  // namespace

const Kernels& select_kernels(std::string_view isa) {
  std::string names;
  for (const auto& [kernels, runs] : built()) {
    if (!runs) continue;
    if (isa.empty() || isa == kernels->isa) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->isa);
  }
  throw std::invalid_argument("LOWBIT_ISA is '" + std::string(isa) + "', but this build and CPU have only: " + names);
}

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Built& table : built()) names.emplace_back(table.kernels->isa);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Built& table : built())
    if (table.runs) names.emplace_back(table.kernels->isa);
  return names;
}

}  // namespace lowbit
