// vpdpbusd on 512 bits, 64 multiply-adds per instruction. tiles.h explains the names. Included inside a namespace.

using Q = int8_t;
using Sum = __m512i;
using W = __m512i;
using X = __m512i;
constexpr uint32_t OFFSET = 128;
constexpr int PER_PANEL = 1;
constexpr int TILE_M = 6;
constexpr int TILE_P = 4;
constexpr bool FEW_REGISTERS = false;

inline Sum zero() { return _mm512_setzero_si512(); }
inline Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
inline W load_weights(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline X broadcast(const Q* q) { return _mm512_set1_epi32(load<int32_t>(q)); }
inline Sum dot(Sum sum, W w, X x) { return _mm512_dpbusd_epi32(sum, w, x); }
inline void store_sums(const Sum* sum, int32_t* acc) { _mm512_storeu_si512(acc, *sum); }

inline uint32_t lanes_above(Ints a, Ints b) { return _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b); }
