// The product by register tiles: weights loaded once for several rows, activations broadcast. Included by variants
// inside their anonymous namespace, after they define
//     Q, Sum, W, X       the quantized activation's type; vectors of sums, weights, broadcast activations
//     PER_PANEL          vectors of weights in a group of a panel
//     OFFSET             what `load_weights` leaves added to the weights: 128, or 0 if it makes them signed
//     TILE_M, TILE_P     rows and panels of a tile
//     zero, load_weights, broadcast, dot, store_sums

// How far ahead of its use one row's weights are asked for: enough to hide the memory's latency.
constexpr int PREFETCH_BYTES = 2048;

template <int M, int P>
inline void tile(const Q* q, int64_t stride, int64_t k_padded, const uint8_t* packed, int32_t* acc) {
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
    W w[V];
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) {
      w[v] = load_weights(packed + (v / PER_PANEL) * panel_bytes + k * LANES + (v % PER_PANEL) * BYTES);
    }
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

// One row: one panel at a time, so that weights stream from memory in order, with several sums in flight.
inline void row_tile(const Q* q, int64_t k_padded, const uint8_t* packed, int32_t* acc) {
  constexpr int U = 4;
  constexpr int BYTES = LANES * GROUP / PER_PANEL;
  Sum sum[U][PER_PANEL];
  for (auto& each : sum) {
    for (auto& one : each) one = zero();
  }
  for (int64_t k = 0; k < k_padded; k += U * GROUP) {
    // Past the end of the weight it does no harm.
    for (int u = 0; u < U; ++u) __builtin_prefetch(packed + (k + u * GROUP) * LANES + PREFETCH_BYTES);
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      const X x = broadcast(q + k + u * GROUP);
#pragma GCC unroll 8
      for (int v = 0; v < PER_PANEL; ++v) {
        sum[u][v] = dot(sum[u][v], load_weights(packed + (k + u * GROUP) * LANES + v * BYTES), x);
      }
    }
  }
  for (int v = 0; v < PER_PANEL; ++v) sum[0][v] = add(add(sum[0][v], sum[1][v]), add(sum[2][v], sum[3][v]));
  store_sums(sum[0], acc);
}

template <int M, int P>
inline void finished_tile(const Rows& rows, int64_t row, const Weight& weight, int64_t panel, const Affine* affine,
                          const Output& y) {
  alignas(64) int32_t acc[M * P * LANES];
  const Q* q = static_cast<const Q*>(rows.q) + row * rows.stride;
  const uint8_t* packed = weight.packed + panel * LANES * rows.k_padded;
  if (M == 1 && P == 1) {
    row_tile(q, rows.k_padded, packed, acc);
  } else {
    tile<M, P>(q, rows.stride, rows.k_padded, packed, acc);
  }
  for (int m = 0; m < M; ++m) finish<P>(rows, row + m, weight, panel, affine, acc + m * P * LANES, y);
}

// The last rows of a tile of M, M - 1, ..., 1.
template <int M, int P>
inline void last_rows(const Rows& rows, int64_t row, int64_t count, const Weight& weight, int64_t panel,
                      const Affine* affine, const Output& y) {
  if (count == M) {
    finished_tile<M, P>(rows, row, weight, panel, affine, y);
  } else if constexpr (M > 1) {
    last_rows<M - 1, P>(rows, row, count, weight, panel, affine, y);
  }
}

template <int P>
inline void panels(const Rows& rows, int64_t begin, int64_t end, const Weight& weight, int64_t panel,
                   const Output& y) {
  alignas(64) unsigned char room[P * sizeof(Affine)];
  Affine* affine = reinterpret_cast<Affine*>(room);
  for (int p = 0; p < P; ++p) new (&affine[p]) Affine(weight, panel + p);
  int64_t row = begin;
  for (; row + TILE_M <= end; row += TILE_M) finished_tile<TILE_M, P>(rows, row, weight, panel, affine, y);
  if (row < end) last_rows<TILE_M - 1, P>(rows, row, end - row, weight, panel, affine, y);
}

void multiply(const Rows& rows, int64_t row_begin, int64_t row_end, const Weight& weight, int64_t panel_begin,
              int64_t panel_end, const Output& y) {
  int64_t panel = panel_begin;
  if (row_end - row_begin > 1) {
    for (; panel + TILE_P <= panel_end; panel += TILE_P) panels<TILE_P>(rows, row_begin, row_end, weight, panel, y);
  }
  for (; panel < panel_end; ++panel) panels<1>(rows, row_begin, row_end, weight, panel, y);
}
