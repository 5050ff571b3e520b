#include "kernels/select.h"

#include <stdexcept>
#include <string>

#include "lowbit/engine.h"

namespace lowbit {
namespace {

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> tables;
#ifdef LOWBIT_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vpopcntdq"))
    tables.push_back(&kAvx512Kernels);
#endif
  tables.push_back(&kScalarKernels);
  return tables;
}

}  // namespace

const Kernels& select_kernels(std::string_view isa) {
  const auto tables = runnable();
  if (isa.empty()) return *tables.front();
  std::string names;
  for (const Kernels* table : tables) {
    if (isa == table->isa) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->isa);
  }
  throw std::invalid_argument("LOWBIT_ISA is '" + std::string(isa) + "', but this build and CPU have only: " + names);
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* table : runnable()) names.emplace_back(table->isa);
  return names;
}

}  // namespace lowbit
