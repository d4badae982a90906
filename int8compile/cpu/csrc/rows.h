// Row statistics and quantization, in C++ that compilers vectorize for the flags a variant is built with. Included by
// every variant inside its own anonymous namespace.

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Bits of a float32 without its sign. They order magnitudes as integers do.
inline uint32_t magnitude(float x) { return float_bits(x) & 0x7fffffffu; }

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline int64_t bits_of(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}

inline double double_from_bits(int64_t bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}

constexpr uint32_t INFINITE = 0x7f800000u;

void to_float(const void* x, Dtype dtype, int64_t count, float* __restrict result) {
  if (dtype == Dtype::float32) {
    std::memcpy(result, x, count * sizeof(float));
    return;
  }
  const uint16_t* __restrict half = static_cast<const uint16_t*>(x);
  if (dtype == Dtype::bfloat16) {
    for (int64_t i = 0; i < count; ++i) result[i] = from_bits(uint32_t(half[i]) << 16);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    // Moved to float32's fields, the exponent is short by 112; the product also normalizes subnormals, exactly.
    const uint32_t moved = uint32_t(half[i] & 0x7fffu) << 13;
    const float finite = from_bits(moved) * 0x1p112f;
    const uint32_t bits = (half[i] & 0x7fffu) >= 0x7c00u ? (moved | INFINITE) : float_bits(finite);
    result[i] = from_bits(bits | (uint32_t(half[i] & 0x8000u) << 16));
  }
}

// Variants define lanes_above(a, b): a bit for each lane of `a` that is larger than that of `b`.

// The largest magnitude up to `limit`. Magnitudes are positive as int32 too, whose maximum every instruction set has.
inline uint32_t largest_to(uint32_t limit, const float* x, int64_t count) {
  constexpr int U = 2;  // two maxima in flight
  const Ints last = Ints{} + int32_t(limit);
  Ints best[U] = {};
  int64_t i = 0;
  auto take = [&](int u, int64_t at) {
    const Ints bits = load<Ints>(x + at) & 0x7fffffff;
    const Ints counted = bits & (bits <= last);
    best[u] = best[u] > counted ? best[u] : counted;
  };
  for (; i + U * VL <= count; i += U * VL) {
    for (int u = 0; u < U; ++u) take(u, i + u * VL);
  }
  for (; i < count; i += VL) take(0, i);
  int32_t result = 0;
  for (int u = 0; u < U; ++u) {
    for (int lane = 0; lane < VL; ++lane) result = result > best[u][lane] ? result : best[u][lane];
  }
  return uint32_t(result);
}

// The same with no limit, and the sum of squares by the way, as float32 has it.
FUSED_MULTIPLY_ADD uint32_t largest_and_squares(const float* x, int64_t count, float* squares) {
  ALLOW_FUSED
  constexpr int U = 2;
  Ints best[U] = {};
  Floats sum[U] = {};
  auto take = [&](int u, int64_t at) __attribute__((always_inline)) {
    const Floats value = load<Floats>(x + at);
    const Ints bits = (Ints)value & 0x7fffffff;
    best[u] = best[u] > bits ? best[u] : bits;
    sum[u] += value * value;
  };
  int64_t i = 0;
  for (; i + U * VL <= count; i += U * VL) {
    for (int u = 0; u < U; ++u) take(u, i + u * VL);
  }
  for (; i < count; i += VL) take(0, i);
  int32_t result = 0;
  *squares = 0;
  for (int u = 0; u < U; ++u) {
    for (int lane = 0; lane < VL; ++lane) {
      result = result > best[u][lane] ? result : best[u][lane];
      *squares += sum[u][lane];
    }
  }
  return uint32_t(result);
}

// Adding `magic` rounds a square to units of 2**-35 * 4**exponent, where absmax < 2**exponent.
inline double square_magic(int64_t exponent) { return 1.5 * double_from_bits((1023 + 17 + 2 * exponent) << 52); }

// The sum of squares in those units. As integers the rounded squares are summed exactly.
template <bool ALL_FINITE>
FUSED_MULTIPLY_ADD int64_t sum_of_squares(const float* x, int64_t count, double magic) {
  ALLOW_FUSED  // The square of a float32 is exact in float64.
  constexpr int U = LANES / DL;
  Longs sum[U] = {};
  for (int64_t i = 0; i < count; i += U * DL) {
    for (int u = 0; u < U; ++u) {
      FewFloats values = load<FewFloats>(x + i + u * DL);
      if (!ALL_FINITE) {
        const FewInts bits = (FewInts)values;
        values = (FewFloats)(bits & ((bits & 0x7fffffff) < int32_t(INFINITE)));
      }
      const Doubles wide = widen(values);
      sum[u] += (Longs)(wide * wide + magic);
    }
  }
  int64_t total = 0;
  for (int u = 0; u < U; ++u) {
    for (int lane = 0; lane < DL; ++lane) total += sum[u][lane];
  }
  // Wraps around and back.
  return total - count * bits_of(magic);
}

// The smallest magnitude that is an outlier of its row under the row policy (`fixed_point_squares` of the reference,
// whose unit of squares is 4**exponent). The test is monotonic in |x|, so a row needs one number, found by a search
// around its approximate value.
uint32_t row_cutoff(const float* x, int64_t k, int64_t count, uint32_t absmax, bool all_finite, double threshold) {
  if (absmax == 0) return INFINITE;
  const double top = from_bits(absmax);
  const int64_t exponent = ((bits_of(top) >> 52) & 0x7ff) - 1022;
  const double magic = square_magic(exponent);
  const int64_t sum = all_finite ? sum_of_squares<true>(x, count, magic) : sum_of_squares<false>(x, count, magic);
  const double limit = (double(sum) * 0x1p-35) * (threshold * threshold);
  auto is_outlier = [&](uint32_t bits) {
    const double wide = from_bits(bits);
    const int64_t square = bits_of(wide * wide + magic) - bits_of(magic);
    return (double(square) * 0x1p-35) * double(k) >= limit;
  };
  if (!is_outlier(absmax)) return INFINITE;
  const double guess = __builtin_sqrt(limit / double(k)) * double_from_bits((1023 + exponent) << 52);
  // Invariant: `high` is an outlier, `low` is not (or is zero, which never is).
  uint32_t high = absmax, low = 0, step = 1;
  uint32_t at = guess < top ? magnitude(float(guess)) : absmax;
  if (at > absmax) at = absmax;
  if (at > 0 && is_outlier(at)) {
    for (high = at; high > step && is_outlier(high - step); step *= 2) high -= step;
    low = high > step ? high - step : 0;
  } else {
    for (low = at; low + step < absmax && !is_outlier(low + step); step *= 2) low += step;
    high = low + step < absmax ? low + step : absmax;
  }
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    (is_outlier(middle) ? high : low) = middle;
  }
  return high;
}

// Bounds of `row_cutoff`, close to each other, from a sum of squares in float32; zeros where that cannot be told.
struct Bounds {
  uint32_t low, high;
};

inline Bounds row_cutoff_bounds(float squares, int64_t k, uint32_t absmax, double threshold) {
  const double top = from_bits(absmax);
  // Squares that matter must not leave the range of float32, however many there are.
  if (!(top > 0x1p-40 && top < 0x1p50)) return {};
  // Relative: each lane sums 1 / (2 * VL) of the elements, and the definition rounds squares to units of 2**-35 *
  // 4**exponent, where the sum is at least 4**(exponent - 1) and the cutoff's square threshold**2 / k of it.
  const double factor = threshold * threshold;
  const double error = double(k / (2 * VL) + 2 * VL + 4) * 0x1p-24 + double(k) * 0x1p-33 * (1 + 1 / factor);
  if (!(error < 0x1p-8)) return {};
  const double limit = double(squares) / double(k) * factor;
  const double low = __builtin_sqrt(limit * (1 - error)), high = __builtin_sqrt(limit * (1 + error));
  if (low > top) return {INFINITE, INFINITE};
  return {magnitude(float(low)) - 1, high < top ? magnitude(float(high)) + 1 : absmax + 1};
}

// The same under the column policy.
inline uint32_t column_cutoff(double threshold) {
  if (!(threshold > 0)) return INFINITE;
  const uint32_t given = magnitude(float(threshold));
  return given < 1 ? 1 : given > INFINITE ? INFINITE : given;
}

typedef Q Quantized __attribute__((vector_size(sizeof(Q) * VL)));

// Quantizes what is below `cutoff`, and lists the rest. False, and nothing of use, if some of the rest is below `sure`.
inline bool quantize_below(uint32_t cutoff, uint32_t sure, const float* x, int64_t count, uint32_t absmax, Q* q,
                           int32_t* outlier_k, float* outlier_value, RowStatistics* statistics) {
  if (absmax >= cutoff) absmax = largest_to(cutoff - 1, x, count);
  // A row this small counts as zero: 127 / absmax would overflow.
  float top = from_bits(absmax);
  if (top < 0x1p-120f) top = 0;
  const float inverse = top == 0 ? 0.0f : (1.0f / top) * 127.0f;

  const Ints last = Ints{} + int32_t(cutoff - 1);
  Ints sum = {};
  int64_t outliers = 0;
  for (int64_t i = 0; i < count; i += VL) {
    const Ints bits = load<Ints>(x + i);
    const Ints size = bits & 0x7fffffff;
    // Adding 1.5 * 2**23 rounds half to even and leaves the integer in the low bits.
    const Ints rounded = (Ints)((Floats)(bits & (size <= last)) * inverse + 12582912.0f) - 0x4b400000;
    sum += rounded;
    save(q + i, __builtin_convertvector(rounded, Quantized));
    for (uint32_t found = lanes_above(size, last); found; found &= found - 1) {
      const int64_t at = i + __builtin_ctz(found);
      if (magnitude(x[at]) < sure) return false;
      outlier_k[outliers] = int32_t(at);
      outlier_value[outliers++] = x[at];
    }
  }
  int32_t total = 0;
  for (int lane = 0; lane < VL; ++lane) total += sum[lane];
  *statistics = {top / 127.0f, total, outliers};
  return true;
}

// x is padded with zeros to a multiple of LANES, which is one of VL.
RowStatistics quantize(const float* x, int64_t k, int64_t k_padded, Split split, void* result, int32_t* outlier_k,
                       float* outlier_value) {
  Q* q = static_cast<Q*>(result);
  const int64_t count = (k + LANES - 1) / LANES * LANES;
  std::memset(q + count, 0, (k_padded - count) * sizeof(Q));
  float squares;
  uint32_t absmax = largest_and_squares(x, count, &squares);
  const bool all_finite = absmax < INFINITE;
  if (!all_finite) absmax = largest_to(INFINITE - 1, x, count);
  uint32_t cutoff = INFINITE;
  RowStatistics statistics;
  if (split.policy == Policy::column) {
    cutoff = column_cutoff(split.threshold);
  } else if (split.threshold > 0) {
    const Bounds bounds = all_finite ? row_cutoff_bounds(squares, k, absmax, split.threshold) : Bounds{};
    // Where nothing lies between them, which is nearly always, either is as good as what it bounds.
    if (bounds.low &&
        quantize_below(bounds.low, bounds.high, x, count, absmax, q, outlier_k, outlier_value, &statistics)) {
      return statistics;
    }
    cutoff = row_cutoff(x, k, count, absmax, all_finite, split.threshold);
  }
  quantize_below(cutoff, cutoff, x, count, absmax, q, outlier_k, outlier_value, &statistics);
  return statistics;
}

void flag_outliers(const float* x, int64_t count, double threshold, unsigned char* flags) {
  const int32_t cutoff = int32_t(column_cutoff(threshold));
  for (int64_t i = 0; i < count; ++i) flags[i] |= int32_t(magnitude(x[i])) >= cutoff;
}

void residual(const float* x, const void* quantized, float scale, const int32_t* columns, int64_t count,
              float* result) {
  const Q* q = static_cast<const Q*>(quantized);
  for (int64_t i = 0; i < count; ++i) {
    const float part = scale * float(q[columns[i]]);
    result[i] = x[columns[i]] - part;
  }
}

// See FixedPointRows, and `fixed_point_rows` of the reference.
double quantize_digits(const float* x, int64_t k, int64_t k_padded, int64_t stride, void* result, int32_t* sum) {
  Q* q = static_cast<Q*>(result);
  const int64_t count = (k + LANES - 1) / LANES * LANES;
  const uint32_t absmax = largest_to(0x7fffffffu, x, count);
  if (absmax >= INFINITE) {
    for (int digit = 0; digit < DIGITS; ++digit) {
      std::memset(q + digit * stride, 0, k_padded * sizeof(Q));
      sum[digit] = 0;
    }
    return __builtin_nan("");
  }
  // absmax < 2**exponent; a zero row has exponent 0.
  const int64_t exponent = absmax ? ((bits_of(from_bits(absmax)) >> 52) & 0x7ff) - 1022 : 0;
  const double unit = double_from_bits((1023 + exponent - 22) << 52);
  const double inverse = double_from_bits((1023 - exponent + 22) << 52);
  typedef Q FewQuantized __attribute__((vector_size(sizeof(Q) * DL)));
  FewInts sums[DIGITS] = {};
  for (int64_t i = 0; i < count; i += DL) {
    // Adding 1.5 * 2**52 rounds half to even and leaves the integer in the low bits.
    const Doubles rounded = widen(load<FewFloats>(x + i)) * inverse + 1.5 * 0x1p52;
    FewInts rest = __builtin_convertvector((Longs)rounded, FewInts);
    for (int digit = 0; digit < DIGITS; ++digit) {
      const FewInts low = (rest << 24) >> 24;
      rest = (rest - low) >> 8;
      sums[digit] += low;
      save(q + digit * stride + i, __builtin_convertvector(low, FewQuantized));
    }
  }
  for (int digit = 0; digit < DIGITS; ++digit) {
    std::memset(q + digit * stride + count, 0, (k_padded - count) * sizeof(Q));
    sum[digit] = 0;
    for (int lane = 0; lane < DL; ++lane) sum[digit] += sums[digit][lane];
  }
  return unit;
}
