#include "linear.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

namespace int8compile {
namespace {

// The buffer of quantized rows stays this small for any M.
constexpr int64_t CHUNK_BYTES = 8 << 20;
// Rows that are multiplied by one panel after another stay in the second-level cache.
constexpr int64_t ROW_BLOCK_BYTES = 5 << 18;
// Rows whose outliers share one list.
constexpr int64_t OUTLIER_ROWS = 16;
// The least work for which a thread is woken up, in bytes of weights read or of activations quantized.
constexpr int64_t GRAIN_BYTES = 48 << 10;

// Memory that is kept from call to call and never shrinks, aligned to a cache line.
template <typename T>
class Buffer {
 public:
  T* get(int64_t count) {
    const size_t bytes = round_up(count * sizeof(T) + 64, 64);
    if (bytes > size_) {
      data_.reset(new char[bytes + 64]);
      size_ = bytes;
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(data_.get());
    return reinterpret_cast<T*>((address + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<char[]> data_;
  size_t size_ = 0;
};

// One for each thread that calls the operator, so that calls from several threads are independent.
struct Workspace {
  Buffer<char> q;
  Buffer<float> scale;
  Buffer<int32_t> sum;
  Buffer<Outliers> outliers;
  std::vector<std::vector<Outlier>> lists;
};

// One for each thread that quantizes.
struct RowScratch {
  Buffer<int32_t> integers;
  Buffer<Outlier> outliers;
  Buffer<uint8_t> packed;
};

thread_local Workspace workspace;
thread_local RowScratch row_scratch;

// An odd number of K_STEPs. Rows that are a power of two apart would share a few sets of the first-level cache.
int64_t row_stride(int64_t k_padded) { return (k_padded / K_STEP | 1) * K_STEP; }

Row row_of(const Activations& x, int64_t row, const float* d) {
  return {from_row(x, row, 1).data, x.dtype, x.k, padded(x.k), d, d ? rotation_size(x.k) : 1};
}

// Returns room for a row's integers, see Variant::quantize.
int32_t* room_for(const Row& row) {
  return row_scratch.integers.get(row.rotation * round_up(row.k / row.rotation, LANES));
}

template <typename F>
void in_parallel(ParallelFor parallel_for, int64_t count, int64_t grain, const F& body) {
  if (count <= grain) {
    if (count > 0) body(int64_t(0), count);
    return;
  }
  parallel_for(
      0, count, grain, [](int64_t begin, int64_t end, void* f) { (*static_cast<const F*>(f))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// The least number of rows for which a thread is woken up.
int64_t rows_grain(int64_t k) { return GRAIN_BYTES / std::max<int64_t>(k * 4, 1) + 1; }

// Quantizes m rows from `first` on into the workspace of the calling thread.
Rows quantize_rows(const Variant& variant, const Activations& x, int64_t first, int64_t m, const float* d,
                   double threshold, ParallelFor parallel_for) {
  Workspace& w = workspace;
  const int64_t k_padded = padded(x.k), stride = row_stride(k_padded);
  char* q = w.q.get((m + ROW_PADDING) * stride * variant.q_bytes);
  float* scale = w.scale.get(m);
  int32_t* sum = w.sum.get(m);
  Outliers* outliers = w.outliers.get(m);
  const float mean_factor = threshold > 0 ? float(threshold / (127.0 * std::max<int64_t>(x.k, 1))) : 0x1p100f;
  const int64_t blocks = round_up(m, OUTLIER_ROWS) / OUTLIER_ROWS;
  if (int64_t(w.lists.size()) < blocks) w.lists.resize(blocks);
  in_parallel(parallel_for, blocks, rows_grain(OUTLIER_ROWS * x.k), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      std::vector<Outlier>& list = w.lists[block];
      list.clear();
      const int64_t row_begin = block * OUTLIER_ROWS, row_end = std::min(m, row_begin + OUTLIER_ROWS);
      for (int64_t i = row_begin; i < row_end; ++i) {
        const Row row = row_of(x, first + i, d);
        Outlier* found = row_scratch.outliers.get(k_padded / GROUP);
        void* to = q + i * stride * variant.q_bytes;
        const RowStatistics statistics = variant.quantize(row, mean_factor, room_for(row), to, found);
        scale[i] = statistics.scale;
        sum[i] = statistics.sum;
        outliers[i].count = statistics.outliers;
        if (statistics.outliers) list.insert(list.end(), found, found + statistics.outliers);
      }
      const Outlier* at = list.data();  // The list no longer grows, so its memory stays.
      for (int64_t i = row_begin; i < row_end; ++i) {
        outliers[i].list = at;
        at += outliers[i].count;
      }
    }
  });
  return {q, scale, sum, outliers, k_padded, stride};
}

// Calls body(weight, row_begin, row_end, panel_begin, panel_end) in parallel, for all weights, rows and panels.
template <typename F>
void over_tiles(const Weight* weights, int64_t count, int64_t m, int64_t row_bytes, int64_t k_padded,
                int64_t panel_tile, ParallelFor parallel_for, const F& body) {
  // As few blocks as possible, of equal size.
  const int64_t most = std::max<int64_t>(ROW_PADDING, ROW_BLOCK_BYTES / std::max<int64_t>(row_bytes, 1));
  const int64_t row_blocks = (m + most - 1) / most;
  const int64_t row_block = round_up((m + row_blocks - 1) / row_blocks, ROW_PADDING);
  auto tiles_of = [&](int64_t i) { return (panels_for(weights[i].n) + panel_tile - 1) / panel_tile; };
  int64_t tiles = 0;
  for (int64_t i = 0; i < count; ++i) tiles += tiles_of(i);
  const int64_t tile_bytes = panel_tile * LANES * k_padded * (1 + std::min(m, row_block) / 8);
  in_parallel(parallel_for, row_blocks * tiles, GRAIN_BYTES / std::max<int64_t>(tile_bytes, 1) + 1,
              [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t rows_at = at / tiles * row_block;
      int64_t weight = 0, tile = at % tiles;
      for (; tile >= tiles_of(weight); ++weight) tile -= tiles_of(weight);
      const int64_t length = std::min(tiles_of(weight) - tile, end - at);
      body(weight, rows_at, std::min(m, rows_at + row_block), tile * panel_tile,
           std::min(panels_for(weights[weight].n), (tile + length) * panel_tile));
      at += length;
    }
  });
}

// GROUP inputs of four outputs. Every CPU has arithmetic for such vectors.
typedef uint32_t Groups __attribute__((vector_size(16)));
constexpr Groups SIGNS = {0x80808080u, 0x80808080u, 0x80808080u, 0x80808080u};

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Groups{__VA_ARGS__})
#endif

// The distance of prefetches. A panel reads LANES rows in turns, more streams than CPUs prefetch by themselves.
constexpr int64_t ROW_PREFETCH_BYTES = 512;

// Transposes four rows by four groups.
inline void pack_block(const int8_t* from, int64_t k, uint8_t* to) {
  Groups row[4];
  for (int r = 0; r < 4; ++r) {
    std::memcpy(&row[r], from + r * k, sizeof(Groups));
    row[r] ^= SIGNS;
  }
  const Groups low01 = SHUFFLE(row[0], row[1], 0, 4, 1, 5), low23 = SHUFFLE(row[2], row[3], 0, 4, 1, 5);
  const Groups high01 = SHUFFLE(row[0], row[1], 2, 6, 3, 7), high23 = SHUFFLE(row[2], row[3], 2, 6, 3, 7);
  const Groups group[4] = {SHUFFLE(low01, low23, 0, 1, 4, 5), SHUFFLE(low01, low23, 2, 3, 6, 7),
                           SHUFFLE(high01, high23, 0, 1, 4, 5), SHUFFLE(high01, high23, 2, 3, 6, 7)};
  for (int g = 0; g < 4; ++g) std::memcpy(to + g * LANES * GROUP, &group[g], sizeof(Groups));
}

// Packs a whole panel, LANES rows of `k` inputs.
void pack_whole_panel(const int8_t* from, int64_t k, uint8_t* to) {
  const int64_t whole = k / K_STEP * K_STEP;
  for (int64_t i = 0; i < whole; i += K_STEP) {
    for (int64_t lane = 0; lane < LANES; lane += 4) {
      const int8_t* rows = from + lane * k + i;
      for (int r = 0; r < 4; ++r) __builtin_prefetch(rows + r * k + ROW_PREFETCH_BYTES);
      for (int64_t j = 0; j < K_STEP; j += 4 * GROUP) pack_block(rows + j, k, to + (i + j) * LANES + lane * GROUP);
    }
  }
  if (whole == k) return;
  std::memset(to + whole * LANES, 0x80, K_STEP * LANES);
  for (int64_t lane = 0; lane < LANES; ++lane) {
    for (int64_t i = whole; i < k; ++i) {
      to[i / GROUP * (LANES * GROUP) + lane * GROUP + i % GROUP] = uint8_t(from[lane * k + i]) ^ 0x80;
    }
  }
}

// Packs the panels [begin, end) of a weight [n][k].
void pack_panels(const int8_t* qweight, int64_t n, int64_t k, int64_t begin, int64_t end, uint8_t* packed) {
  const int64_t panel_bytes = LANES * padded(k);
  std::vector<int8_t> last;
  for (int64_t panel = begin; panel < end; ++panel, packed += panel_bytes) {
    const int8_t* rows = qweight + panel * LANES * k;
    if (const int64_t count = n - panel * LANES; count < LANES) {
      last.assign(LANES * k, 0);
      std::copy(rows, rows + count * k, last.begin());
      rows = last.data();
    }
    pack_whole_panel(rows, k, packed);
  }
}

// A thread packs this much before it multiplies by it. It stays in the second-level cache, with the activations.
constexpr int64_t PACKED_BYTES = 1 << 18;

// Calls body(weight, panel_begin, panel_end, y) for the panels of a weight: once for a packed weight, else for as many
// panels at a time as fit into the cache, which are packed here.
template <typename F>
void over_packed(const Weight& weight, int64_t k, int64_t panel_tile, int64_t panel_begin, int64_t panel_end, Output y,
                 const F& body) {
  if (!weight.rows) return body(weight, panel_begin, panel_end, y);
  const int64_t panel_bytes = LANES * padded(k);
  const int64_t step = std::max<int64_t>(PACKED_BYTES / std::max<int64_t>(panel_bytes * panel_tile, 1), 1) * panel_tile;
  for (int64_t panel = panel_begin; panel < panel_end; panel += step) {
    const int64_t count = std::min(step, panel_end - panel), first = panel * LANES;
    uint8_t* packed = row_scratch.packed.get(count * panel_bytes);
    pack_panels(weight.rows, weight.n, k, panel, panel + count, packed);
    const Weight part = {packed, weight.scale + first, weight.bias ? weight.bias + first : nullptr, weight.n - first};
    Output columns = y;
    columns.data = static_cast<char*>(y.data) + first * size_of(y.dtype);
    body(part, int64_t(0), count, columns);
  }
}

// Multiplies m rows of x, from `first` on, by each of `count` weights.
template <typename R>
void multiply_all(const Variant& variant, const R& rows,
                  void (*multiply)(const R&, int64_t, int64_t, const Weight&, int64_t, int64_t, const Output&),
                  const Weight* weights, const Output* y, int64_t count, int64_t first, int64_t m, int64_t row_bytes,
                  int64_t k, ParallelFor parallel_for) {
  over_tiles(weights, count, m, row_bytes, rows.k_padded, variant.panel_tile, parallel_for,
             [&](int64_t weight, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
    over_packed(weights[weight], k, variant.panel_tile, panel_begin, panel_end, from_row(y[weight], first),
                [&](const Weight& packed, int64_t begin, int64_t end, const Output& to) {
      multiply(rows, row_begin, row_end, packed, begin, end, to);
    });
  });
}

}  // namespace

void linear(const Variant& variant, const Activations& x, const float* d, double threshold, const Weight* weights,
            const Output* y, int64_t count, ParallelFor parallel_for) {
  const int64_t row_bytes = row_stride(padded(x.k)) * variant.q_bytes;
  const int64_t chunk = std::max<int64_t>(ROW_PADDING, CHUNK_BYTES / std::max<int64_t>(row_bytes, 1));
  for (int64_t first = 0; first < x.m; first += chunk) {
    const int64_t m = std::min(chunk, x.m - first);
    const Rows rows = quantize_rows(variant, x, first, m, d, threshold, parallel_for);
    multiply_all(variant, rows, variant.multiply, weights, y, count, first, m, row_bytes, x.k, parallel_for);
  }
}

void weight_only_linear(const Variant& variant, const Activations& x, const float* d, const Weight& weight,
                        const Output& y, ParallelFor parallel_for) {
  const int64_t k_padded = padded(x.k), stride = row_stride(k_padded);
  const int64_t digits = d && rotation_size(x.k) > 1 ? MOST_DIGITS : MOST_DIGITS - 1;
  const int64_t row_bytes = digits * stride * variant.q_bytes;
  const int64_t chunk = std::max<int64_t>(ROW_PADDING, CHUNK_BYTES / std::max<int64_t>(row_bytes, 1));
  for (int64_t first = 0; first < x.m; first += chunk) {
    const int64_t m = std::min(chunk, x.m - first);
    char* q = workspace.q.get((digits * m + ROW_PADDING) * stride * variant.q_bytes);
    float* unit = workspace.scale.get(m);
    int32_t* sum = workspace.sum.get(digits * m);
    in_parallel(parallel_for, m, rows_grain(x.k), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Row row = row_of(x, first + i, d);
        unit[i] = variant.quantize_digits(row, digits, stride, room_for(row), q + i * row_bytes, sum + digits * i);
      }
    });
    const FixedPointRows rows = {q, unit, sum, digits, k_padded, stride};
    multiply_all(variant, rows, variant.multiply_digits, &weight, &y, 1, first, m, row_bytes, x.k, parallel_for);
  }
}

void quantize_weight(const Variant& variant, const Activations& weight, const float* d, int8_t* q, float* scale,
                     ParallelFor parallel_for) {
  const int64_t k = weight.k;
  std::vector<float> inverse;
  for (int64_t i = 0; d && i < k; ++i) inverse.push_back(1 / d[i]);
  in_parallel(parallel_for, weight.m, rows_grain(k), [&](int64_t begin, int64_t end) {
    void* row_q = row_scratch.packed.get(padded(k) * variant.q_bytes);
    for (int64_t i = begin; i < end; ++i) {
      const Row row = row_of(weight, i, d ? inverse.data() : nullptr);
      scale[i] = variant.quantize_weight(row, room_for(row), row_q);
      if (variant.q_bytes == 1) {
        if (k > 0) std::memcpy(q + i * k, row_q, k);  // An empty tensor's address is null, which memcpy does not allow.
      } else {
        std::copy_n(static_cast<const int16_t*>(row_q), k, q + i * k);
      }
    }
  });
}

void pack(const int8_t* qweight, int64_t n, int64_t k, uint8_t* packed, ParallelFor parallel_for) {
  const int64_t panel_bytes = LANES * padded(k);
  const int64_t grain = GRAIN_BYTES / std::max<int64_t>(panel_bytes, 1) + 1;
  in_parallel(parallel_for, panels_for(n), grain, [&](int64_t begin, int64_t end) {
    pack_panels(qweight, n, k, begin, end, packed + begin * panel_bytes);
  });
}

}  // namespace int8compile
