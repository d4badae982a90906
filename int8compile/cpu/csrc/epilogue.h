// From int32 sums to the output: second digits of outliers, scales, bias, rounding. Included by tiles.h, inside a
// variant's anonymous namespace.

// The number of vectors of a panel.
constexpr int PANEL_VECTORS = LANES / VL;

// Adds 256 times the products of a row's second digits to its sums of P panels. Weights have their offset here too.
template <int P>
inline void add_outliers(const Outliers& outliers, const uint8_t* packed, int64_t panel_bytes, int32_t* acc) {
  constexpr int V = P * PER_PANEL, BYTES = LANES * GROUP / PER_PANEL;
  Sum sum[V];
  for (Sum& each : sum) each = zero();
  for (int64_t i = 0; i < outliers.count; ++i) {
    const Outlier& outlier = outliers.list[i];
    Q digits[GROUP];
    for (int j = 0; j < GROUP; ++j) digits[j] = outlier.digits[j];
    const X x = broadcast(digits);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const uint8_t* panel = packed + v / PER_PANEL * panel_bytes + v % PER_PANEL * BYTES;
      sum[v] = dot(sum[v], load_weights(panel + outlier.k * LANES), x);
    }
  }
  int32_t sums[P * LANES];
  for (int p = 0; p < P; ++p) store_sums(&sum[p * PER_PANEL], sums + p * LANES);
  for (int i = 0; i < P * LANES; i += VL) save(acc + i, load<Words>(acc + i) + (load<Words>(sums + i) << 8));
}

// Saves the first `count` lanes. All lanes, the usual case, are one store.
template <typename V>
inline void save_some(void* to, V value, int64_t count) {
  if (__builtin_expect(count >= VL, 1)) {
    save(to, value);
  } else {
    std::memcpy(to, &value, sizeof(V) / VL * count);
  }
}

// Rounds VL outputs to a dtype, and stores the first `count` of them.
template <Dtype D>
inline void store(void* to, Floats value, int64_t count) {
  if (D == Dtype::float32) {
    save_some(to, value, count);
    return;
  }
#if defined(__AVX512BF16__)
  if (D == Dtype::bfloat16) {
    // The instruction turns subnormal numbers into zeros, and changes NaNs.
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
    // Normal numbers are rounded as integers, subnormal ones by a float addition that aligns their last bit.
    const Ints normal = (size + 0xfff + ((size >> 13) & 1) - (112 << 23)) >> 13;
    const Ints tiny = (Ints)((Floats)size + 0.5f) - 0x3f000000;
    const Ints finite = size < 0x38800000 ? tiny : normal;
    const Ints large = size > int32_t(INFINITE) ? Ints{} + 0x7e00 : Ints{} + 0x7c00;
    half = (size >= 0x477ff000 ? large : finite) | sign;
  }
  save_some(to, __builtin_convertvector((Words)half, Halves), count);
}

// The scales, bias and place of P panels of y.
template <int P>
struct Affine {
  float scale[P * LANES] = {}, bias[P * LANES] = {};  // zero beyond N
  bool has_bias;
  int64_t count;  // outputs below N
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

  // load_value(m, v) returns the v-th vector of row m, to be scaled.
  template <Dtype D, bool BIAS, bool WHOLE, typename F>
  inline void finish_as(int64_t row, int64_t rows, const F& load_value) const {
    constexpr int64_t BYTES = D == Dtype::float32 ? 4 : 2;
    constexpr int V = P * PANEL_VECTORS;
    // In registers, since for compilers a store to y could change members.
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

// Finishes rows of P panels from their sums `acc` [count][P][LANES].
template <int P>
inline void finish(const Rows& rows, int64_t row, int64_t count, const Weight& weight, int64_t panel,
                   const Affine<P>& affine, int32_t* acc) {
  const int64_t panel_bytes = LANES * rows.k_padded;
  for (int64_t m = 0; m < count; ++m) {
    const Outliers& outliers = rows.outliers[row + m];
    if (outliers.count) {
      add_outliers<P>(outliers, weight.packed + panel * panel_bytes, panel_bytes, acc + m * P * LANES);
    }
  }
  const float* scale = rows.scale + row;
  const int32_t* sum = rows.sum + row;
  affine.finish(row, count, [scale, sum, acc](int64_t m, int v) {
    // Unsigned: with the offset sums may exceed 2**31, and are right again when it is subtracted.
    const Words words = load<Words>(acc + (m * P * PANEL_VECTORS + v) * VL) - OFFSET * uint32_t(sum[m]);
    return __builtin_convertvector((Ints)words, Floats) * scale[m];
  });
}

// Finishes rows from the sums of their digits; each row has `digits` rows of `acc`.
template <int P>
inline void finish(const FixedPointRows& rows, int64_t row, int64_t count, const Weight&, int64_t,
                   const Affine<P>& affine, int32_t* acc) {
  affine.finish(row, count, [&](int64_t m, int v) {
    float parts[VL];
    for (int part = 0; part < 2; ++part) {
      // The sum is below 2**50, so exact.
      Doubles sum = {};
      for (int64_t digit = rows.digits - 1; digit >= 0; --digit) {
        typedef uint32_t FewWords __attribute__((vector_size(4 * DL)));
        const int64_t from = rows.digits * m + digit;
        const FewWords exact = load<FewWords>(acc + (from * P * PANEL_VECTORS + v) * VL + part * DL) -
                               OFFSET * uint32_t(rows.sum[rows.digits * row + from]);
        sum = sum * 256.0 + __builtin_convertvector((FewInts)exact, Doubles);
      }
      save(parts + part * DL, __builtin_convertvector(sum, FewFloats));
    }
    return load<Floats>(parts) * rows.unit[row + m];
  });
}
