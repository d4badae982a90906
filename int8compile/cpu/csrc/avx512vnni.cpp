// x86-64 with AVX-512 and VNNI.
#include <immintrin.h>

#include "cpuid.h"
#include "kernel.h"
#include "standard.h"

namespace int8compile {
namespace {

constexpr int VL = 16;
#include "lanes.h"
#include "avx512.h"
#include "tiles.h"

}  // namespace

extern const Variant avx512vnni = variant_of("avx512vnni", has_avx512vnni);

}  // namespace int8compile
