// From rows to integers: fixed point, rotation, grid. Included by tiles.h, inside a variant's anonymous namespace.
// int8compile/ops/reference.py is the definition (`fixed_point`, `quantize_rows`, `quantize_weight`).

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

constexpr uint32_t INFINITE = 0x7f800000u;
// A row whose largest element is below 2**-100 counts as zero, and a weight's row below 2**-120.
constexpr uint32_t TINY = (127u - 100) << 23, TINY_WEIGHT = (127u - 120) << 23;
constexpr int BITS = 22;
// The sum of MAGIC and a float32 of up to 2**22 is rounded half to even, to an integer in the low bits.
constexpr float MAGIC = 12582912.0f;
constexpr int32_t MAGIC_BITS = 0x4b400000;

inline Ints to_ints(Floats x) { return (Ints)(x + MAGIC) - MAGIC_BITS; }

// The layout of a row's integers in their buffer. Runs of C = K / B elements are padded with zeros to whole vectors, so
// that butterflies never need a part of a vector.
struct Layout {
  int64_t runs, length, padded;  // one run if there is no padding
  int64_t count;                 // of elements, with padding
  int64_t distance;              // of neighbouring runs of C; the whole row if it is not rotated
};

inline int64_t whole_vectors(int64_t count) { return (count + VL - 1) / VL * VL; }

inline Layout layout_of(const Row& row) {
  const int64_t run = row.k / row.rotation, padded = whole_vectors(run);
  if (run == padded) return {1, row.k, row.k, row.k, run};
  return {row.rotation, run, padded, row.rotation * padded, padded};
}

template <Dtype D>
inline Floats load_floats(const void* from) {
  if constexpr (D == Dtype::float32) {
    return load<Floats>(from);
  } else {
    const Words half = __builtin_convertvector(load<Halves>(from), Words);
    if constexpr (D == Dtype::bfloat16) return (Floats)(half << 16);
    // In float32's fields the exponent is 112 too small. The product corrects it, and normalizes subnormals exactly.
    const Words moved = (half & 0x7fff) << 13;
    const Words finite = (Words)((Floats)moved * 0x1p112f);
    const Ints special = (Ints)moved >= (0x7c00 << 13);
    return (Floats)((finite | ((Words)special & INFINITE)) | (half & 0x8000) << 16);
  }
}

// Writes a row times d in its layout. Returns the bits of the largest magnitude, which are ordered as integers.
template <Dtype D, bool HAS_D>
uint32_t products(const Row& row, const Layout& layout, int32_t* to) {
  constexpr int64_t BYTES = D == Dtype::float32 ? 4 : 2;
  const char* x = static_cast<const char*>(row.x);
  Ints best = {};
  auto take = [&](const void* from, const float* d, Ints mask) __attribute__((always_inline)) {
    Floats value = load_floats<D>(from);
    if (HAS_D) value *= load<Floats>(d);
    const Ints bits = (Ints)value & mask, size = bits & 0x7fffffff;
    best = best > size ? best : size;
    save(to, bits);
    to += VL;
  };
  const Ints all = ~Ints{};
  Ints rest = {};
  for (int lane = 0; lane < VL; ++lane) rest[lane] = lane < layout.length % VL ? -1 : 0;
  int64_t at = 0;
  for (int64_t run = 0; run < layout.runs; ++run) {
    const int64_t end = at + layout.length;
    for (; at + VL <= end; at += VL) take(x + at * BYTES, HAS_D ? row.d + at : nullptr, all);
    if (at == end) continue;
    if (at + VL <= row.k) {
      take(x + at * BYTES, HAS_D ? row.d + at : nullptr, rest);
    } else {  // Nothing may be read beyond the row.
      char last[VL * BYTES] = {};
      float last_d[VL] = {};
      std::memcpy(last, x + at * BYTES, (row.k - at) * BYTES);
      if (HAS_D) std::memcpy(last_d, row.d + at, (row.k - at) * 4);
      take(last, last_d, rest);
    }
    at = end;
  }
  int32_t result = 0;
  for (int lane = 0; lane < VL; ++lane) result = result > best[lane] ? result : best[lane];
  return uint32_t(result);
}

template <Dtype D>
inline uint32_t products_of(const Row& row, const Layout& layout, int32_t* to) {
  return row.d ? products<D, true>(row, layout, to) : products<D, false>(row, layout, to);
}

inline uint32_t products(const Row& row, const Layout& layout, int32_t* to) {
  switch (row.dtype) {
    case Dtype::float32:
      return products_of<Dtype::float32>(row, layout, to);
    case Dtype::bfloat16:
      return products_of<Dtype::bfloat16>(row, layout, to);
    default:
      return products_of<Dtype::float16>(row, layout, to);
  }
}

// The largest magnitude of integers, and the sum of all magnitudes. Each lane adds lower and upper halves separately,
// less than 2**16 of them.
struct Sizes {
  Ints largest = {};
  Words low = {}, high = {};

  inline void take(Ints x) {
    const Ints size = x < 0 ? -x : x;
    largest = largest > size ? largest : size;
    low += (Words)size & 0xffffu;
    high += (Words)size >> 16;
  }
};

// Computes butterflies of R elements at `distance` and at twice, four times, ... this distance. FIRST: the row is in
// floats and becomes integers, times `up`. LAST: `sizes` gets the sizes of the results.
template <int R, typename V, bool FIRST, bool LAST>
inline void pass(int32_t* row, int64_t count, int64_t distance, float up, Sizes& sizes) {
  Sizes found = sizes;
  for (int64_t block = 0; block < count; block += R * distance) {
    for (int32_t* at = row + block; at < row + block + distance; at += VL) {
      V x[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        if constexpr (FIRST) {
          x[r] = to_ints(load<Floats>(at + r * distance) * up);
        } else {
          x[r] = load<V>(at + r * distance);
        }
      }
#pragma GCC unroll 16
      for (int bit = 1; bit < R; bit *= 2) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          if (r & bit) continue;
          const V u = x[r], v = x[r + bit];
          x[r] = u + v;
          x[r + bit] = u - v;
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        if constexpr (LAST) found.take(x[r]);
        save(at + r * distance, x[r]);
      }
    }
  }
  if (LAST) sizes = found;
}

// As many stages at once as registers allow.
constexpr int MOST_STAGES = VL == 16 ? 4 : 3;

template <typename V, bool FIRST, bool LAST>
void stages_of(int stages, int32_t* row, int64_t count, int64_t distance, float up, Sizes& sizes) {
  switch (stages) {
    case 0:
      return pass<1, V, FIRST, LAST>(row, count, count, up, sizes);
    case 1:
      return pass<2, V, FIRST, LAST>(row, count, distance, up, sizes);
    case 2:
      return pass<4, V, FIRST, LAST>(row, count, distance, up, sizes);
    case 3:
      return pass<8, V, FIRST, LAST>(row, count, distance, up, sizes);
    default:
      if constexpr (MOST_STAGES >= 4) pass<16, V, FIRST, LAST>(row, count, distance, up, sizes);
  }
}

inline int next_stages(int64_t rotation) {
  int stages = 0;
  while (stages < MOST_STAGES && rotation > int64_t(1) << stages) ++stages;
  return stages;
}

// A rotated row as integers of 22 bits and a sign.
struct FixedPoint {
  float unit;       // of the integers; NaN where the row has NaN or Inf, 0 where it counts as zero
  int32_t largest;  // 0 in both cases, in which the integers are not valid
  int64_t total;    // of magnitudes
};

FixedPoint fixed_point(const Row& row, const Layout& layout, int32_t* integers) {
  const uint32_t top = products(row, layout, integers);
  if (top >= INFINITE) return {__builtin_nanf(""), 0, 0};
  if (top < TINY) return {0, 0, 0};
  const uint32_t exponent = (top >> 23) - 126 + 127;  // of p, which is the row's
  const float up = from_bits((127 + BITS + 127 - exponent) << 23), unit = from_bits((exponent - BITS) << 23);
  Sizes sizes;
  int64_t rotation = row.rotation, distance = layout.distance;
  bool first = true, last;
  do {
    const int stages = next_stages(rotation);
    rotation >>= stages;
    last = rotation == 1;
    auto run = first ? (last ? stages_of<Ints, true, true> : stages_of<Ints, true, false>)
                     : (last ? stages_of<Ints, false, true> : stages_of<Ints, false, false>);
    run(stages, integers, layout.count, distance, up, sizes);
    distance <<= stages;
    first = false;
  } while (!last);
  FixedPoint result = {unit, 0, 0};
  uint64_t low = 0, high = 0;
  for (int lane = 0; lane < VL; ++lane) {
    result.largest = result.largest > sizes.largest[lane] ? result.largest : sizes.largest[lane];
    low += sizes.low[lane];
    high += sizes.high[lane];
  }
  result.total = int64_t(low + (high << 16));
  return result;
}

// Calls take(vector, first) for all elements, in the row's order. A run's last vector has zeros beyond its end. Results
// for these are overwritten by the next run.
template <typename F>
inline void each_vector(const Layout& layout, const int32_t* integers, const F& take) {
  int64_t at = 0;
  for (int64_t run = 0; run < layout.runs; ++run) {
    const int64_t end = at + layout.length;
    for (; at < end; at += VL, integers += VL) take(load<Ints>(integers), at);
    at = end;
  }
}

typedef Q Quantized __attribute__((vector_size(sizeof(Q) * VL)));

// Saves the low bytes of a vector, or the first `room` of them.
inline void save_quantized(Q* to, Ints value, int64_t room) {
  const Quantized narrow = __builtin_convertvector(value, Quantized);
  if (__builtin_expect(room >= VL, 1)) {
    save(to, narrow);
  } else {
    std::memcpy(to, &narrow, room * sizeof(Q));
  }
}

inline void zero_rest(Q* q, const Row& row) { std::memset(q + row.k, 0, (row.k_padded - row.k) * sizeof(Q)); }

inline int32_t sum_of(Ints values) {
  int32_t sum = 0;
  for (int lane = 0; lane < VL; ++lane) sum += values[lane];
  return sum;
}

// Variants define lanes_above(a, b): a bit for each lane of `a` that is larger than in `b`.

template <bool HAS_OUTLIERS>
inline RowStatistics on_grid(const Row& row, const Layout& layout, const int32_t* integers, float inverse, Q* q,
                             Outlier* outliers) {
  Ints sum = {};
  int64_t count = 0;
  each_vector(layout, integers, [&](Ints value, int64_t at) __attribute__((always_inline)) {
    const Ints rounded = to_ints(__builtin_convertvector(value, Floats) * inverse);
    sum += rounded;
    if (!HAS_OUTLIERS) return save_quantized(q + at, rounded, row.k_padded - at);
    const Ints low = (rounded << 24) >> 24, rest = rounded - low;
    save_quantized(q + at, low, row.k_padded - at);
    for (uint32_t found = lanes_above(Ints{}, rest != 0); found; found &= found - 1) {
      const int lane = __builtin_ctz(found);
      const int32_t k = int32_t(at + lane), group = k / GROUP * GROUP;
      if (!count || outliers[count - 1].k != group) outliers[count++] = {group, {}};
      outliers[count - 1].digits[k - group] = int8_t(rest[lane] >> 8);
    }
  });
  zero_rest(q, row);
  return {0, sum_of(sum), count};
}

RowStatistics quantize(const Row& row, float mean_factor, int32_t* integers, void* result, Outlier* outliers) {
  Q* q = static_cast<Q*>(result);
  const Layout layout = layout_of(row);
  const FixedPoint fixed = fixed_point(row, layout, integers);
  if (!fixed.largest) {
    std::memset(q, 0, row.k_padded * sizeof(Q));
    return {fixed.unit, 0, 0};
  }
  const float top = float(fixed.largest);
  const float of_largest = top * float(1.0 / 127), of_mean = float(fixed.total) * mean_factor;
  const float smallest = top * float(1.0 / 32639);
  const float wanted = of_largest < of_mean ? of_largest : of_mean;
  const float step = wanted > smallest ? wanted : smallest, inverse = 1.0f / step;
  // Rounding is monotonic, so the largest element decides.
  const bool has_outliers = top * inverse > 127.5f;
  RowStatistics statistics = has_outliers ? on_grid<true>(row, layout, integers, inverse, q, outliers)
                                          : on_grid<false>(row, layout, integers, inverse, q, outliers);
  statistics.scale = step * fixed.unit;
  return statistics;
}

// Writes digits to base 256, from the lowest on, each a row of `stride` elements. Returns the unit.
float quantize_digits(const Row& row, int64_t digits, int64_t stride, int32_t* integers, void* result, int32_t* sum) {
  Q* q = static_cast<Q*>(result);
  const Layout layout = layout_of(row);
  const FixedPoint fixed = fixed_point(row, layout, integers);
  for (int64_t digit = 0; digit < digits; ++digit, q += stride) {
    Ints total = {};
    if (fixed.largest) {
      int32_t* rest = integers;  // in the order of each_vector
      each_vector(layout, integers, [&](Ints value, int64_t at) __attribute__((always_inline)) {
        const Ints low = (value << 24) >> 24;
        total += low;
        save_quantized(q + at, low, row.k_padded - at);
        save(rest, (value - low) >> 8);
        rest += VL;
      });
      zero_rest(q, row);
    } else {
      std::memset(q, 0, row.k_padded * sizeof(Q));
    }
    sum[digit] = sum_of(total);
  }
  return fixed.unit;
}

// Quantizes a weight's row, multiplied by row.d and rotated. Returns the scale, NaN if a result is NaN or Inf.
float quantize_weight(const Row& row, int32_t* floats, void* result) {
  Q* q = static_cast<Q*>(result);
  const Layout layout = layout_of(row);
  uint32_t top = products(row, layout, floats);
  Sizes unused;
  int64_t distance = layout.distance;
  for (int64_t rotation = row.rotation; rotation > 1;) {
    const int stages = next_stages(rotation);
    stages_of<Floats, false, false>(stages, floats, layout.count, distance, 0, unused);
    distance <<= stages;
    rotation >>= stages;
  }
  if (row.rotation > 1) {
    Ints best = {};
    for (int64_t i = 0; i < layout.count; i += VL) {
      const Floats value = load<Floats>(floats + i) * (1.0f / float(row.rotation));
      const Ints size = (Ints)value & 0x7fffffff;
      best = best > size ? best : size;
      save(floats + i, value);
    }
    top = 0;
    for (int lane = 0; lane < VL; ++lane) top = top > uint32_t(best[lane]) ? top : uint32_t(best[lane]);
  }
  if (top >= INFINITE || top < TINY_WEIGHT) {
    std::memset(q, 0, row.k_padded * sizeof(Q));
    return top >= INFINITE ? __builtin_nanf("") : 0;
  }
  const float absmax = from_bits(top), inverse = (1.0f / absmax) * 127.0f;
  each_vector(layout, floats, [&](Ints value, int64_t at) __attribute__((always_inline)) {
    save_quantized(q + at, to_ints((Floats)value * inverse), row.k_padded - at);
  });
  zero_rest(q, row);
  return absmax / 127.0f;
}
