// Any CPU: the compiler's vector types, which it lowers to the CPU's instructions.
#include "kernel.h"
#include "standard.h"

namespace int8compile {
namespace {

constexpr int VL = 4;
#include "lanes.h"

using Q = int8_t;
using Sum = Words;
using W = Words;
struct X {
  uint32_t q[GROUP];
};
constexpr uint32_t OFFSET = 128;
constexpr int PER_PANEL = LANES / VL;
constexpr int TILE_M = 3;
constexpr int TILE_P = 1;
constexpr bool FEW_REGISTERS = false;

inline Sum zero() { return Sum{}; }
inline Sum add(Sum a, Sum b) { return a + b; }
inline W load_weights(const uint8_t* from) { return load<Words>(from); }
inline X broadcast(const Q* q) { return {{uint32_t(q[0]), uint32_t(q[1]), uint32_t(q[2]), uint32_t(q[3])}}; }
// Where byte j of a word, the weight of input j, begins.
inline int shift_of(int j) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  return 24 - 8 * j;
#else
  return 8 * j;
#endif
}
inline Sum dot(Sum sum, W w, X x) {
  for (int j = 0; j < GROUP; ++j) sum += ((w >> shift_of(j)) & 0xffu) * x.q[j];
  return sum;
}
inline void store_sums(const Sum* sum, int32_t* acc) { std::memcpy(acc, sum, PER_PANEL * sizeof(Sum)); }

inline uint32_t lanes_above(Ints a, Ints b) {
  uint32_t bits = 0;
  for (int lane = 0; lane < VL; ++lane) bits |= uint32_t(a[lane] > b[lane]) << lane;
  return bits;
}

#include "tiles.h"

bool always() { return true; }

}  // namespace

extern const Variant portable = variant_of("portable", always);

}  // namespace int8compile
