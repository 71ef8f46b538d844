// Chooses the kernels of the widest instruction set that this processor has.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "kernels.h"

#if defined(UML_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define UML_DECLARE(arch)            \
  namespace uml::arch {              \
  extern const Kernels kernel_table; \
  }

UML_DECLARE(baseline)
#if defined(UML_X86)
UML_DECLARE(avx2)
UML_DECLARE(avx512)
UML_DECLARE(avx512_bf16)
UML_DECLARE(amx_bf16)
#endif

namespace uml {
namespace {

constexpr int kMaxTables = 5;

#if defined(UML_X86)
// Whether the processor has AMX and the system lets this process use its tiles: Linux saves their
// 8 KiB per thread only for processes that ask.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  static const bool allowed = __builtin_cpu_supports("amx-tile") &&
                              __builtin_cpu_supports("amx-bf16") &&
                              syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
#else
  return false;
#endif
}
#endif

// Tables this processor can run, widest first; returns how many.
int available(const Kernels* tables[kMaxTables]) {
  int count = 0;
#if defined(UML_X86)
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  if (has_bf16 && may_use_tiles()) tables[count++] = &amx_bf16::kernel_table;
  if (has_bf16) tables[count++] = &avx512_bf16::kernel_table;
  if (has_avx512) tables[count++] = &avx512::kernel_table;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    tables[count++] = &avx2::kernel_table;
#endif
  tables[count++] = &baseline::kernel_table;
  return count;
}

const Kernels* widest() {
  const Kernels* tables[kMaxTables];
  available(tables);
  return tables[0];
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> table{widest()};
  return table;
}

}  // namespace

const Kernels& kernels() { return *active().load(std::memory_order_relaxed); }

bool use_kernels(const char* name) {
  const Kernels* tables[kMaxTables];
  const int count = available(tables);
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(tables[i]->name, name) == 0) {
      active().store(tables[i]);
      return true;
    }
  }
  return false;
}

bool offsets_are_valid(const int32_t* offsets, int64_t segments, int64_t rows, int64_t max_len) {
  bool valid = offsets[0] == 0 && offsets[segments] == rows;
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t length = static_cast<int64_t>(offsets[s + 1]) - offsets[s];
    valid &= length >= 0 && length <= max_len;
  }
  return valid;
}

void longest_first(const int32_t* offsets, int64_t segments, int32_t* order) {
  std::iota(order, order + segments, 0);
  std::stable_sort(order, order + segments, [&](int32_t a, int32_t b) {
    return offsets[a + 1] - offsets[a] > offsets[b + 1] - offsets[b];
  });
}

uint64_t site_key(uint64_t rng_key, int64_t site) {
  uint64_t x = rng_key + (static_cast<uint64_t>(site) + 1) * 0x9E3779B97F4A7C15ULL;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  return x ^ (x >> 31);
}

}  // namespace uml
