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
                                     Floats* result) {
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
      save(reinterpret_cast<float*>(result) + v * DL, __builtin_convertvector(sum, FewFloats));
    }
  } else if (outliers.sum == Summation::in_two) {
    Floats sum[P * PANEL_VECTORS], rest[P * PANEL_VECTORS];
    for (int v = 0; v < P * PANEL_VECTORS; ++v) {
      sum[v] = Floats{} + outliers.value_offset;
      rest[v] = Floats{} + outliers.rest_offset;
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int v = 0; v < P * PANEL_VECTORS; ++v) {
        const Ints weights = column<Ints>(packed + v / PANEL_VECTORS * panel_bytes, outliers.k[i], v % PANEL_VECTORS * VL);
        sum[v] += outliers.value[i] * __builtin_convertvector(weights, Floats);
        rest[v] += outliers.rest[i] * __builtin_convertvector(weights, Floats);
      }
    }
    for (int v = 0; v < P * PANEL_VECTORS; ++v) result[v] = sum[v] + rest[v];
  } else {
    Floats sum[P * PANEL_VECTORS];
    for (int v = 0; v < P * PANEL_VECTORS; ++v) sum[v] = Floats{} + outliers.value_offset;
    for (int64_t i = 0; i < count; ++i) {
      for (int v = 0; v < P * PANEL_VECTORS; ++v) {
        const Ints weights = column<Ints>(packed + v / PANEL_VECTORS * panel_bytes, outliers.k[i], v % PANEL_VECTORS * VL);
        sum[v] += outliers.value[i] * __builtin_convertvector(weights, Floats);
      }
    }
    for (int v = 0; v < P * PANEL_VECTORS; ++v) result[v] = sum[v];
  }
}

// Rounds VL outputs of a row to y's dtype; `count` of them are there.
inline void store(const Output& y, int64_t row, int64_t n, int64_t count, Floats value) {
  const int64_t at = row * y.stride + n;
  if (y.dtype == Dtype::float32) {
    std::memcpy(static_cast<float*>(y.data) + at, &value, count >= VL ? 4 * VL : 4 * count);
    return;
  }
  const Ints bits = (Ints)value;
  const Ints size = bits & 0x7fffffff;
  const Ints sign = (Ints)((Words)bits >> 16) & 0x8000;
  Ints half;
  if (y.dtype == Dtype::bfloat16) {
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
  const Halves narrow = __builtin_convertvector((Words)half, Halves);
  std::memcpy(static_cast<uint16_t*>(y.data) + at, &narrow, count >= VL ? 2 * VL : 2 * count);
}

// Scales and bias of one panel, zero beyond N.
struct Affine {
  float scale[LANES] = {}, bias[LANES] = {};
  int64_t count;

  Affine(const Weight& weight, int64_t panel) {
    const int64_t n = panel * LANES;
    count = weight.n - n < LANES ? weight.n - n : LANES;
    std::memcpy(scale, weight.scale + n, 4 * count);
    if (weight.bias) std::memcpy(bias, weight.bias + n, 4 * count);
  }

  // Outputs of a row from the panel's v-th vector on.
  void finish(Floats value, const Weight& weight, int64_t panel, int v, int64_t row, const Output& y) const {
    if (v * VL >= count) return;
    value *= load<Floats>(scale + v * VL);
    if (weight.bias) value += load<Floats>(bias + v * VL);
    store(y, row, panel * LANES + v * VL, count - v * VL, value);
  }
};

// Finishes a row of P panels.
template <int P>
inline void finish(const Rows& rows, int64_t row, const Weight& weight, int64_t panel, const Affine* affine,
                   const int32_t* acc, const Output& y) {
  const Outliers& outliers = rows.outliers[row];
  const int64_t panel_bytes = LANES * rows.k_padded;
  Floats outlier_part[P * PANEL_VECTORS];
  if (outliers.count) outlier_sums<P>(outliers, weight.packed + panel * panel_bytes, panel_bytes, outlier_part);
  for (int v = 0; v < P * PANEL_VECTORS; ++v) {
    // Unsigned: with the offset the sums may pass 2**31, and come back when it is taken off.
    const Words exact = load<Words>(acc + v * VL) - OFFSET * uint32_t(rows.sum[row]);
    Floats value = __builtin_convertvector((Ints)exact, Floats) * rows.scale[row];
    if (outliers.count) value += outlier_part[v];
    const int p = v / PANEL_VECTORS;
    affine[p].finish(value, weight, panel + p, v % PANEL_VECTORS, row, y);
  }
}

// Finishes a row of P panels from the sums of its digits, each P * LANES of `acc`.
template <int P>
inline void finish(const FixedPointRows& rows, int64_t row, const Weight& weight, int64_t panel, const Affine* affine,
                   const int32_t* acc, const Output& y) {
  for (int v = 0; v < P * PANEL_VECTORS; ++v) {
    float parts[VL];
    for (int part = 0; part < 2; ++part) {
      Doubles sum = {};
      for (int digit = DIGITS - 1; digit >= 0; --digit) {
        typedef uint32_t FewWords __attribute__((vector_size(4 * DL)));
        const FewWords exact = load<FewWords>(acc + digit * P * LANES + v * VL + part * DL) -
                               OFFSET * uint32_t(rows.sum[DIGITS * row + digit]);
        sum = sum * 256.0 + __builtin_convertvector((FewInts)exact, Doubles);
      }
      save(parts + part * DL, __builtin_convertvector(sum * rows.unit[row], FewFloats));
    }
    const int p = v / PANEL_VECTORS;
    affine[p].finish(load<Floats>(parts), weight, panel + p, v % PANEL_VECTORS, row, y);
  }
}
