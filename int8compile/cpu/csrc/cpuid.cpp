#include "cpuid.h"

#include <cpuid.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace int8compile {
bool has_bit(uint32_t leaf, uint32_t subleaf, Register word, int position) {
  uint32_t words[4];
  if (!__get_cpuid_count(leaf, subleaf, &words[EAX], &words[EBX], &words[ECX], &words[EDX])) return false;
  return (words[word] >> position) & 1;
}

bool os_saves(uint64_t registers) {
  if (!has_bit(1, 0, ECX, 27)) return false;  // OSXSAVE
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return ((uint64_t(high) << 32 | low) & registers) == registers;
}

bool has_avx2() {
  return os_saves(YMM) && has_bit(1, 0, ECX, 12) && has_bit(7, 0, EBX, 5);  // FMA, AVX2
}

bool has_avxvnni() { return has_avx2() && has_bit(7, 1, EAX, 4); }

bool has_avx512vnni() {
  return has_avx2() && os_saves(ZMM) && has_bit(7, 0, EBX, 16) && has_bit(7, 0, EBX, 17) &&  // F, DQ
         has_bit(7, 0, EBX, 30) && has_bit(7, 0, EBX, 31) && has_bit(7, 0, ECX, 11);         // BW, VL, VNNI
}

bool has_amx() {
  if (!has_avx512vnni() || !has_bit(7, 1, EAX, 5) || !os_saves(TILES)) return false;  // AVX512_BF16
  if (!has_bit(7, 0, EDX, 24) || !has_bit(7, 0, EDX, 25)) return false;  // TILE, INT8
#if defined(__linux__)
  // On Linux a process must request the tile registers.
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

}  // namespace int8compile
