// The CPU kernel's types. Symbols as everywhere: M rows, K inputs, N outputs.
//
// Every variant computes the same numbers, bit for bit: the integer product is exact, and floats are added in an order
// (or with a precision) that does not depend on the variant. int8compile/ops/reference.py is the definition.
//
// The packed weight: panels of LANES outputs; in a panel, for every group of GROUP inputs, LANES * GROUP bytes
//     packed[n / LANES][k / GROUP][n % LANES][k % GROUP] = q[n][k] + 128
// with K padded to a multiple of K_STEP and N to one of LANES. It is what vpdpbusd and AMX read, and what the others
// can read. The weights are unsigned because vpdpbusd takes its signed factor, the activation, from memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace int8compile {

constexpr int LANES = 16;
constexpr int GROUP = 4;
constexpr int K_STEP = 64;
// Rows of the activation buffer that a kernel may read (and ignore) beyond the last one.
constexpr int ROW_PADDING = 32;

enum class Dtype { float32, bfloat16, float16 };
enum class Policy { row, column };

struct Split {
  Policy policy;
  double threshold;
};

// How the products of outliers are summed.
enum class Summation {
  in_float,  // float32 holds every partial sum exactly
  in_two,    // so it does for `value` and for `rest`, which together are the outlier
  in_double,
};

// A row's elements that are multiplied in float, in ascending order of k.
struct Outliers {
  const int32_t* k;
  const float* value;
  const float* rest;
  int64_t count;
  Summation sum;
  // -128 * the sums of value and of rest, which take the offset off the weights (not for in_double).
  float value_offset, rest_offset;
};

// Quantized activations.
struct Rows {
  const void* q;        // [M + ROW_PADDING][stride], of the variant's type
  const float* scale;   // [M]
  const int32_t* sum;   // [M], of q over the row
  const Outliers* outliers;  // [M]
  int64_t k_padded;
  int64_t stride;
};

// Activations as integers d of 23 bits, x = unit * d, for weight-only products. Each row is three of the buffer's:
// d = digit[0] + 256 * digit[1] + 65536 * digit[2].
constexpr int DIGITS = 3;
struct FixedPointRows {
  const void* q;       // [DIGITS * M][stride]
  const double* unit;  // [M]
  const int32_t* sum;  // [DIGITS * M]
  int64_t k_padded;
  int64_t stride;
};

struct Weight {
  const uint8_t* packed;
  const float* scale;  // [N]
  const float* bias;   // [N] or null
  int64_t n;
  // [N][K], not packed; null where it is. linear.cpp packs it as it goes: what a variant gets is packed.
  const int8_t* rows = nullptr;
};

// The output: rows * stride elements of dtype.
struct Output {
  void* data;
  int64_t stride;
  Dtype dtype;
};

struct RowStatistics {
  float scale;
  int32_t sum;
  int64_t outliers;
};

struct Variant {
  const char* name;
  bool (*runs_here)();
  int64_t q_bytes;  // of one quantized element
  // Panels that are best computed together: ranges handed to `multiply` should be multiples of it.
  int64_t panel_tile;
  // float32, from any dtype.
  void (*to_float)(const void* x, Dtype dtype, int64_t count, float* result);
  // Quantizes a row of k elements, zeros after them up to a multiple of LANES, into k_padded ones; lists its outliers
  // in room for k of them.
  RowStatistics (*quantize)(const float* x, int64_t k, int64_t k_padded, Split split, void* q, int32_t* outlier_k,
                            float* outlier_value);
  // Sets the flags of elements that are outliers under the column policy.
  void (*flag_outliers)(const float* x, int64_t count, double threshold, unsigned char* flags);
  // The residual x - scale * q at the columns given (column policy).
  void (*residual)(const float* x, const void* q, float scale, const int32_t* columns, int64_t count, float* result);
  // y[row_begin:row_end, 16 * panel_begin : 16 * panel_end].
  void (*multiply)(const Rows& rows, int64_t row_begin, int64_t row_end, const Weight& weight, int64_t panel_begin,
                   int64_t panel_end, const Output& y);
  // Makes a row's digits, DIGITS rows of `stride` elements; returns the unit, NaN where x has NaN or Inf.
  double (*quantize_digits)(const float* x, int64_t k, int64_t k_padded, int64_t stride, void* q, int32_t* sum);
  // As `multiply`, weight-only.
  void (*multiply_digits)(const FixedPointRows& rows, int64_t row_begin, int64_t row_end, const Weight& weight,
                          int64_t panel_begin, int64_t panel_end, const Output& y);
};

}  // namespace int8compile
