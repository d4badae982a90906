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
#include "rows.h"
#include "epilogue.h"
#include "tiles.h"

}  // namespace

extern const Variant avx512vnni = {
    "avx512vnni", has_avx512vnni, sizeof(Q), TILE_P,
    quantize, multiply, quantize_digits, multiply_digits, quantize_weight,
};

}  // namespace int8compile
