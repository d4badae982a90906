#include "features.h"

#if defined(__x86_64__)
#include "cpuid.h"
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace int8compile {

#if defined(__x86_64__)

namespace {

template <uint32_t leaf, uint32_t subleaf, Register word, int position, uint64_t state = 0>
bool has() {
  return has_bit(leaf, subleaf, word, position) && (!state || os_saves(state));
}

}  // namespace

// Intel's Software Developer's Manual, volume 2A, CPUID.
const Feature features[] = {
    {"__SSE3__", has<1, 0, ECX, 0>},
    {"__SSSE3__", has<1, 0, ECX, 9>},
    {"__SSE4_1__", has<1, 0, ECX, 19>},
    {"__SSE4_2__", has<1, 0, ECX, 20>},
    {"__MOVBE__", has<1, 0, ECX, 22>},
    {"__POPCNT__", has<1, 0, ECX, 23>},
    {"__AES__", has<1, 0, ECX, 25>},
    {"__PCLMUL__", has<1, 0, ECX, 1>},
    {"__AVX__", has<1, 0, ECX, 28, YMM>},
    {"__FMA__", has<1, 0, ECX, 12, YMM>},
    {"__F16C__", has<1, 0, ECX, 29, YMM>},
    {"__LZCNT__", has<0x80000001, 0, ECX, 5>},
    {"__BMI__", has<7, 0, EBX, 3>},
    {"__BMI2__", has<7, 0, EBX, 8>},
    {"__ADX__", has<7, 0, EBX, 19>},
    {"__SHA__", has<7, 0, EBX, 29>},
    {"__GFNI__", has<7, 0, ECX, 8>},
    {"__AVX2__", has<7, 0, EBX, 5, YMM>},
    {"__VAES__", has<7, 0, ECX, 9, YMM>},
    {"__VPCLMULQDQ__", has<7, 0, ECX, 10, YMM>},
    {"__AVXVNNI__", has<7, 1, EAX, 4, YMM>},
    {"__AVXIFMA__", has<7, 1, EAX, 23, YMM>},
    {"__AVXVNNIINT8__", has<7, 1, EDX, 4, YMM>},
    {"__AVXNECONVERT__", has<7, 1, EDX, 5, YMM>},
    {"__AVXVNNIINT16__", has<7, 1, EDX, 10, YMM>},
    {"__AVX512F__", has<7, 0, EBX, 16, ZMM>},
    {"__AVX512DQ__", has<7, 0, EBX, 17, ZMM>},
    {"__AVX512IFMA__", has<7, 0, EBX, 21, ZMM>},
    {"__AVX512CD__", has<7, 0, EBX, 28, ZMM>},
    {"__AVX512BW__", has<7, 0, EBX, 30, ZMM>},
    {"__AVX512VL__", has<7, 0, EBX, 31, ZMM>},
    {"__AVX512VBMI__", has<7, 0, ECX, 1, ZMM>},
    {"__AVX512VBMI2__", has<7, 0, ECX, 6, ZMM>},
    {"__AVX512VNNI__", has<7, 0, ECX, 11, ZMM>},
    {"__AVX512BITALG__", has<7, 0, ECX, 12, ZMM>},
    {"__AVX512VPOPCNTDQ__", has<7, 0, ECX, 14, ZMM>},
    {"__AVX512VP2INTERSECT__", has<7, 0, EDX, 8, ZMM>},
    {"__AVX512FP16__", has<7, 0, EDX, 23, ZMM>},
    {"__AVX512BF16__", has<7, 1, EAX, 5, ZMM>},
    {nullptr, nullptr},
};

#elif defined(__aarch64__) && defined(__linux__)

namespace {

template <unsigned long word, int bit>
bool has() {
  return getauxval(word) >> bit & 1;
}

}  // namespace

// Linux, arch/arm64/include/uapi/asm/hwcap.h.
const Feature features[] = {
    {"__ARM_FEATURE_CRC32", has<AT_HWCAP, 7>},
    {"__ARM_FEATURE_ATOMICS", has<AT_HWCAP, 8>},
    {"__ARM_FEATURE_FP16_SCALAR_ARITHMETIC", has<AT_HWCAP, 9>},
    {"__ARM_FEATURE_FP16_VECTOR_ARITHMETIC", has<AT_HWCAP, 10>},
    {"__ARM_FEATURE_QRDMX", has<AT_HWCAP, 12>},
    {"__ARM_FEATURE_DOTPROD", has<AT_HWCAP, 20>},
    {"__ARM_FEATURE_SVE", has<AT_HWCAP, 22>},
    {"__ARM_FEATURE_FP16_FML", has<AT_HWCAP, 23>},
    {"__ARM_FEATURE_SVE2", has<AT_HWCAP2, 1>},
    {"__ARM_FEATURE_MATMUL_INT8", has<AT_HWCAP2, 13>},
    {"__ARM_FEATURE_BF16_VECTOR_ARITHMETIC", has<AT_HWCAP2, 14>},
    {nullptr, nullptr},
};

#else

const Feature features[] = {{nullptr, nullptr}};

#endif

}  // namespace int8compile
