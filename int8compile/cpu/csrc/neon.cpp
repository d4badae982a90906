// ARMv8.2 with dot product (FEAT_DotProd): sdot, 16 multiply-adds per instruction.
#include <arm_neon.h>

#include "kernel.h"
#include "standard.h"

#if defined(__linux__)
#include <sys/auxv.h>
#endif

namespace int8compile {
namespace {

constexpr int VL = 4;
#include "lanes.h"

using Q = int8_t;
using Sum = int32x4_t;
using W = int8x16_t;
using X = int8x16_t;
constexpr uint32_t OFFSET = 0;
constexpr int PER_PANEL = 4;
constexpr int TILE_M = 6;
constexpr int TILE_P = 1;
constexpr bool FEW_REGISTERS = false;

inline Sum zero() { return vdupq_n_s32(0); }
inline Sum add(Sum a, Sum b) { return vaddq_s32(a, b); }
// Both factors of sdot are signed.
inline W load_weights(const uint8_t* from) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(from), vdupq_n_u8(0x80))); }
inline X broadcast(const Q* q) { return vreinterpretq_s8_s32(vdupq_n_s32(load<int32_t>(q))); }
inline Sum dot(Sum sum, W w, X x) { return vdotq_s32(sum, w, x); }
inline void store_sums(const Sum* sum, int32_t* acc) {
  for (int i = 0; i < 4; ++i) vst1q_s32(acc + 4 * i, sum[i]);
}

inline uint32_t lanes_above(Ints a, Ints b) {
  const uint32x4_t place = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32((uint32x4_t)(a > b), place));
}

#include "tiles.h"

bool has_dot_product() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & (1u << 20);  // HWCAP_ASIMDDP
#else
  return true;  // every Apple CPU that runs PyTorch
#endif
}

}  // namespace

extern const Variant neon = variant_of("neon", has_dot_product);

}  // namespace int8compile
