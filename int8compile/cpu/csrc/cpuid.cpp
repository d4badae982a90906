#include "cpuid.h"

#include <cpuid.h>
#include <cstdint>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace int8compile {
namespace {

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}

constexpr bool bit(uint32_t word, int position) { return (word >> position) & 1; }

// Registers that the operating system saves (XCR0).
bool saved(uint64_t mask) {
  if (!bit(cpuid(1, 0).ecx, 27)) return false;  // OSXSAVE
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return ((uint64_t(high) << 32 | low) & mask) == mask;
}

constexpr uint64_t YMM = 0x6, ZMM = 0xe6, TILES = 0x60000;

}  // namespace

bool has_avx2() {
  const Registers one = cpuid(1, 0);
  return saved(YMM) && bit(one.ecx, 12) && bit(cpuid(7, 0).ebx, 5);  // FMA, AVX2
}

bool has_avxvnni() { return has_avx2() && bit(cpuid(7, 1).eax, 4); }

bool has_avx512vnni() {
  const Registers seven = cpuid(7, 0);
  return has_avx2() && saved(ZMM) && bit(seven.ebx, 16) && bit(seven.ebx, 17) && bit(seven.ebx, 30) &&  // F, DQ, BW
         bit(seven.ebx, 31) && bit(seven.ecx, 11);                                                     // VL, VNNI
}

bool has_amx() {
  const Registers seven = cpuid(7, 0);
  if (!has_avx512vnni() || !bit(cpuid(7, 1).eax, 5) || !saved(TILES)) return false;     // AVX512_BF16
  if (!bit(seven.edx, 22) || !bit(seven.edx, 24) || !bit(seven.edx, 25)) return false;  // AMX-BF16, -TILE, -INT8
#if defined(__linux__)
  // Linux gives a process its tile registers when it asks.
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

}  // namespace int8compile
