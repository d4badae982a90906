// x86-64 with AVX2 and AVX-VNNI (no AVX-512): vpdpbusd on 256 bits, 32 multiply-adds per instruction.
#include <immintrin.h>

#include "cpuid.h"
#include "kernel.h"
#include "standard.h"

namespace int8compile {
namespace {

constexpr int VL = 8;
#include "lanes.h"

using Q = int8_t;
using Sum = __m256i;
using W = __m256i;
using X = __m256i;
constexpr uint32_t OFFSET = 128;
constexpr int PER_PANEL = 2;
constexpr int TILE_M = 6;
constexpr int TILE_P = 1;
constexpr bool FEW_REGISTERS = false;

inline Sum zero() { return _mm256_setzero_si256(); }
inline Sum add(Sum a, Sum b) { return _mm256_add_epi32(a, b); }
inline W load_weights(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline X broadcast(const Q* q) { return _mm256_set1_epi32(load<int32_t>(q)); }
inline Sum dot(Sum sum, W w, X x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
inline void store_sums(const Sum* sum, int32_t* acc) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc), sum[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + 8), sum[1]);
}

inline uint32_t lanes_above(Ints a, Ints b) { return uint32_t(_mm256_movemask_ps((__m256)(a > b))); }

#include "tiles.h"

}  // namespace

extern const Variant avxvnni = variant_of("avxvnni", has_avxvnni);

}  // namespace int8compile
