// From int32 sums to the output: outliers, scales, bias, rounding. Included by every variant inside its own anonymous
// namespace.

// Vectors of a panel.
constexpr int PANEL_VECTORS = LANES / VL;

// Column k of a panel from output n on: weights with their offset.
template <typename V>
inline V column(const uint8_t* panel, int32_t k, int n) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  const V shift = V{} + 8 * (GROUP - 1 - k % GROUP);
#else
  const V shift = V{} + 8 * (k % GROUP);
#endif
  return (load<V>(panel + (k / GROUP * LANES + n) * GROUP) >> shift) & 0xff;
}

// sum_k value[k] * q[n][k] over the outliers of P panels, rounded to float32 once. Fused multiply-adds are allowed here
// because every product is exact.
template <int P>
FUSED_MULTIPLY_ADD void outlier_sums(const Outliers& outliers, const uint8_t* packed, int64_t panel_bytes,
                                     float* result) {
  ALLOW_FUSED
  const int64_t count = outliers.count;
  if (outliers.sum == Summation::in_double) {
    for (int v = 0; v < 2 * P * PANEL_VECTORS; ++v) {
      const uint8_t* panel = packed + v / (2 * PANEL_VECTORS) * panel_bytes;
      const int n = v % (2 * PANEL_VECTORS) * DL;
      Doubles sum = {};
      for (int64_t i = 0; i < count; ++i) {
        const FewInts weights = column<FewInts>(panel, outliers.k[i], n) - 128;
        sum += double(outliers.value[i]) * __builtin_convertvector(weights, Doubles);
      }
      save(result + v * DL, __builtin_convertvector(sum, FewFloats));
    }
  } else if (outliers.sum == Summation::in_two) {
    Floats sum[P * PANEL_VECTORS], rest[P * PANEL_VECTORS];
    for (int v = 0; v < P * PANEL_VECTORS; ++v) {
      sum[v] = Floats{} + outliers.value_offset;
      rest[v] = Floats{} + outliers.rest_offset;
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int v = 0; v < P * PANEL_VECTORS; ++v) {
        const uint8_t* panel = packed + v / PANEL_VECTORS * panel_bytes;
        const Ints weights = column<Ints>(panel, outliers.k[i], v % PANEL_VECTORS * VL);
        sum[v] += outliers.value[i] * __builtin_convertvector(weights, Floats);
        rest[v] += outliers.rest[i] * __builtin_convertvector(weights, Floats);
      }
    }
    for (int v = 0; v < P * PANEL_VECTORS; ++v) save(result + v * VL, sum[v] + rest[v]);
  } else {
    Floats sum[P * PANEL_VECTORS];
    for (int v = 0; v < P * PANEL_VECTORS; ++v) sum[v] = Floats{} + outliers.value_offset;
    for (int64_t i = 0; i < count; ++i) {
      for (int v = 0; v < P * PANEL_VECTORS; ++v) {
        const uint8_t* panel = packed + v / PANEL_VECTORS * panel_bytes;
        const Ints weights = column<Ints>(panel, outliers.k[i], v % PANEL_VECTORS * VL);
        sum[v] += outliers.value[i] * __builtin_convertvector(weights, Floats);
      }
    }
    for (int v = 0; v < P * PANEL_VECTORS; ++v) save(result + v * VL, sum[v]);
  }
}

// The first `count` lanes; all of them, as nearly always, in one store.
template <typename V>
inline void save_some(void* to, V value, int64_t count) {
  if (__builtin_expect(count >= VL, 1)) {
    save(to, value);
  } else {
    std::memcpy(to, &value, sizeof(V) / VL * count);
  }
}

// Rounds VL outputs to a dtype; `count` of them are there.
template <Dtype D>
inline void store(void* to, Floats value, int64_t count) {
  if (D == Dtype::float32) {
    save_some(to, value, count);
    return;
  }
#if defined(__AVX512BF16__)
  if (D == Dtype::bfloat16) {
    // The instruction makes zeros of subnormal numbers, and NaNs of its own.
    constexpr int SPECIAL = 0xa1;  // quiet NaN, subnormal, signaling NaN
    if (__builtin_expect(!_mm512_fpclass_ps_mask((__m512)value, SPECIAL), 1)) {
      save_some(to, (Halves)_mm512_cvtneps_pbh((__m512)value), count);
      return;
    }
  }
#endif
  const Ints bits = (Ints)value;
  const Ints size = bits & 0x7fffffff;
  const Ints sign = (Ints)((Words)bits >> 16) & 0x8000;
  Ints half;
  if (D == Dtype::bfloat16) {
    // Round half to even; NaN stays NaN.
    const Ints rounded = (Ints)((Words)(bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    half = size > int32_t(INFINITE) ? 0x7fc0 | sign : rounded;
  } else {
    // Normal numbers by integer rounding, subnormal ones by a float addition that aligns their last bit.
    const Ints normal = (size + 0xfff + ((size >> 13) & 1) - (112 << 23)) >> 13;
    const Ints tiny = (Ints)((Floats)size + 0.5f) - 0x3f000000;
    const Ints finite = size < 0x38800000 ? tiny : normal;
    const Ints large = size > int32_t(INFINITE) ? Ints{} + 0x7e00 : Ints{} + 0x7c00;
    half = (size >= 0x477ff000 ? large : finite) | sign;
  }
  save_some(to, __builtin_convertvector((Words)half, Halves), count);
}

// What makes rows of sums into rows of P panels of y.
template <int P>
struct Affine {
  float scale[P * LANES] = {}, bias[P * LANES] = {};  // zero beyond N
  bool has_bias;
  int64_t count;  // outputs that are there
  Dtype dtype;
  int64_t stride;  // of y's rows, in bytes
  char* y;         // the panels' first output in row 0

  Affine(const Weight& weight, int64_t panel, const Output& out) : has_bias(weight.bias), dtype(out.dtype) {
    const int64_t n = panel * LANES, bytes = dtype == Dtype::float32 ? 4 : 2;
    count = weight.n - n < P * LANES ? weight.n - n : P * LANES;
    stride = out.stride * bytes;
    y = static_cast<char*>(out.data) + n * bytes;
    std::memcpy(scale, weight.scale + n, 4 * count);
    if (has_bias) std::memcpy(bias, weight.bias + n, 4 * count);
  }

  // load_value(m, v) is what is scaled: row m's v-th vector.
  template <Dtype D, bool BIAS, bool WHOLE, typename F>
  inline void finish_as(int64_t row, int64_t rows, const F& load_value) const {
    constexpr int64_t BYTES = D == Dtype::float32 ? 4 : 2;
    constexpr int V = P * PANEL_VECTORS;
    // In registers: for all that compilers know, a store to y changes this.
    Floats scales[V], biases[V];
    for (int v = 0; v < V; ++v) {
      scales[v] = load<Floats>(scale + v * VL);
      biases[v] = load<Floats>(bias + v * VL);
    }
    char* to = y + row * stride;
    const int64_t there = count, step = stride;
    for (int64_t m = 0; m < rows; ++m, to += step) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        if (!WHOLE && v * VL >= there) break;
        Floats value = load_value(m, v) * scales[v];
        if (BIAS) value += biases[v];
        store<D>(to + v * VL * BYTES, value, WHOLE ? VL : there - v * VL);
      }
    }
  }

  template <Dtype D, typename F>
  inline void finish_in(int64_t row, int64_t rows, const F& load_value) const {
    if (count < P * LANES) {
      has_bias ? finish_as<D, true, false>(row, rows, load_value) : finish_as<D, false, false>(row, rows, load_value);
    } else {
      has_bias ? finish_as<D, true, true>(row, rows, load_value) : finish_as<D, false, true>(row, rows, load_value);
    }
  }

  template <typename F>
  inline void finish(int64_t row, int64_t rows, const F& load_value) const {
    switch (dtype) {
      case Dtype::float32:
        return finish_in<Dtype::float32>(row, rows, load_value);
      case Dtype::bfloat16:
        return finish_in<Dtype::bfloat16>(row, rows, load_value);
      case Dtype::float16:
        return finish_in<Dtype::float16>(row, rows, load_value);
    }
  }
};

// Finishes M rows of P panels. `parts` [M][P][LANES] is what their outliers add, null where they have none.
template <int P>
inline void finish_with(const float* parts, const Rows& rows, int64_t row, int64_t count, const Affine<P>& affine,
                        const int32_t* acc) {
  const float* scale = rows.scale + row;
  const int32_t* sum = rows.sum + row;
  auto exact = [scale, sum, acc](int64_t m, int v) {
    // Unsigned: with the offset the sums may pass 2**31, and come back when it is taken off.
    const Words words = load<Words>(acc + (m * P * PANEL_VECTORS + v) * VL) - OFFSET * uint32_t(sum[m]);
    return __builtin_convertvector((Ints)words, Floats) * scale[m];
  };
  if (parts) {
    affine.finish(row, count, [exact, parts](int64_t m, int v) {
      return exact(m, v) + load<Floats>(parts + (m * P * PANEL_VECTORS + v) * VL);
    });
  } else {
    affine.finish(row, count, exact);
  }
}

template <int P>
inline void finish(const Rows& rows, int64_t row, int64_t count, const Weight& weight, int64_t panel,
                   const Affine<P>& affine, const int32_t* acc) {
  constexpr int64_t MOST = 8;
  const int64_t panel_bytes = LANES * rows.k_padded;
  const uint8_t* packed = weight.packed + panel * panel_bytes;
  alignas(64) float parts[MOST * P * LANES];
  for (int64_t first = 0; first < count; first += MOST) {
    const int64_t some = count - first < MOST ? count - first : MOST;
    bool any = false;
    for (int64_t m = 0; m < some; ++m) any |= rows.outliers[row + first + m].count > 0;
    for (int64_t m = 0; any && m < some; ++m) {
      float* part = parts + m * P * LANES;
      const Outliers& outliers = rows.outliers[row + first + m];
      if (outliers.count) {
        outlier_sums<P>(outliers, packed, panel_bytes, part);
      } else {
        std::memset(part, 0, P * LANES * sizeof(float));
      }
    }
    finish_with<P>(any ? parts : nullptr, rows, row + first, some, affine, acc + first * P * LANES);
  }
}

// Finishes rows from the sums of their digits, each row DIGITS of `acc`.
template <int P>
inline void finish(const FixedPointRows& rows, int64_t row, int64_t count, const Weight&, int64_t,
                   const Affine<P>& affine, const int32_t* acc) {
  affine.finish(row, count, [&](int64_t m, int v) {
    float parts[VL];
    for (int part = 0; part < 2; ++part) {
      Doubles sum = {};
      for (int digit = DIGITS - 1; digit >= 0; --digit) {
        typedef uint32_t FewWords __attribute__((vector_size(4 * DL)));
        const int64_t from = DIGITS * m + digit;
        const FewWords exact = load<FewWords>(acc + (from * P * PANEL_VECTORS + v) * VL + part * DL) -
                               OFFSET * uint32_t(rows.sum[DIGITS * row + from]);
        sum = sum * 256.0 + __builtin_convertvector((FewInts)exact, Doubles);
      }
      save(parts + part * DL, __builtin_convertvector(sum * rows.unit[row + m], FewFloats));
    }
    return load<Floats>(parts);
  });
}
