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

// Rows that share a column, on average, from which on a product of matrices is faster than one of each outlier.
constexpr int64_t FEW_SHARE = 2;

// Inputs that a tile of bfloat16 has, and the rows of a tile of weights, each two inputs of every output.
constexpr int K_BFLOAT16 = 32, PAIRS = K_BFLOAT16 / 2;

// The outliers of up to MAX_ROWS rows, as matrices of bfloat16 over the columns that have any.
struct Block {
  // Where float32 holds the sums exactly (see Summation), a value, and so a rest, has 16 bits at most: two bfloat16.
  enum Layer { VALUE_HIGH, VALUE_LOW, REST_HIGH, REST_LOW, LAYERS };

  bool by_row;              // `finish` is to add them, and there are no layers
  int64_t count;            // of columns
  int64_t steps;            // of tiles of columns
  const int32_t* columns;   // [count]
  uint16_t* layer[LAYERS];  // [MAX_ROWS][stride()]; null where all are zero

  int64_t stride() const { return steps * K_BFLOAT16; }
  bool has_rest() const { return layer[REST_HIGH]; }
};

// Memory that is kept from call to call. Not linear.cpp's Buffer: templates of the standard library, compiled here with
// AMX's flags, could be merged with those of code that runs on any CPU.
struct Scratch {
  void* data = nullptr;
  size_t size = 0;

  template <typename T>
  T* get(int64_t count) {
    // Not null for nothing either: memset may not be given that.
    if (!data || size_t(count) * sizeof(T) > size) {
      std::free(data);
      size = count * sizeof(T) / 64 * 64 + 64;
      data = std::aligned_alloc(64, size);
      if (!data) std::abort();
    }
    return static_cast<T*>(data);
  }
  ~Scratch() { std::free(data); }
};

thread_local Scratch block_scratch, column_scratch, place_scratch, layer_scratch, pair_scratch;

// What is in one layer of a value or a rest, and in the next: its upper and its lower half.
inline uint16_t upper_half(float x) { return uint16_t(float_bits(x) >> 16); }
inline uint16_t lower_half(float x) { return upper_half(x - from_bits(float_bits(x) & 0xffff0000u)); }

// Fills in a block. `place` is [k_padded] of -1 and left so; `columns` and `layers` are room for what is needed.
void fill(Block& block, const Rows& rows, int64_t begin, int64_t end, int32_t* place, int32_t* columns,
          uint16_t* layers) {
  block = {};
  block.columns = columns;
  int64_t total = 0;
  bool has[Block::LAYERS] = {};
  for (int64_t row = begin; row < end && !block.by_row; ++row) {
    const Outliers& outliers = rows.outliers[row];
    if (outliers.count && outliers.sum == Summation::in_double) block.by_row = true;
    total += outliers.count;
    for (int64_t i = 0; i < outliers.count; ++i) {
      int32_t& at = place[outliers.k[i]];
      if (at < 0) columns[at = int32_t(block.count++)] = outliers.k[i];
      has[Block::VALUE_HIGH] = true;
      has[Block::VALUE_LOW] |= lower_half(outliers.value[i]) != 0;
      if (outliers.sum != Summation::in_two) continue;
      has[Block::REST_HIGH] = true;
      has[Block::REST_LOW] |= lower_half(outliers.rest[i]) != 0;
    }
  }
  block.by_row |= total < block.count * FEW_SHARE;
  block.steps = block.by_row ? 0 : (block.count + K_BFLOAT16 - 1) / K_BFLOAT16;
  const int64_t stride = block.stride();
  for (int layer = 0; layer < Block::LAYERS && block.steps; ++layer) {
    if (!has[layer]) continue;
    const bool is_rest = layer >= Block::REST_HIGH, is_low = layer % 2;
    block.layer[layer] = layers;
    std::memset(layers, 0, MAX_ROWS * stride * sizeof(uint16_t));
    for (int64_t row = begin; row < end; ++row) {
      const Outliers& outliers = rows.outliers[row];
      if (is_rest && outliers.sum != Summation::in_two) continue;
      const float* values = is_rest ? outliers.rest : outliers.value;
      uint16_t* to = layers + (row - begin) * stride;
      for (int64_t i = 0; i < outliers.count; ++i) {
        to[place[outliers.k[i]]] = is_low ? lower_half(values[i]) : upper_half(values[i]);
      }
    }
    layers += MAX_ROWS * stride;
  }
  for (int64_t i = 0; i < block.count; ++i) place[columns[i]] = -1;
}

// The blocks of the rows given.
const Block* outlier_blocks(const Rows& rows, int64_t begin, int64_t end) {
  const int64_t count = (end - begin + MAX_ROWS - 1) / MAX_ROWS;
  int64_t columns_room = 0;
  for (int64_t row = begin; row < end; row += MAX_ROWS) {
    int64_t total = 0;
    for (int64_t i = row; i < end && i < row + MAX_ROWS; ++i) total += rows.outliers[i].count;
    columns_room += (total < rows.k_padded ? total : rows.k_padded) + K_BFLOAT16;
  }
  Block* blocks = block_scratch.get<Block>(count);
  int32_t* columns = column_scratch.get<int32_t>(columns_room);
  int32_t* place = place_scratch.get<int32_t>(rows.k_padded);
  uint16_t* layers = layer_scratch.get<uint16_t>(Block::LAYERS * MAX_ROWS * columns_room);
  std::memset(place, 0xff, rows.k_padded * sizeof(int32_t));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = begin + i * MAX_ROWS;
    fill(blocks[i], rows, row, end - row < MAX_ROWS ? end : row + MAX_ROWS, place, columns, layers);
    columns += blocks[i].count;
    for (const uint16_t* layer : blocks[i].layer) layers += layer ? MAX_ROWS * blocks[i].stride() : 0;
  }
  return blocks;
}

// The work of the vector units, done in small portions while the tile unit multiplies: neither waits for the other.
// It is to finish the sums of the tile before, and to make bfloat16 of the weights that outliers are multiplied by.
template <int P>
class Pending {
 public:
  alignas(64) int32_t acc[MAX_ROWS * P * LANES];
  // What outliers add: the products of values, and those of rests.
  alignas(64) float parts[2][MAX_ROWS * P * LANES];

  Pending(const Rows& rows, const Weight& weight, const Output& y) : rows_(rows), weight_(weight), y_(y) {}

  // The weights of a block's columns, as tiles: [P][steps][PAIRS][LANES][2].
  const char* weights() const { return reinterpret_cast<const char*>(pairs_); }

  // Next are the weights of a block for P panels.
  void prepare(const Block& block, int64_t panel) {
    const int64_t pairs = block.steps * PAIRS;
    pairs_ = pair_scratch.get<uint32_t>(P * pairs * LANES);
    pair_ = 0;
    pair_count_ = pairs ? (block.count + 1) / 2 : 0;
    pair_stride_ = pairs * LANES;
    next_ = &block;
    pair_panel_ = panel;
    for (int p = 0; p < P; ++p) {
      std::memset(pairs_ + p * pair_stride_ + pair_count_ * LANES, 0, (pairs - pair_count_) * LANES * 4);
    }
  }

  // `acc` and `parts` are those of a tile, to be finished from now on.
  void start(int64_t row, int64_t count, int64_t panel, const Block& block) {
    first_ = row_ = row;
    end_ = row + count;
    panel_ = panel;
    block_ = &block;
    new (affine_) Affine<P>(weight_, panel, y_);
  }

  // All that is to be done, in portions of about the same size.
  int64_t portions() const { return pair_count_ - pair_ + (end_ - row_) * ROW_PORTIONS; }

  void finish_all() {
    if (row_ < end_) finish_rows(end_ - row_);
  }

  void work(int64_t portions) {
    if (pair_ < pair_count_) {
      const int64_t count = pair_count_ - pair_ < portions ? pair_count_ - pair_ : portions;
      convert_pairs(count);
      portions -= count;
    }
    if (portions <= 0 || row_ == end_) return;
    const int64_t wanted = (portions + ROW_PORTIONS - 1) / ROW_PORTIONS;
    finish_rows(wanted < end_ - row_ ? wanted : end_ - row_);
  }

 private:
  static constexpr int64_t ROW_PORTIONS = 2;

  // Column k of a panel as the bits of float32, whose lower half is zero.
  static Words column_as_float(const uint8_t* panel, int32_t k) {
    return (Words)__builtin_convertvector(column<Ints>(panel, k, 0) - int32_t(OFFSET), Floats);
  }

  void convert_pairs(int64_t count) {
    const int64_t panel_bytes = LANES * rows_.k_padded;
    const uint8_t* packed = weight_.packed + pair_panel_ * panel_bytes;
    for (const int64_t last = pair_ + count; pair_ < last; ++pair_) {
      const int32_t even = next_->columns[2 * pair_];
      // One column too many: what it is multiplied with is zero.
      const int32_t odd = 2 * pair_ + 1 < next_->count ? next_->columns[2 * pair_ + 1] : even;
      for (int p = 0; p < P; ++p) {
        const uint8_t* panel = packed + p * panel_bytes;
        const Words pair = column_as_float(panel, even) >> 16 | column_as_float(panel, odd);
        save(pairs_ + p * pair_stride_ + pair_ * LANES, pair);
      }
    }
  }

  void finish_rows(int64_t count) {
    const Affine<P>& affine = *reinterpret_cast<const Affine<P>*>(affine_);
    const int64_t first = (row_ - first_) * P * LANES;
    if (block_->by_row) {
      finish<P>(rows_, row_, count, weight_, panel_, affine, acc + first);
    } else {
      if (block_->has_rest()) {
        for (int64_t i = first; i < first + count * P * LANES; i += VL) {
          save(parts[0] + i, load<Floats>(parts[0] + i) + load<Floats>(parts[1] + i));
        }
      }
      finish_with<P>(block_->steps ? parts[0] + first : nullptr, rows_, row_, count, affine, acc + first);
    }
    row_ += count;
  }

  const Rows& rows_;
  const Weight& weight_;
  const Output& y_;
  int64_t first_ = 0, row_ = 0, end_ = 0, panel_ = 0;
  const Block* block_ = nullptr;
  alignas(64) unsigned char affine_[sizeof(Affine<P>)];
  int64_t pair_ = 0, pair_count_ = 0, pair_stride_ = 0, pair_panel_ = 0;
  const Block* next_ = nullptr;
  uint32_t* pairs_ = nullptr;
};

template <int HALVES, int P>
inline void zero_sums() {
  _tile_zero(0);
  if (P > 1) _tile_zero(1);
  if (HALVES > 1) _tile_zero(2);
  if (HALVES > 1 && P > 1) _tile_zero(3);
}

// Into [32][P][LANES] of int32 or float32.
template <int HALVES, int P>
inline void store_sums(void* to) {
  constexpr int64_t STRIDE = P * LANES * 4;
  char* sums = static_cast<char*>(to);
  _tile_stored(0, sums, STRIDE);
  if (P > 1) _tile_stored(1, sums + LANES * 4, STRIDE);
  if (HALVES > 1) _tile_stored(2, sums + TILE_ROWS * STRIDE, STRIDE);
  if (HALVES > 1 && P > 1) _tile_stored(3, sums + TILE_ROWS * STRIDE + LANES * 4, STRIDE);
}

// Multiplications of the tile unit between two portions of work: each portion has a cost of its own.
constexpr int64_t WORK_STEPS = 4;

// Up to 32 rows and P panels into pending.acc. Rows beyond the last are multiplied too, and ignored.
template <int HALVES, int P, bool ONCE>
inline void amx_tile(const Q* q, int64_t stride, int64_t k_padded, const uint8_t* packed, Pending<P>& pending) {
  const int64_t panel_bytes = LANES * k_padded;
  const int64_t steps = k_padded / K_STEP;
  const int64_t portions = steps ? (pending.portions() + steps - 1) / steps : 0;
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
    if (k / K_STEP % WORK_STEPS == WORK_STEPS - 1) pending.work(WORK_STEPS * portions);
  }
  pending.work(pending.portions());
  store_sums<HALVES, P>(pending.acc);
}

// The products of two layers into `parts`: exact, as are their sums, in any order.
template <int HALVES, int P>
inline void outlier_tile(const Block& block, int layer, const char* weights, float* parts) {
  const int64_t stride = block.stride() * sizeof(uint16_t);
  constexpr int64_t STEP = K_BFLOAT16 * sizeof(uint16_t), WEIGHTS = PAIRS * LANES * 4;
  zero_sums<HALVES, P>();
  for (int half = 0; half < 2; ++half) {
    const char* x = reinterpret_cast<const char*>(block.layer[layer + half]);
    for (int64_t step = 0; x && step < block.steps; ++step) {
      _tile_loadd(6, weights + step * WEIGHTS, LANES * 4);
      _tile_loadd(4, x + step * STEP, stride);
      _tile_dpbf16ps(0, 4, 6);
      if (P > 1) {
        _tile_loadd(7, weights + (block.steps + step) * WEIGHTS, LANES * 4);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (HALVES > 1) {
        _tile_loadd(5, x + TILE_ROWS * stride + step * STEP, stride);
        _tile_dpbf16ps(2, 5, 6);
        if (P > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  store_sums<HALVES, P>(parts);
}

template <int HALVES, int P>
inline void tile_with_outliers(const Rows& rows, int64_t row, const uint8_t* packed, const Block& block, bool once,
                               Pending<P>& pending) {
  const Q* q = static_cast<const Q*>(rows.q) + row * rows.stride;
  once ? amx_tile<HALVES, P, true>(q, rows.stride, rows.k_padded, packed, pending)
       : amx_tile<HALVES, P, false>(q, rows.stride, rows.k_padded, packed, pending);
  if (!block.steps) return;
  outlier_tile<HALVES, P>(block, Block::VALUE_HIGH, pending.weights(), pending.parts[0]);
  if (block.has_rest()) outlier_tile<HALVES, P>(block, Block::REST_HIGH, pending.weights(), pending.parts[1]);
}

constexpr int64_t SHORT_ROW = 768;

template <int P>
void amx_panels(const Rows& rows, const Block* blocks, int64_t begin, int64_t end, const Weight& weight,
                int64_t panel_begin, int64_t panel_end, const Output& y) {
  Pending<P> pending(rows, weight, y);
  // The operand of the inner loop streams through the first-level cache. Short rows stay there while the weights, which
  // lie in order, stream; of long ones neither fits, and weights come from further away.
  const bool rows_outside = rows.k_padded <= SHORT_ROW;
  const int64_t row_tiles = (end - begin + MAX_ROWS - 1) / MAX_ROWS, panel_tiles = (panel_end - panel_begin) / P;
  for (int64_t tile = 0; tile < row_tiles * panel_tiles; ++tile) {
    const int64_t row_tile = rows_outside ? tile / panel_tiles : tile % row_tiles;
    const int64_t panel = panel_begin + (rows_outside ? tile % panel_tiles : tile / row_tiles) * P;
    const int64_t row = begin + row_tile * MAX_ROWS;
    const int64_t count = end - row < MAX_ROWS ? end - row : MAX_ROWS;
    const uint8_t* packed = weight.packed + panel * LANES * rows.k_padded;
    const Block& block = blocks[row_tile];
    pending.prepare(block, panel);
    count > TILE_ROWS ? tile_with_outliers<2, P>(rows, row, packed, block, row_tile == 0, pending)
                      : tile_with_outliers<1, P>(rows, row, packed, block, row_tile == 0, pending);
    pending.start(row, count, panel, block);
  }
  pending.finish_all();
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
  const Block* blocks = outlier_blocks(rows, row_begin, row_end);
  amx_panels<2>(rows, blocks, row_begin, row_end, weight, panel_begin, paired, y);
  amx_panels<1>(rows, blocks, row_begin, row_end, weight, paired, panel_end, y);
  _tile_release();
}

}  // namespace

extern const Variant amx = {
    "amx", has_amx, sizeof(Q), 2,
    to_float, quantize, flag_outliers, residual, amx_multiply, quantize_digits, multiply_digits,
};

}  // namespace int8compile
