#include "linear.h"

namespace int8compile {

extern const Variant portable;
#if defined(__x86_64__)
extern const Variant amx, avx512vnni, avxvnni, avx2;
const Variant* const variants[] = {&amx, &avx512vnni, &avxvnni, &avx2, &portable, nullptr};
#elif defined(__aarch64__)
extern const Variant neon;
const Variant* const variants[] = {&neon, &portable, nullptr};
#else
const Variant* const variants[] = {&portable, nullptr};
#endif

}  // namespace int8compile
