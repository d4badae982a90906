// From int32 sums to the output: outliers, scales, bias, rounding. Included by every variant inside its own anonymous
// namespace.

// Column k of a panel: LANES weights, with their offset.
inline Ints column(const uint8_t* panel, int32_t k) {
  const Words words = load<Words>(panel + (k / GROUP) * (LANES * GROUP));
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  const Words shift = Words{} + 8u * (GROUP - 1 - uint32_t(k) % GROUP);
#else
  const Words shift = Words{} + 8u * (uint32_t(k) % GROUP);
#endif
  return (Ints)((words >> shift) & 0xffu);
}

// sum_k value[k] * q[n][k] over the outliers of P panels, rounded to float32 once. Fused multiply-adds are allowed here,
// and only here, because every product is exact.
template <int P>
FUSED_MULTIPLY_ADD void outlier_sums(const Outliers& outliers, const uint8_t* packed, int64_t panel_bytes, Floats* result) {
  ALLOW_FUSED
  const int64_t count = outliers.count;
  if (outliers.sum == Summation::in_double) {
    Doubles sum[P] = {};
    for (int64_t i = 0; i < count; ++i) {
      for (int p = 0; p < P; ++p) {
        const Ints weights = column(packed + p * panel_bytes, outliers.k[i]) - 128;
        sum[p] += double(outliers.value[i]) * __builtin_convertvector(weights, Doubles);
      }
    }
    for (int p = 0; p < P; ++p) result[p] = __builtin_convertvector(sum[p], Floats);
  } else if (outliers.sum == Summation::in_two) {
    Floats sum[P], rest[P];
    for (int p = 0; p < P; ++p) {
      sum[p] = Floats{} + outliers.value_offset;
      rest[p] = Floats{} + outliers.rest_offset;
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int p = 0; p < P; ++p) {
        const Floats weights = __builtin_convertvector(column(packed + p * panel_bytes, outliers.k[i]), Floats);
        sum[p] += outliers.value[i] * weights;
        rest[p] += outliers.rest[i] * weights;
      }
    }
    for (int p = 0; p < P; ++p) result[p] = sum[p] + rest[p];
  } else {
    Floats sum[P];
    for (int p = 0; p < P; ++p) sum[p] = Floats{} + outliers.value_offset;
    for (int64_t i = 0; i < count; ++i) {
      for (int p = 0; p < P; ++p) {
        sum[p] += outliers.value[i] *
                  __builtin_convertvector(column(packed + p * panel_bytes, outliers.k[i]), Floats);
      }
    }
    for (int p = 0; p < P; ++p) result[p] = sum[p];
  }
}

inline void store(const Output& y, int64_t row, int64_t n, int64_t count, Floats value) {
  const int64_t at = row * y.stride + n;
  if (y.dtype == Dtype::float32) {
    std::memcpy(static_cast<float*>(y.data) + at, &value, count == LANES ? 4 * LANES : 4 * count);
    return;
  }
  const Words bits = (Words)value;
  const Words sign = bits & 0x80000000u, size = bits & 0x7fffffffu;
  Words half;
  if (y.dtype == Dtype::bfloat16) {
    // Round half to even; NaN stays NaN.
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    half = (Words)(size > INFINITE) ? 0x7fc0u | (sign >> 16) : rounded;
  } else {
    // Normal numbers by integer rounding, subnormal ones by a float addition that aligns their last bit.
    const Words normal = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
    const Words tiny = (Words)((Floats)size + 0.5f) - 0x3f000000u;
    const Words finite = (Words)(size < 0x38800000u) ? tiny : normal;
    const Words large = (Words)(size > INFINITE) ? Words{} + 0x7e00u : Words{} + 0x7c00u;
    half = ((Words)(size >= 0x477ff000u) ? large : finite) | (sign >> 16);
  }
  const Halves narrow = __builtin_convertvector(half, Halves);
  std::memcpy(static_cast<uint16_t*>(y.data) + at, &narrow, count == LANES ? 2 * LANES : 2 * count);
}

// Scales and bias of one panel, zero beyond N.
struct Affine {
  Floats scale, bias;
  int64_t count;

  Affine(const Weight& weight, int64_t panel) : scale{}, bias{} {
    const int64_t n = panel * LANES;
    count = weight.n - n < LANES ? weight.n - n : LANES;
    std::memcpy(&scale, weight.scale + n, 4 * count);
    if (weight.bias) std::memcpy(&bias, weight.bias + n, 4 * count);
  }
};

// Finishes a row of P panels.
template <int P>
inline void finish(const Rows& rows, int64_t row, const Weight& weight, int64_t panel, const Affine* affine,
                   const int32_t* acc, const Output& y) {
  const Outliers& outliers = rows.outliers[row];
  const int64_t panel_bytes = LANES * rows.k_padded;
  Floats outlier_part[P];
  if (outliers.count) outlier_sums<P>(outliers, weight.packed + panel * panel_bytes, panel_bytes, outlier_part);
  for (int p = 0; p < P; ++p) {
    // Unsigned: with the offset the sums may pass 2**31, and come back when it is taken off.
    const Words exact = load<Words>(acc + p * LANES) - OFFSET * uint32_t(rows.sum[row]);
    Floats value = __builtin_convertvector((Ints)exact, Floats) * rows.scale[row];
    if (outliers.count) value += outlier_part[p];
    value *= affine[p].scale;
    if (weight.bias) value += affine[p].bias;
    store(y, row, (panel + p) * LANES, affine[p].count, value);
  }
}

// Finishes a row of P panels from the sums of its digits, each P * LANES of `acc`.
template <int P>
inline void finish(const FixedPointRows& rows, int64_t row, const Weight& weight, int64_t panel, const Affine* affine,
                   const int32_t* acc, const Output& y) {
  for (int p = 0; p < P; ++p) {
    Doubles sum = {};
    for (int digit = DIGITS - 1; digit >= 0; --digit) {
      const Words exact = load<Words>(acc + (digit * P + p) * LANES) - OFFSET * uint32_t(rows.sum[DIGITS * row + digit]);
      sum = sum * 256.0 + __builtin_convertvector((Ints)exact, Doubles);
    }
    Floats value = __builtin_convertvector(sum * rows.unit[row], Floats) * affine[p].scale;
    if (weight.bias) value += affine[p].bias;
    store(y, row, (panel + p) * LANES, affine[p].count, value);
  }
}
