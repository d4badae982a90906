// Row statistics and quantization, in C++ that compilers vectorize for the flags a variant is built with. Included by
// every variant inside its own anonymous namespace.

// Bits of a float32 without its sign. They order magnitudes as integers do.
inline uint32_t magnitude(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x7fffffffu;
}

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
    uint32_t bits;
    std::memcpy(&bits, &finite, 4);
    bits = (half[i] & 0x7fffu) >= 0x7c00u ? (moved | INFINITE) : bits;
    result[i] = from_bits(bits | (uint32_t(half[i] & 0x8000u) << 16));
  }
}

// Whether any lane is not zero.
inline bool any(Words mask) {
  typedef uint64_t Longs __attribute__((vector_size(4 * LANES)));
  const Longs words = (Longs)mask;
  uint64_t all = 0;
  for (int i = 0; i < LANES / 2; ++i) all |= words[i];
  return all != 0;
}

inline Words magnitudes(const float* x) { return load<Words>(x) & 0x7fffffffu; }

inline uint32_t largest(Ints values) {
  int32_t best = 0;
  for (int i = 0; i < LANES; ++i) best = best > values[i] ? best : values[i];
  return uint32_t(best);
}

// The largest magnitude up to `limit`. Magnitudes are positive as int32 too, whose maximum every instruction set has.
inline uint32_t largest_to(uint32_t limit, const float* x, int64_t count) {
  Ints best = {};
  for (int64_t i = 0; i < count; i += LANES) {
    const Ints bits = (Ints)magnitudes(x + i);
    const Ints counted = bits <= int32_t(limit) ? bits : Ints{};
    best = best > counted ? best : counted;
  }
  return largest(best);
}

// The sum of squares in units of 2**-35, each rounded to one, of x * scale, all below 1. Adding MAGIC rounds, and as
// integers the results are summed exactly.
constexpr double MAGIC = 1.5 * 0x1p17;

template <bool ALL_FINITE>
inline int64_t sum_of_squares(const float* x, int64_t count, double scale) {
  typedef int64_t Longs __attribute__((vector_size(8 * LANES)));
  Longs sum = {};
  for (int64_t i = 0; i < count; i += LANES) {
    Floats values = load<Floats>(x + i);
    if (!ALL_FINITE) {
      const Words bits = (Words)values;
      values = (Floats)((bits & 0x7fffffffu) < INFINITE ? bits : Words{});
    }
    const Doubles scaled = __builtin_convertvector(values, Doubles) * scale;
    sum += (Longs)(scaled * scaled + MAGIC);
  }
  int64_t total = 0;
  for (int i = 0; i < LANES; ++i) total += sum[i];
  // Wraps around and back.
  return total - count * bits_of(MAGIC);
}

// The smallest magnitude that is an outlier of its row under the row policy (`fixed_point_squares` of the reference).
// The test is monotonic in |x|, so a row needs one number, found by a search around its approximate value.
uint32_t row_cutoff(const float* x, int64_t k, int64_t count, uint32_t absmax, bool all_finite, double threshold) {
  if (absmax == 0) return INFINITE;
  const double top = from_bits(absmax);
  const int64_t exponent = ((bits_of(top) >> 52) & 0x7ff) - 1022;
  const double scale = double_from_bits((1023 - exponent) << 52);
  const int64_t sum = all_finite ? sum_of_squares<true>(x, count, scale) : sum_of_squares<false>(x, count, scale);
  const double limit = (double(sum) * 0x1p-35) * (threshold * threshold);
  auto is_outlier = [&](uint32_t bits) {
    const double scaled = double(from_bits(bits)) * scale;
    return ((scaled * scaled + MAGIC) - MAGIC) * double(k) >= limit;
  };
  if (!is_outlier(absmax)) return INFINITE;
  const double guess = __builtin_sqrt(limit / double(k)) / scale;
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

typedef Q Quantized __attribute__((vector_size(sizeof(Q) * LANES)));

RowStatistics quantize(const float* x, int64_t k, int64_t k_padded, Split split, void* result, int32_t* outlier_k,
                       float* outlier_value) {
  Q* q = static_cast<Q*>(result);
  const int64_t count = (k + LANES - 1) / LANES * LANES;
  uint32_t absmax = largest_to(0x7fffffffu, x, count);
  const bool all_finite = absmax < INFINITE;
  if (!all_finite) absmax = largest_to(INFINITE - 1, x, count);
  uint32_t cutoff = INFINITE;
  if (split.threshold > 0 && split.policy == Policy::column) {
    cutoff = magnitude(float(split.threshold));
    cutoff = cutoff < 1 ? 1 : cutoff > INFINITE ? INFINITE : cutoff;
  } else if (split.threshold > 0) {
    cutoff = row_cutoff(x, k, count, absmax, all_finite, split.threshold);
  }
  if (absmax >= cutoff) absmax = largest_to(cutoff - 1, x, count);
  // A row this small counts as zero: 127 / absmax would overflow.
  float top = from_bits(absmax);
  if (top < 0x1p-120f) top = 0;
  const float inverse = top == 0 ? 0.0f : (1.0f / top) * 127.0f;

  Ints sum = {};
  int64_t outliers = 0;
  constexpr int BLOCK = 4;  // vectors that are asked together whether they have an outlier
  for (int64_t begin = 0; begin < count; begin += BLOCK * LANES) {
    const int64_t end = begin + BLOCK * LANES < count ? begin + BLOCK * LANES : count;
    Words found = {};
    for (int64_t i = begin; i < end; i += LANES) {
      const Floats values = load<Floats>(x + i);
      const Words outlier = (Words)(((Words)values & 0x7fffffffu) >= cutoff);
      found |= outlier;
      const Floats kept = (Floats)((Words)values & ~outlier);
      // Adding 1.5 * 2**23 rounds half to even and leaves the integer in the low bits.
      const Ints rounded = (Ints)(kept * inverse + 12582912.0f) - 0x4b400000;
      sum += rounded;
      const Quantized narrow = __builtin_convertvector(rounded, Quantized);
      std::memcpy(q + i, &narrow, sizeof(narrow));
    }
    if (!any(found)) continue;
    for (int64_t i = begin; i < end; i += LANES) {
      if (!any((Words)(magnitudes(x + i) >= cutoff))) continue;
      for (int lane = 0; lane < LANES; ++lane) {
        if (magnitude(x[i + lane]) < cutoff) continue;
        outlier_k[outliers] = int32_t(i + lane);
        outlier_value[outliers++] = x[i + lane];
      }
    }
  }
  std::memset(q + count, 0, (k_padded - count) * sizeof(Q));
  int32_t total = 0;
  for (int i = 0; i < LANES; ++i) total += sum[i];
  return {top / 127.0f, total, outliers};
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
  typedef int64_t Longs __attribute__((vector_size(8 * LANES)));
  Ints sums[DIGITS] = {};
  for (int64_t i = 0; i < count; i += LANES) {
    // Adding 1.5 * 2**52 rounds half to even and leaves the integer in the low bits.
    const Doubles rounded = __builtin_convertvector(load<Floats>(x + i), Doubles) * inverse + 1.5 * 0x1p52;
    Ints rest = __builtin_convertvector((Longs)rounded, Ints);
    for (int digit = 0; digit < DIGITS; ++digit) {
      const Ints low = (rest << 24) >> 24;
      rest = (rest - low) >> 8;
      sums[digit] += low;
      const Quantized narrow = __builtin_convertvector(low, Quantized);
      std::memcpy(q + digit * stride + i, &narrow, sizeof(narrow));
    }
  }
  for (int digit = 0; digit < DIGITS; ++digit) {
    std::memset(q + digit * stride + count, 0, (k_padded - count) * sizeof(Q));
    sum[digit] = 0;
    for (int i = 0; i < LANES; ++i) sum[digit] += sums[digit][i];
  }
  return unit;
}
