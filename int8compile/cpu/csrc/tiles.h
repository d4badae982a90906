// The product by register tiles: weights are loaded once for several rows, activations are broadcast. Each variant
// includes this file inside its own anonymous namespace, after it has defined
//     Q, Sum, W, X       the quantized activation's type; vectors of sums, weights, broadcast activations
//     PER_PANEL          vectors of weights in a group of a panel
//     OFFSET             the offset of weights after `load_weights`: 128, or 0 if it makes them signed
//     TILE_M, TILE_P     rows and panels of a tile
//     FEW_REGISTERS      whether a tile's sums leave too few registers for all weights of a step
//     zero, load_weights, broadcast, dot, store_sums, and lanes_above for rows.h
#include "rows.h"
#include "epilogue.h"

// The distance of prefetches of weights that are used once, enough to hide the memory's latency. A prefetch beyond the
// end of a weight does no harm.
constexpr int PREFETCH_BYTES = 2048;

// Multiplies M rows `q` by P panels `packed` into `acc` [M][P][LANES]. Not inlined: in a function of its own the sums
// stay in registers. GCC would otherwise put most of them on the stack.
template <int M, int P>
__attribute__((noinline)) void tile(const Q* q, int64_t stride, int64_t k_padded, const uint8_t* packed, int32_t* acc) {
  constexpr int V = P * PER_PANEL;
  constexpr int BYTES = LANES * GROUP / PER_PANEL;
  const int64_t panel_bytes = LANES * k_padded;
  Sum sum[M][V];
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) sum[m][v] = zero();
  }
  for (int64_t k = 0; k < k_padded; k += GROUP) {
    // Few rows have tiles of one panel.
    if (P == 1) __builtin_prefetch(packed + k * LANES + PREFETCH_BYTES);
    auto weights = [&](int v) {
      return load_weights(packed + (v / PER_PANEL) * panel_bytes + k * LANES + (v % PER_PANEL) * BYTES);
    };
    if constexpr (FEW_REGISTERS) {
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) {
        const W w = weights(v);
#pragma GCC unroll 32
        for (int m = 0; m < M; ++m) sum[m][v] = dot(sum[m][v], w, broadcast(q + m * stride + k));
      }
      continue;
    }
    W w[V];
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) w[v] = weights(v);
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      const X x = broadcast(q + m * stride + k);
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) sum[m][v] = dot(sum[m][v], w[v], x);
    }
  }
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 32
    for (int p = 0; p < P; ++p) store_sums(&sum[m][p * PER_PANEL], acc + (m * P + p) * LANES);
  }
}

// Multiplies one row by one panel. There are as many independent sums as registers hold, to hide the latency of
// instructions.
template <>
__attribute__((noinline)) void tile<1, 1>(const Q* q, int64_t, int64_t k_padded, const uint8_t* packed, int32_t* acc) {
  constexpr int U = 4, SUMS = PER_PANEL < U ? U : 2;
  constexpr int BYTES = LANES * GROUP / PER_PANEL;
  Sum sum[SUMS][PER_PANEL];
  for (auto& each : sum) {
    for (auto& one : each) one = zero();
  }
  for (int64_t k = 0; k < k_padded; k += U * GROUP) {
    for (int u = 0; u < U; ++u) __builtin_prefetch(packed + (k + u * GROUP) * LANES + PREFETCH_BYTES);
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      const X x = broadcast(q + k + u * GROUP);
#pragma GCC unroll 8
      for (int v = 0; v < PER_PANEL; ++v) {
        Sum& to = sum[u % SUMS][v];
        to = dot(to, load_weights(packed + (k + u * GROUP) * LANES + v * BYTES), x);
      }
    }
  }
  for (int u = 1; u < SUMS; ++u) {
    for (int v = 0; v < PER_PANEL; ++v) sum[0][v] = add(sum[0][v], sum[u][v]);
  }
  store_sums(sum[0], acc);
}

// Multiplies `count` rows of the buffer, at most M.
template <int M, int P>
inline void tile_of(int64_t count, const Q* q, int64_t stride, int64_t k_padded, const uint8_t* packed, int32_t* acc) {
  if constexpr (M > 0) {
    if (count == M) {
      tile<M, P>(q, stride, k_padded, packed, acc);
    } else {
      tile_of<M - 1, P>(count, q, stride, k_padded, packed, acc);
    }
  }
}

// The number of the buffer's rows for one row of x, and the largest such number.
inline int64_t parts_of(const Rows&) { return 1; }
inline int64_t parts_of(const FixedPointRows& rows) { return rows.digits; }
constexpr int most_parts(const Rows*) { return 1; }
constexpr int most_parts(const FixedPointRows*) { return MOST_DIGITS; }

template <int P, typename R>
inline void panels(const R& rows, int64_t begin, int64_t end, const Weight& weight, int64_t panel, const Output& y) {
  alignas(64) int32_t acc[most_parts(static_cast<const R*>(nullptr)) * TILE_M * P * LANES];
  const Affine<P> affine(weight, panel, y);
  const uint8_t* packed = weight.packed + panel * LANES * rows.k_padded;
  const int64_t parts = parts_of(rows);
  for (int64_t row = begin; row < end; row += TILE_M) {
    const int64_t count = end - row < TILE_M ? end - row : TILE_M;
    const Q* q = static_cast<const Q*>(rows.q) + row * parts * rows.stride;
    for (int64_t first = 0; first < count * parts; first += TILE_M) {
      const int64_t some = count * parts - first < TILE_M ? count * parts - first : TILE_M;
      tile_of<TILE_M, P>(some, q + first * rows.stride, rows.stride, rows.k_padded, packed, acc + first * P * LANES);
    }
    finish<P>(rows, row, count, weight, panel, affine, acc);
  }
}

template <typename R>
inline void multiply_rows(const R& rows, int64_t row_begin, int64_t row_end, const Weight& weight, int64_t panel_begin,
                          int64_t panel_end, const Output& y) {
  int64_t panel = panel_begin;
  // One row: one panel at a time, so that weights stream from memory in order.
  if (row_end - row_begin > 1) {
    for (; panel + TILE_P <= panel_end; panel += TILE_P) panels<TILE_P>(rows, row_begin, row_end, weight, panel, y);
  }
  for (; panel < panel_end; ++panel) panels<1>(rows, row_begin, row_end, weight, panel, y);
}

void multiply(const Rows& rows, int64_t row_begin, int64_t row_end, const Weight& weight, int64_t panel_begin,
              int64_t panel_end, const Output& y) {
  multiply_rows(rows, row_begin, row_end, weight, panel_begin, panel_end, y);
}

void multiply_digits(const FixedPointRows& rows, int64_t row_begin, int64_t row_end, const Weight& weight,
                     int64_t panel_begin, int64_t panel_end, const Output& y) {
  multiply_rows(rows, row_begin, row_end, weight, panel_begin, panel_end, y);
}

constexpr Variant variant_of(const char* name, bool (*runs_here)(), decltype(&multiply) product = multiply,
                             int64_t panel_tile = TILE_P) {
  return {name, runs_here, sizeof(Q), panel_tile, quantize, product, quantize_digits, multiply_digits, quantize_weight};
}
