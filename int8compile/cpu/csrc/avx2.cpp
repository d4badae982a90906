// x86-64 with AVX2: bytes widened to int16, then vpmaddwd, 16 multiply-adds per instruction. (vpmaddubsw has 32, but
// its sums saturate at int16.)
#include <immintrin.h>

#include "cpuid.h"
#include "kernel.h"
#include "standard.h"

namespace int8compile {
namespace {

constexpr int VL = 8;
#include "lanes.h"

using Q = int16_t;
using Sum = __m256i;  // of 4 outputs, two partial sums each
using W = __m256i;
using X = __m256i;
constexpr uint32_t OFFSET = 128;
constexpr int PER_PANEL = 4;
constexpr int TILE_M = 3;
constexpr int TILE_P = 1;
constexpr bool FEW_REGISTERS = true;

inline Sum zero() { return _mm256_setzero_si256(); }
inline Sum add(Sum a, Sum b) { return _mm256_add_epi32(a, b); }
inline W load_weights(const uint8_t* from) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline X broadcast(const Q* q) { return _mm256_set1_epi64x(load<int64_t>(q)); }
inline Sum dot(Sum sum, W w, X x) { return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x)); }
inline void store_sums(const Sum* sum, int32_t* acc) {
  for (int half = 0; half < 2; ++half) {
    const __m256i pairs = _mm256_hadd_epi32(sum[2 * half], sum[2 * half + 1]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + 8 * half), _mm256_permute4x64_epi64(pairs, 0xd8));
  }
}

inline uint32_t lanes_above(Ints a, Ints b) { return uint32_t(_mm256_movemask_ps((__m256)(a > b))); }

#include "tiles.h"

}  // namespace

extern const Variant avx2 = variant_of("avx2", has_avx2);

}  // namespace int8compile
