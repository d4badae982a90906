// x86-64 with AMX: tdpbsud multiplies a tile of 16 rows x 64 inputs by a tile of 64 inputs x 16 outputs, 16384
// multiply-adds per instruction. Few rows are multiplied by vpdpbusd, which is as fast: there the limit is reading the
// weights. The vector units add the second digits of outliers, which few rows have.
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

// The distance at which weights are prefetched from memory, before their first use.
constexpr int64_t TILE_PREFETCH_BYTES = 4096;

inline void prefetch_tile(const uint8_t* packed) {
  for (int line = 0; line < 16; ++line) __builtin_prefetch(packed + TILE_PREFETCH_BYTES + 64 * line);
}

constexpr int MAX_ROWS = 2 * TILE_ROWS;

// The work of the vector units: they finish the sums of the previous tile, in small portions, while the tile unit
// multiplies. Neither waits for the other.
template <int P>
class Pending {
 public:
  alignas(64) int32_t acc[MAX_ROWS * P * LANES];

  Pending(const Rows& rows, const Weight& weight, const Output& y) : rows_(rows), weight_(weight), y_(y) {}

  // Begins to finish a tile, whose sums are in `acc`.
  void start(int64_t row, int64_t count, int64_t panel) {
    first_ = row_ = row;
    end_ = row + count;
    panel_ = panel;
    new (affine_) Affine<P>(weight_, panel, y_);
  }

  int64_t remaining() const { return end_ - row_; }

  void finish_rows(int64_t count) {
    if (count > remaining()) count = remaining();
    if (count <= 0) return;
    const Affine<P>& affine = *reinterpret_cast<const Affine<P>*>(affine_);
    finish<P>(rows_, row_, count, weight_, panel_, affine, acc + (row_ - first_) * P * LANES);
    row_ += count;
  }

 private:
  const Rows& rows_;
  const Weight& weight_;
  const Output& y_;
  int64_t first_ = 0, row_ = 0, end_ = 0, panel_ = 0;
  alignas(64) unsigned char affine_[sizeof(Affine<P>)];
};

template <int HALVES, int P>
inline void zero_sums() {
  _tile_zero(0);
  if (P > 1) _tile_zero(1);
  if (HALVES > 1) _tile_zero(2);
  if (HALVES > 1 && P > 1) _tile_zero(3);
}

// Stores the sums into [32][P][LANES].
template <int HALVES, int P>
inline void store_tiles(int32_t* to) {
  constexpr int64_t STRIDE = P * LANES * 4;
  char* sums = reinterpret_cast<char*>(to);
  _tile_stored(0, sums, STRIDE);
  if (P > 1) _tile_stored(1, sums + LANES * 4, STRIDE);
  if (HALVES > 1) _tile_stored(2, sums + TILE_ROWS * STRIDE, STRIDE);
  if (HALVES > 1 && P > 1) _tile_stored(3, sums + TILE_ROWS * STRIDE + LANES * 4, STRIDE);
}

// Multiplications of the tile unit between two portions of work. More portions would cost more.
constexpr int64_t WORK_STEPS = 4;

// Multiplies up to 32 rows by P panels into pending.acc. Rows beyond the last are multiplied too, and ignored.
template <int HALVES, int P, bool ONCE>
inline void amx_tile(const Q* q, int64_t stride, int64_t k_padded, const uint8_t* packed, Pending<P>& pending) {
  const int64_t panel_bytes = LANES * k_padded;
  const int64_t steps = k_padded / K_STEP;
  // Rows to finish in WORK_STEPS steps.
  const int64_t portion = (pending.remaining() * WORK_STEPS + steps - 1) / (steps ? steps : 1);
  zero_sums<HALVES, P>();
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
    if (k / K_STEP % WORK_STEPS == WORK_STEPS - 1) pending.finish_rows(portion);
  }
  pending.finish_rows(pending.remaining());
  store_tiles<HALVES, P>(pending.acc);
}

constexpr int64_t SHORT_ROW = 768;

template <int P>
void amx_panels(const Rows& rows, int64_t begin, int64_t end, const Weight& weight, int64_t panel_begin,
                int64_t panel_end, const Output& y) {
  Pending<P> pending(rows, weight, y);
  // The operand of the inner loop streams through the first-level cache. Short rows stay in it while the weights stream
  // in order. Long rows do not fit, nor do their weights, and the weights come from further away.
  const bool rows_outside = rows.k_padded <= SHORT_ROW;
  const int64_t row_tiles = (end - begin + MAX_ROWS - 1) / MAX_ROWS, panel_tiles = (panel_end - panel_begin) / P;
  for (int64_t tile = 0; tile < row_tiles * panel_tiles; ++tile) {
    const int64_t row_tile = rows_outside ? tile / panel_tiles : tile % row_tiles;
    const int64_t panel = panel_begin + (rows_outside ? tile % panel_tiles : tile / row_tiles) * P;
    const int64_t row = begin + row_tile * MAX_ROWS;
    const int64_t count = end - row < MAX_ROWS ? end - row : MAX_ROWS;
    const uint8_t* packed = weight.packed + panel * LANES * rows.k_padded;
    const Q* q = static_cast<const Q*>(rows.q) + row * rows.stride;
    auto multiply_tile = count > TILE_ROWS ? (row_tile == 0 ? amx_tile<2, P, true> : amx_tile<2, P, false>)
                                           : (row_tile == 0 ? amx_tile<1, P, true> : amx_tile<1, P, false>);
    multiply_tile(q, rows.stride, rows.k_padded, packed, pending);
    pending.start(row, count, panel);
  }
  pending.finish_rows(pending.remaining());
}

// Up to this many rows vpdpbusd is no slower.
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

extern const Variant amx = variant_of("amx", has_amx, amx_multiply, 2);

}  // namespace int8compile
