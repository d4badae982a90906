// A program without torch that checks the kernel variants of a machine, real or emulated. It compares the integer
// product with a plain loop, and all results of each variant with those of the portable variant, bit for bit. Its last
// line has a digest of the results, which is the same on all architectures and for all compilers.
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "linear.h"

using namespace int8compile;

namespace {

uint64_t state;

uint32_t random_bits() {  // splitmix64
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return uint32_t((z ^ (z >> 31)) >> 16);
}

uint32_t random_below(uint32_t limit) { return random_bits() % limit; }

// As in PyTorch: an empty tensor's address is null.
template <typename T>
T* address(std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

template <typename T>
const T* address(const std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Runs pieces, the last one first.
void parallel_for(int64_t begin, int64_t end, int64_t grain, Body run, void* context) {
  const int64_t step = grain > 1 ? grain : 1;
  const int64_t pieces = (end - begin + step - 1) / step;
  for (int64_t i = pieces - 1; i >= 0; --i) {
    const int64_t from = begin + i * step;
    run(from, from + step < end ? from + step : end, context);
  }
}

constexpr Dtype DTYPES[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};

const char* name_of(Dtype dtype) {
  return dtype == Dtype::float32 ? "float32" : dtype == Dtype::bfloat16 ? "bfloat16" : "float16";
}

// The format of a dtype's values.
struct Format {
  int bytes, mantissa_bits, bias;
  uint32_t infinity;
};

Format format_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::bfloat16:
      return {2, 7, 127, 0x7f80};
    case Dtype::float16:
      return {2, 10, 15, 0x7c00};
    default:
      return {4, 23, 127, 0x7f800000};
  }
}

using Bytes = std::vector<unsigned char>;

void put(Bytes& bytes, int64_t index, const Format& format, uint32_t value) {
  const uint16_t narrow = uint16_t(value);
  if (format.bytes == 4) {
    std::memcpy(&bytes[4 * index], &value, 4);
  } else {
    std::memcpy(&bytes[2 * index], &narrow, 2);
  }
}

// Returns the bits of an element, the same for all NaN, whose sign and payload depend on the machine.
uint32_t get(const Bytes& bytes, int64_t index, const Format& format) {
  uint32_t value = 0;
  std::memcpy(&value, &bytes[format.bytes * index], format.bytes);
  const uint32_t sign = 1u << (8 * format.bytes - 1);
  return (value & ~sign) > format.infinity ? format.infinity + 1 : value;
}

enum class Kind { usual, outliers, wide, subnormal, inf, nan, zero };
constexpr int KINDS = 7;

// Makes rows of all kinds in turn, beginning with `first`.
Bytes activations(int64_t m, int64_t k, Dtype dtype, int first) {
  const Format format = format_of(dtype);
  Bytes x(m * k * format.bytes);
  for (int64_t row = 0; row < m; ++row) {
    const Kind kind = Kind((first + row) % KINDS);
    for (int64_t i = 0; i < k; ++i) {
      const uint32_t sign = random_below(2) << (8 * format.bytes - 1);
      const uint32_t mantissa = random_bits() & ((1u << format.mantissa_bits) - 1);
      int exponent = -int(random_below(4));
      if (kind == Kind::outliers && random_below(20) == 0) exponent = 5;
      if (kind == Kind::wide) exponent = int(random_below(20)) - 10;
      if (kind == Kind::subnormal) exponent = -format.bias + int(random_below(2));
      uint32_t value = sign | uint32_t(exponent + format.bias) << format.mantissa_bits | mantissa;
      if (kind == Kind::zero) value = sign;
      put(x, row * k + i, format, value);
    }
    if (kind == Kind::inf && k) put(x, row * k + random_below(uint32_t(k)), format, format.infinity);
    if (kind == Kind::nan && k) put(x, row * k + random_below(uint32_t(k)), format, format.infinity + 1);
  }
  return x;
}

// Values of two rows with the largest sums, without and with the weights' offset.
int extreme(int64_t row, int64_t i, int least) { return row == 0 && i % 2 == 0 ? least : 127; }

// A weight, packed as in kernel.h.
struct Matrix {
  int64_t n, k;
  std::vector<int8_t> q;
  std::vector<uint8_t> packed;
  std::vector<float> scale, bias;

  Matrix(int64_t n_, int64_t k_, bool with_bias) : n(n_), k(k_), q(n * k), scale(n) {
    const int64_t groups = (k + K_STEP - 1) / K_STEP * (K_STEP / GROUP);
    packed.assign((n + LANES - 1) / LANES * groups * LANES * GROUP, 0x80);
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t i = 0; i < k; ++i) {
        const int value = row < 2 ? extreme(row, i, -128) : int(random_below(256)) - 128;
        q[row * k + i] = int8_t(value);
        packed[((row / LANES * groups + i / GROUP) * LANES + row % LANES) * GROUP + i % GROUP] = uint8_t(value + 128);
      }
      scale[row] = from_bits(0x3c000000u | (random_bits() & 0x7fffff));
    }
    if (with_bias) {
      for (int64_t row = 0; row < n; ++row) bias.push_back(float(int(random_below(2001)) - 1000) / 64);
    }
  }

  Weight weight() const { return {address(packed), address(scale), address(bias), n}; }
  // The weight that is not packed, which every call packs.
  Weight rows() const { return {nullptr, address(scale), address(bias), n, address(q)}; }
};

// Elements of an output row beyond its n, which must not be written.
constexpr int64_t MARGIN = 3;
constexpr unsigned char UNTOUCHED = 0xa5;

struct Result {
  int64_t m, n;
  Dtype dtype;
  Bytes bytes;

  Result(int64_t m_, int64_t n_, Dtype dtype_)
      : m(m_), n(n_), dtype(dtype_), bytes(m * (n + MARGIN) * format_of(dtype).bytes, UNTOUCHED) {}
  Output output() { return {address(bytes), n + MARGIN, dtype}; }
  uint32_t at(int64_t row, int64_t column) const { return get(bytes, row * (n + MARGIN) + column, format_of(dtype)); }
};

struct Counts {
  int64_t integer = 0, compared = 0;
  uint64_t digest = 0xcbf29ce484222325u;  // FNV-1a
};

bool same(const Result& found, const Result& expected, const char* variant, const std::string& what) {
  for (int64_t row = 0; row < expected.m; ++row) {
    for (int64_t i = 0; i < expected.n + MARGIN; ++i) {
      if (found.at(row, i) == expected.at(row, i)) continue;
      std::printf("check: %s differs from portable: %s: y[%" PRId64 "][%" PRId64 "] is 0x%x instead of 0x%x\n", variant,
                  what.c_str(), row, i, found.at(row, i), expected.at(row, i));
      return false;
    }
  }
  return true;
}

bool in_bounds(const Result& result, const std::string& what) {
  const int bytes = format_of(result.dtype).bytes;
  for (int64_t row = 0; row < result.m; ++row) {
    const unsigned char* margin = &result.bytes[(row * (result.n + MARGIN) + result.n) * bytes];
    for (int64_t i = 0; i < MARGIN * bytes; ++i) {
      if (margin[i] == UNTOUCHED) continue;
      std::printf("check: portable: %s: row %" PRId64 " is written beyond its end\n", what.c_str(), row);
      return false;
    }
  }
  return true;
}

// Calls `compute(variant, results)` with every variant and compares.
template <typename F>
bool all_agree(const std::vector<const Variant*>& variants, const std::vector<Result>& empty, const std::string& what,
               Counts& counts, const F& compute) {
  std::vector<Result> expected = empty;
  compute(*variants.back(), expected);
  for (const Result& each : expected) {
    if (!in_bounds(each, what)) return false;
    for (int64_t row = 0; row < each.m; ++row) {
      for (int64_t i = 0; i < each.n; ++i) counts.digest = (counts.digest ^ each.at(row, i)) * 0x100000001b3u;
    }
  }
  for (size_t v = 0; v + 1 < variants.size(); ++v) {
    std::vector<Result> found = empty;
    compute(*variants[v], found);
    for (size_t i = 0; i < found.size(); ++i) {
      if (!same(found[i], expected[i], variants[v]->name, what)) return false;
    }
  }
  counts.compared += int64_t(expected.size() * (variants.size() - 1));
  return true;
}

// Rows of int8 values with a 127 among them have scale 1, so that y is the int32 sum, as a float.
bool integers_are_exact(const Variant& variant, int64_t m, int64_t k, int64_t n, Counts& counts) {
  Matrix matrix(n, k, false);
  matrix.scale.assign(n, 1.0f);
  std::vector<float> x(m * k);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t i = 0; i < k; ++i) x[row * k + i] = float(int(random_below(255)) - 127);
    if (k) x[row * k + random_below(uint32_t(k))] = random_below(2) ? 127 : -127;
  }
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t row = 0; row < 2 && row < m; ++row) x[row * k + i] = float(extreme(row, i, -127));
  }
  Result result(m, n, Dtype::float32);
  const Weight weight = matrix.weight();
  const Output output = result.output();
  linear(variant, {address(x), Dtype::float32, m, k}, nullptr, 0.0, &weight, &output, 1, parallel_for);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t column = 0; column < n; ++column) {
      int32_t acc = 0;
      for (int64_t i = 0; i < k; ++i) acc += int32_t(x[row * k + i]) * matrix.q[column * k + i];
      const float y = from_bits(result.at(row, column));
      if (y == float(acc)) continue;
      std::printf("check: %s: m=%" PRId64 " k=%" PRId64 " n=%" PRId64 ": the integer product [%" PRId64 "][%" PRId64
                  "] is %.9g instead of %d\n",
                  variant.name, m, k, n, row, column, double(y), int(acc));
      return false;
    }
  }
  ++counts.integer;
  return true;
}

// Factors of inputs that rotate them.
std::vector<float> factors(int64_t k) {
  std::vector<float> d(k);
  for (float& each : d) each = from_bits(random_below(2) << 31 | (0x3e800000u + (random_bits() & 0x1ffffff)));
  return d;
}

bool floats_agree(const std::vector<const Variant*>& variants, int64_t m, int64_t k, int64_t n, Dtype dtype, int first,
                  Counts& counts) {
  const Bytes data = activations(m, k, dtype, first);
  const Activations x = {address(data), dtype, m, k};
  const Matrix matrices[] = {Matrix(n, k, true), Matrix(n / 2 + 1, k, false), Matrix(LANES, k, true)};
  char sizes[100];
  std::snprintf(sizes, sizeof(sizes), "m=%" PRId64 " k=%" PRId64 " n=%" PRId64 " %s", m, k, n, name_of(dtype));
  const std::vector<float> d = factors(k);
  for (const bool rotated : {false, true}) {
    const float* given = rotated ? d.data() : nullptr;
    const std::string how = std::string(sizes) + (rotated ? ", rotated" : "");
    for (const double threshold : {0.0, 1.0, 2.5, 12.0}) {
      char what[200];
      std::snprintf(what, sizeof(what), "%s, threshold %g", how.c_str(), threshold);
      std::vector<Result> results;
      std::vector<Weight> weights;
      for (const Matrix& each : matrices) {
        results.emplace_back(m, each.n, dtype);
        weights.push_back(each.bias.empty() ? each.rows() : each.weight());
      }
      const bool agree = all_agree(variants, results, what, counts, [&](const Variant& variant, auto& made) {
        std::vector<Output> outputs;
        for (Result& each : made) outputs.push_back(each.output());
        linear(variant, x, given, threshold, weights.data(), outputs.data(), int64_t(made.size()), parallel_for);
      });
      if (!agree) return false;
    }
    const Weight weight = matrices[0].weight();
    const bool agree = all_agree(variants, {Result(m, n, dtype)}, how + ", weight-only", counts,
                                 [&](const Variant& variant, auto& made) {
      weight_only_linear(variant, x, given, weight, made[0].output(), parallel_for);
    });
    if (!agree) return false;
  }
  return true;
}

bool quantizes(const std::vector<const Variant*>& variants, int64_t n, int64_t k, Dtype dtype, int first,
               bool rotated) {
  const Bytes data = activations(n, k, dtype, first);
  const std::vector<float> d = factors(k);
  std::vector<int8_t> expected;
  std::vector<float> expected_scale;
  for (size_t v = variants.size(); v-- > 0;) {
    std::vector<int8_t> q(n * k);
    std::vector<float> scale(n);
    quantize_weight(*variants[v], {address(data), dtype, n, k}, rotated ? d.data() : nullptr, address(q),
                    address(scale), parallel_for);
    for (float& each : scale) each = each == each ? each : -1;  // NaN is not equal to itself.
    if (v + 1 == variants.size()) {
      expected = q;
      expected_scale = scale;
    } else if (q != expected || scale != expected_scale) {
      std::printf("check: %s: a weight n=%" PRId64 " k=%" PRId64 " %s%s is quantized differently\n", variants[v]->name,
                  n, k, name_of(dtype), rotated ? ", rotated," : "");
      return false;
    }
  }
  return true;
}

bool packs(int64_t n, int64_t k) {
  const Matrix matrix(n, k, false);
  std::vector<uint8_t> packed(matrix.packed.size());
  pack(address(matrix.q), n, k, address(packed), parallel_for);
  if (packed == matrix.packed) return true;
  std::printf("check: n=%" PRId64 " k=%" PRId64 " is packed wrongly\n", n, k);
  return false;
}

// int8compile.ops.MAX_K: the sums come close to 2**31, and pass it where the weights' offset is still in them.
constexpr int64_t MAX_K = 131071;

struct Shape {
  int64_t m, k, n;
};
// Empty tensors first, when no memory of an earlier call is there; then one row, whole and partial tiles, whole and
// partial lines. Rotations have B from 16 to 128 and runs of 1 to 18.
constexpr Shape SHAPES[] = {{1, 0, 17},   {33, 0, 48},  {0, 64, 17},  {5, 64, 0},
                            {1, 1, 1},    {1, 64, 16},  {1, 700, 90}, {2, 63, 17},   {3, 65, 32},   {4, 128, 200},
                            {5, 100, 33}, {6, 257, 70}, {7, 64, 128}, {13, 300, 47}, {33, 128, 48}, {70, 190, 65},
                            {3, 48, 20},  {2, 96, 5},   {4, 320, 18}, {2, 1024, 16}, {1, 2048, 3},  {2, 2304, 17}};

}  // namespace

int main() {
  std::vector<const Variant*> here;
  std::string names;
  for (const Variant* const* each = variants; *each; ++each) {
    if (!(*each)->runs_here()) continue;
    here.push_back(*each);
    names += std::string(names.empty() ? "" : " ") + (*each)->name;
  }
  Counts counts;
  int first = 0;
  for (const Shape& shape : SHAPES) {
    if (!packs(shape.n, shape.k)) return 1;
    for (const Variant* variant : here) {
      state = uint64_t(shape.m + 1000 * shape.k + 1000000 * shape.n);
      if (!integers_are_exact(*variant, shape.m, shape.k, shape.n, counts)) return 1;
    }
    for (const Dtype dtype : DTYPES) {
      for (const bool rotated : {false, true}) {
        if (!quantizes(here, shape.n, shape.k, dtype, first, rotated)) return 1;
      }
      // A problem of few rows has few kinds of rows.
      for (int again = 0; again < (shape.m < KINDS ? KINDS : 1); ++again) {
        if (!floats_agree(here, shape.m, shape.k, shape.n, dtype, first++, counts)) return 1;
      }
    }
  }
  for (const Variant* variant : here) {
    state = 0;
    if (!integers_are_exact(*variant, 2, MAX_K, LANES, counts)) return 1;
  }
  std::printf("check: %s: %" PRId64 " integer products are exact, %" PRId64
              " results equal the portable ones; digest %016" PRIx64 "\n",
              names.c_str(), counts.integer, counts.compared, counts.digest);
  return 0;
}
