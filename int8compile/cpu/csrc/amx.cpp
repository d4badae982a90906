// x86-64 with AMX: tdpbsud multiplies a tile of 16 rows x 64 inputs by one of 64 inputs x 16 outputs, 16384
// multiply-adds an instruction. Few rows go through vpdpbusd, which is as fast where the weights' bytes are the limit.
#include <immintrin.h>

#include "cpuid.h"
#include "kernel.h"
#include "standard.h"

namespace int8compile {
namespace {

#include "lanes.h"
#include "avx512.h"
#include "rows.h"
#include "epilogue.h"
#include "tiles.h"

constexpr int TILE_ROWS = 16;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3 are sums [16][16] int32 (row half, panel), 4-5 activations [16][64], 6-7 weights [64 / GROUP][16][GROUP].
void configure() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.bytes[tile] = 64;
    config.rows[tile] = 16;
  }
  _tile_loadconfig(&config);
}

// Up to 32 rows and 2 panels. Rows beyond the last are multiplied too, and ignored.
//
// Where the weights are used once they come from memory, and are asked for this far ahead.
constexpr int64_t TILE_PREFETCH_BYTES = 4096;

inline void prefetch_tile(const uint8_t* packed) {
  for (int line = 0; line < 16; ++line) __builtin_prefetch(packed + TILE_PREFETCH_BYTES + 64 * line);
}

template <int HALVES, int P, bool ONCE>
inline void amx_tile(const Q* q, int64_t stride, int64_t k_padded, const uint8_t* packed, int32_t* acc) {
  const int64_t panel_bytes = LANES * k_padded;
  _tile_zero(0);
  if (P > 1) _tile_zero(1);
  if (HALVES > 1) _tile_zero(2);
  if (HALVES > 1 && P > 1) _tile_zero(3);
  for (int64_t k = 0; k < k_padded; k += K_STEP) {
    if (ONCE) {
      for (int p = 0; p < P; ++p) prefetch_tile(packed + p * panel_bytes + k * LANES);
    }
    _tile_loadd(6, packed + k * LANES, LANES * GROUP);
    _tile_loadd(4, q + k, stride);
    _tile_dpbsud(0, 4, 6);
    if (P > 1) {
      _tile_loadd(7, packed + panel_bytes + k * LANES, LANES * GROUP);
      _tile_dpbsud(1, 4, 7);
    }
    if (HALVES > 1) {
      _tile_loadd(5, q + TILE_ROWS * stride + k, stride);
      _tile_dpbsud(2, 5, 6);
      if (P > 1) _tile_dpbsud(3, 5, 7);
    }
  }
  constexpr int64_t acc_stride = P * LANES * 4;
  _tile_stored(0, acc, acc_stride);
  if (P > 1) _tile_stored(1, acc + LANES, acc_stride);
  if (HALVES > 1) _tile_stored(2, acc + TILE_ROWS * P * LANES, acc_stride);
  if (HALVES > 1 && P > 1) _tile_stored(3, acc + TILE_ROWS * P * LANES + LANES, acc_stride);
}

template <int P>
void amx_panels(const Rows& rows, int64_t begin, int64_t end, const Weight& weight, int64_t panel, const Output& y) {
  alignas(64) int32_t acc[2 * TILE_ROWS * P * LANES];
  const Affine affine[2] = {Affine(weight, panel), Affine(weight, panel + P - 1)};
  const uint8_t* packed = weight.packed + panel * LANES * rows.k_padded;
  for (int64_t row = begin; row < end;) {
    const int64_t left = end - row;
    const Q* q = static_cast<const Q*>(rows.q) + row * rows.stride;
    const int64_t count = left < 2 * TILE_ROWS ? left : 2 * TILE_ROWS;
    if (left > TILE_ROWS) {
      row == begin ? amx_tile<2, P, true>(q, rows.stride, rows.k_padded, packed, acc) : amx_tile<2, P, false>(q, rows.stride, rows.k_padded, packed, acc);
    } else {
      row == begin ? amx_tile<1, P, true>(q, rows.stride, rows.k_padded, packed, acc) : amx_tile<1, P, false>(q, rows.stride, rows.k_padded, packed, acc);
    }
    for (int64_t m = 0; m < count; ++m) finish<P>(rows, row + m, weight, panel, affine, acc + m * P * LANES, y);
    row += count;
  }
}

// As many rows as are no slower by vpdpbusd.
constexpr int64_t FEW_ROWS = 4;

void amx_multiply(const Rows& rows, int64_t row_begin, int64_t row_end, const Weight& weight, int64_t panel_begin,
                  int64_t panel_end, const Output& y) {
  if (row_end - row_begin <= FEW_ROWS) {
    multiply(rows, row_begin, row_end, weight, panel_begin, panel_end, y);
    return;
  }
  configure();
  int64_t panel = panel_begin;
  for (; panel + 2 <= panel_end; panel += 2) amx_panels<2>(rows, row_begin, row_end, weight, panel, y);
  if (panel < panel_end) amx_panels<1>(rows, row_begin, row_end, weight, panel, y);
  _tile_release();
}

}  // namespace

extern const Variant amx = {
    "amx", has_amx_int8, sizeof(Q), 2,
    to_float, quantize, residual, amx_multiply, quantize_digits, multiply_digits,
};

}  // namespace int8compile
