// x86-64 with AMX: tdpbsud multiplies a tile of 16 rows x 64 inputs by one of 64 inputs x 16 outputs, 16384
// multiply-adds an instruction. Few rows go through vpdpbusd, which is as fast where the weights' bytes are the limit.
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

// Where the weights are used once they come from memory, and are asked for this far ahead.
constexpr int64_t TILE_PREFETCH_BYTES = 4096;

inline void prefetch_tile(const uint8_t* packed) {
  for (int line = 0; line < 16; ++line) __builtin_prefetch(packed + TILE_PREFETCH_BYTES + 64 * line);
}

constexpr int MAX_ROWS = 2 * TILE_ROWS;

// Sums that are to be finished. That is work for the vector units, done while the tile unit multiplies the next tile:
// neither waits for the other.
template <int P>
struct Pending {
  const Rows& rows;
  const Weight& weight;
  const Output& y;
  int64_t panel = 0;
  int64_t row = 0, end = 0;
  int64_t first = 0;
  const Affine* affine = nullptr;
  const int32_t* acc = nullptr;

  void finish_to(int64_t stop) {
    for (; row < stop; ++row) finish<P>(rows, row, weight, panel, affine, acc + (row - first) * P * LANES, y);
  }
};

// Up to 32 rows and P panels into acc [32][P][LANES]. Rows beyond the last are multiplied too, and ignored.
template <int HALVES, int P, bool ONCE>
inline void amx_tile(const Q* q, int64_t stride, int64_t k_padded, const uint8_t* packed, int32_t* acc,
                     Pending<P>& pending) {
  const int64_t panel_bytes = LANES * k_padded;
  const int64_t steps = k_padded / K_STEP;
  const int64_t rows_of_step = (pending.end - pending.row + steps - 1) / (steps ? steps : 1);
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
    const int64_t stop = pending.row + rows_of_step;
    pending.finish_to(stop < pending.end ? stop : pending.end);
  }
  pending.finish_to(pending.end);
  constexpr int64_t acc_stride = P * LANES * 4;
  _tile_stored(0, acc, acc_stride);
  if (P > 1) _tile_stored(1, acc + LANES, acc_stride);
  if (HALVES > 1) _tile_stored(2, acc + TILE_ROWS * P * LANES, acc_stride);
  if (HALVES > 1 && P > 1) _tile_stored(3, acc + TILE_ROWS * P * LANES + LANES, acc_stride);
}

template <int P>
void amx_panels(const Rows& rows, int64_t begin, int64_t end, const Weight& weight, int64_t panel_begin,
                int64_t panel_end, const Output& y) {
  // Two of each, one being filled while the other is finished.
  alignas(64) int32_t acc[2][MAX_ROWS * P * LANES];
  alignas(64) unsigned char room[2][P * sizeof(Affine)];
  Pending<P> pending{rows, weight, y};
  int filled = 0, described = 0;
  for (int64_t panel = panel_begin; panel < panel_end; panel += P) {
    Affine* affine = reinterpret_cast<Affine*>(room[described]);
    described ^= 1;
    for (int p = 0; p < P; ++p) new (&affine[p]) Affine(weight, panel + p);
    const uint8_t* packed = weight.packed + panel * LANES * rows.k_padded;
    for (int64_t row = begin; row < end;) {
      const int64_t count = end - row < MAX_ROWS ? end - row : MAX_ROWS;
      const Q* q = static_cast<const Q*>(rows.q) + row * rows.stride;
      int32_t* sums = acc[filled];
      filled ^= 1;
      if (count > TILE_ROWS) {
        row == begin ? amx_tile<2, P, true>(q, rows.stride, rows.k_padded, packed, sums, pending)
                     : amx_tile<2, P, false>(q, rows.stride, rows.k_padded, packed, sums, pending);
      } else {
        row == begin ? amx_tile<1, P, true>(q, rows.stride, rows.k_padded, packed, sums, pending)
                     : amx_tile<1, P, false>(q, rows.stride, rows.k_padded, packed, sums, pending);
      }
      pending.panel = panel;
      pending.first = pending.row = row;
      pending.end = row + count;
      pending.affine = affine;
      pending.acc = sums;
      row += count;
    }
  }
  pending.finish_to(pending.end);
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
  const int64_t paired = panel_begin + (panel_end - panel_begin) / 2 * 2;
  amx_panels<2>(rows, row_begin, row_end, weight, panel_begin, paired, y);
  amx_panels<1>(rows, row_begin, row_end, weight, paired, panel_end, y);
  _tile_release();
}

}  // namespace

extern const Variant amx = {
    "amx", has_amx_int8, sizeof(Q), 2,
    to_float, quantize, flag_outliers, residual, amx_multiply, quantize_digits, multiply_digits,
};

}  // namespace int8compile
