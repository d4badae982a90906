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

// How far ahead of their first use, for which they come from memory, weights are asked for.
constexpr int64_t TILE_PREFETCH_BYTES = 4096;

inline void prefetch_tile(const uint8_t* packed) {
  for (int line = 0; line < 16; ++line) __builtin_prefetch(packed + TILE_PREFETCH_BYTES + 64 * line);
}

constexpr int MAX_ROWS = 2 * TILE_ROWS;

// One outlier of a tile's rows, as what it is multiplied with wants it.
struct Entry {
  int32_t at;     // of its column's group of weights in a panel
  int32_t shift;  // of its column's byte in the group's words
  int32_t row;    // of the tile
  float value, rest;
};

// The outliers of up to MAX_ROWS rows by ascending column, so that rows that share a column share its weights.
struct Block {
  const Entry* entries;
  int64_t count;
  bool split;      // whether any has a rest
  bool in_double;  // whether any row's are to be summed in float64: then the entries are not used
};

// Memory that is kept from call to call. Not linear.cpp's Buffer: templates of the standard library, compiled here with
// AMX's flags, could be merged with those of code that runs on any CPU.
struct Scratch {
  void* data = nullptr;
  size_t size = 0;

  template <typename T>
  T* get(int64_t count) {
    if (size_t(count) * sizeof(T) > size) {
      std::free(data);
      size = count * sizeof(T);
      data = std::malloc(size);
      if (!data) std::abort();
    }
    return static_cast<T*>(data);
  }
  ~Scratch() { std::free(data); }
};

thread_local Scratch entry_scratch, block_scratch, place_scratch;

// Sorts the outliers of each tile of rows. Null where they are so many that `finish` does better without.
const Block* sorted_outliers(const Rows& rows, int64_t begin, int64_t end) {
  int64_t total = 0;
  for (int64_t row = begin; row < end; ++row) total += rows.outliers[row].count;
  if (total > (end - begin) * rows.k_padded / 16) return nullptr;
  Block* blocks = block_scratch.get<Block>((end - begin + MAX_ROWS - 1) / MAX_ROWS);
  Entry* entries = entry_scratch.get<Entry>(total);
  int32_t* place = place_scratch.get<int32_t>(rows.k_padded + 1);
  Block* block = blocks;
  for (int64_t first = begin; first < end; first += MAX_ROWS, ++block) {
    const int64_t stop = end - first < MAX_ROWS ? end : first + MAX_ROWS;
    *block = {entries, 0, false, false};
    std::memset(place, 0, (rows.k_padded + 1) * sizeof(int32_t));
    for (int64_t row = first; row < stop; ++row) {
      const Outliers& outliers = rows.outliers[row];
      block->in_double |= outliers.count && outliers.sum == Summation::in_double;
      for (int64_t i = 0; i < outliers.count; ++i) ++place[outliers.k[i] + 1];
      block->count += outliers.count;
      block->split |= outliers.count && outliers.sum == Summation::in_two;
    }
    if (!block->count || block->in_double) continue;
    for (int64_t k = 0; k < rows.k_padded; ++k) place[k + 1] += place[k];
    for (int64_t row = first; row < stop; ++row) {
      const Outliers& outliers = rows.outliers[row];
      for (int64_t i = 0; i < outliers.count; ++i) {
        const int32_t k = outliers.k[i];
        const float rest = outliers.sum == Summation::in_two ? outliers.rest[i] : 0;
        const int32_t at = k / GROUP * GROUP * LANES, shift = 8 * (k % GROUP);
        entries[place[k]++] = {at, shift, int32_t(row - first), outliers.value[i], rest};
      }
    }
    entries += block->count;
  }
  return blocks;
}

// Sums that are to be finished. That is work for the vector units, done in small portions while the tile unit
// multiplies the next tile: neither waits for the other.
template <int P>
class Pending {
 public:
  Pending(const Rows& rows, const Weight& weight) : rows_(rows), weight_(weight) {}

  void start(int64_t row, int64_t count, int64_t panel, const Affine<P>* affine, const int32_t* acc,
             const Block* block) {
    first_ = row_ = row;
    end_ = row + count;
    panel_ = panel;
    affine_ = affine;
    acc_ = acc;
    block_ = block;
    entry_ = 0;
    if (!by_block()) return;
    for (int64_t m = 0; m < count; ++m) {
      const Outliers& outliers = rows_.outliers[row + m];
      // Rows without outliers have no offsets.
      const bool any = outliers.count > 0;
      for (int p = 0; p < P; ++p) {
        save(sum_ + (m * P + p) * LANES, Floats{} + (any ? outliers.value_offset : 0));
        if (block->split) save(rest_ + (m * P + p) * LANES, Floats{} + (any ? outliers.rest_offset : 0));
      }
    }
  }

  // All that is to be done, in portions of about the same size.
  int64_t portions() const { return (by_block() ? block_->count : 0) + (end_ - row_) * ROW_PORTIONS; }

  void work(int64_t portions) {
    if (by_block() && entry_ < block_->count) {
      const int64_t count = block_->count - entry_ < portions ? block_->count - entry_ : portions;
      block_->split ? add_entries<true>(count) : add_entries<false>(count);
      portions -= count;
    }
    if (portions <= 0 || row_ == end_) return;
    const int64_t wanted = (portions + ROW_PORTIONS - 1) / ROW_PORTIONS;
    finish_rows(wanted < end_ - row_ ? wanted : end_ - row_);
  }

 private:
  static constexpr int64_t ROW_PORTIONS = 4;

  bool by_block() const { return block_ && block_->count && !block_->in_double; }

  template <bool SPLIT>
  void add_entries(int64_t count) {
    const int64_t panel_bytes = LANES * rows_.k_padded;
    const uint8_t* packed = weight_.packed + panel_ * panel_bytes;
    const Entry* entry = block_->entries + entry_;
    entry_ += count;
    int32_t at = -1, shift = -1;
    __m512 weights[P] = {};
    for (const Entry* last = entry + count; entry < last; ++entry) {
      if (entry->at != at || entry->shift != shift) {
        at = entry->at;
        shift = entry->shift;
        for (int p = 0; p < P; ++p) {
          const __m512i words = _mm512_loadu_si512(packed + p * panel_bytes + at);
          const __m512i bytes = _mm512_srlv_epi32(words, _mm512_set1_epi32(shift));
          weights[p] = _mm512_cvtepi32_ps(_mm512_and_si512(bytes, _mm512_set1_epi32(0xff)));
        }
      }
      for (int p = 0; p < P; ++p) {
        // Exact, in any order: see Summation.
        float* sum = sum_ + (entry->row * P + p) * LANES;
        _mm512_store_ps(sum, _mm512_fmadd_ps(_mm512_set1_ps(entry->value), weights[p], _mm512_load_ps(sum)));
        if (!SPLIT) continue;
        float* rest = rest_ + (entry->row * P + p) * LANES;
        _mm512_store_ps(rest, _mm512_fmadd_ps(_mm512_set1_ps(entry->rest), weights[p], _mm512_load_ps(rest)));
      }
    }
  }

  void finish_rows(int64_t count) {
    const int64_t first = (row_ - first_) * P * LANES;
    if (!block_ || block_->in_double) {
      finish<P>(rows_, row_, count, weight_, panel_, *affine_, acc_ + first);
    } else {
      if (block_->count && block_->split) {
        for (int64_t i = first; i < first + count * P * LANES; i += VL) {
          save(sum_ + i, load<Floats>(sum_ + i) + load<Floats>(rest_ + i));
        }
      }
      finish_with<P>(block_->count ? sum_ + first : nullptr, rows_, row_, count, *affine_, acc_ + first);
    }
    row_ += count;
  }

  const Rows& rows_;
  const Weight& weight_;
  int64_t first_ = 0, row_ = 0, end_ = 0, panel_ = 0, entry_ = 0;
  const Affine<P>* affine_ = nullptr;
  const int32_t* acc_ = nullptr;
  const Block* block_ = nullptr;
  alignas(64) float sum_[MAX_ROWS * P * LANES];
  alignas(64) float rest_[MAX_ROWS * P * LANES];
};

// Up to 32 rows and P panels into acc [32][P][LANES]. Rows beyond the last are multiplied too, and ignored.
template <int HALVES, int P, bool ONCE>
inline void amx_tile(const Q* q, int64_t stride, int64_t k_padded, const uint8_t* packed, int32_t* acc,
                     Pending<P>& pending) {
  const int64_t panel_bytes = LANES * k_padded;
  const int64_t steps = k_padded / K_STEP;
  const int64_t portions = steps ? (pending.portions() + steps - 1) / steps : 0;
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
    pending.work(portions);
  }
  pending.work(pending.portions());
  constexpr int64_t acc_stride = P * LANES * 4;
  _tile_stored(0, acc, acc_stride);
  if (P > 1) _tile_stored(1, acc + LANES, acc_stride);
  if (HALVES > 1) _tile_stored(2, acc + TILE_ROWS * P * LANES, acc_stride);
  if (HALVES > 1 && P > 1) _tile_stored(3, acc + TILE_ROWS * P * LANES + LANES, acc_stride);
}

constexpr int64_t SHORT_ROW = 768;

template <int P>
void amx_panels(const Rows& rows, const Block* blocks, int64_t begin, int64_t end, const Weight& weight,
                int64_t panel_begin, int64_t panel_end, const Output& y) {
  // Two of each, one being filled while the other is finished.
  alignas(64) int32_t acc[2][MAX_ROWS * P * LANES];
  alignas(64) unsigned char room[2][sizeof(Affine<P>)];
  Pending<P> pending(rows, weight);
  // The operand of the inner loop streams through the first-level cache. Short rows stay there while the weights, which
  // lie in order, stream; of long ones neither fits, and weights come from further away.
  const bool rows_outside = rows.k_padded <= SHORT_ROW;
  const int64_t row_tiles = (end - begin + MAX_ROWS - 1) / MAX_ROWS, panel_tiles = (panel_end - panel_begin) / P;
  for (int64_t tile = 0; tile < row_tiles * panel_tiles; ++tile) {
    const int64_t row_tile = rows_outside ? tile / panel_tiles : tile % row_tiles;
    const int64_t panel = panel_begin + (rows_outside ? tile % panel_tiles : tile / row_tiles) * P;
    const int64_t row = begin + row_tile * MAX_ROWS;
    const int64_t count = end - row < MAX_ROWS ? end - row : MAX_ROWS;
    const Q* q = static_cast<const Q*>(rows.q) + row * rows.stride;
    const uint8_t* packed = weight.packed + panel * LANES * rows.k_padded;
    const Affine<P>* affine = new (room[tile % 2]) Affine<P>(weight, panel, y);
    int32_t* sums = acc[tile % 2];
    if (count > TILE_ROWS) {
      row_tile == 0 ? amx_tile<2, P, true>(q, rows.stride, rows.k_padded, packed, sums, pending)
                    : amx_tile<2, P, false>(q, rows.stride, rows.k_padded, packed, sums, pending);
    } else {
      row_tile == 0 ? amx_tile<1, P, true>(q, rows.stride, rows.k_padded, packed, sums, pending)
                    : amx_tile<1, P, false>(q, rows.stride, rows.k_padded, packed, sums, pending);
    }
    pending.start(row, count, panel, affine, sums, blocks ? blocks + row_tile : nullptr);
  }
  pending.work(pending.portions());
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
  const Block* blocks = sorted_outliers(rows, row_begin, row_end);
  amx_panels<2>(rows, blocks, row_begin, row_end, weight, panel_begin, paired, y);
  amx_panels<1>(rows, blocks, row_begin, row_end, weight, paired, panel_end, y);
  _tile_release();
}

}  // namespace

extern const Variant amx = {
    "amx", has_amx_int8, sizeof(Q), 2,
    to_float, quantize, flag_outliers, residual, amx_multiply, quantize_digits, multiply_digits,
};

}  // namespace int8compile
