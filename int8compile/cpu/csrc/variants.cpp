// INT8COMPILE_NO_<VARIANT>: the compiler is too old for a variant, which is not linked; see int8compile/cpu/build.py.
#include "linear.h"

namespace int8compile {

extern const Variant amx, avx512vnni, avxvnni, avx2, neon, portable;

const Variant* const variants[] = {
#if defined(__x86_64__) && !defined(INT8COMPILE_NO_AMX)
    &amx,
#endif
#if defined(__x86_64__) && !defined(INT8COMPILE_NO_AVX512VNNI)
    &avx512vnni,
#endif
#if defined(__x86_64__) && !defined(INT8COMPILE_NO_AVXVNNI)
    &avxvnni,
#endif
#if defined(__x86_64__) && !defined(INT8COMPILE_NO_AVX2)
    &avx2,
#endif
#if defined(__aarch64__) && !defined(INT8COMPILE_NO_NEON)
    &neon,
#endif
    &portable,
    nullptr,
};

}  // namespace int8compile
