// The CPU kernel's types. Symbols: M rows, K inputs, N outputs.
//
// All variants compute the same numbers, bit for bit: sums are of integers and exact in any order, and each step in
// floats is one float32 operation. int8compile/ops/reference.py is the definition.
//
// The packed weight has panels of LANES outputs, and in a panel LANES * GROUP bytes for every group of GROUP inputs:
//     packed[n / LANES][k / GROUP][n % LANES][k % GROUP] = q[n][k] + 128
// K is padded to a multiple of K_STEP and N to a multiple of LANES. vpdpbusd and AMX read this layout, and the other
// variants can. Weights are unsigned because the factor of vpdpbusd from memory, the activation, is signed.
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

// A row of activations or of a weight.
struct Row {
  const void* x;  // [k]
  Dtype dtype;
  int64_t k, k_padded;
  const float* d;    // [k], factors of x; null for ones
  int64_t rotation;  // B; 1 for a row that is not rotated
};

// The second digits of GROUP inputs of which some have more than 8 bits. The first, k, is a multiple of GROUP.
struct Outlier {
  int32_t k;
  int8_t digits[GROUP];
};

struct Outliers {
  const Outlier* list;
  int64_t count;
};

// Quantized activations.
struct Rows {
  const void* q;             // [M + ROW_PADDING][stride], of the variant's type: the low 8 bits of Q
  const float* scale;        // [M]
  const int32_t* sum;        // [M], the row's sum of Q
  const Outliers* outliers;  // [M]
  int64_t k_padded;
  int64_t stride;
};

// Activations as integers for weight-only products, x = unit * X. Each row has several rows of the buffer, the digits
// of X to base 256: 23 bits need three digits, and a rotation adds up to 7 bits.
constexpr int MOST_DIGITS = 4;
struct FixedPointRows {
  const void* q;       // [digits * M][stride]
  const float* unit;   // [M]
  const int32_t* sum;  // [digits * M]
  int64_t digits;
  int64_t k_padded;
  int64_t stride;
};

struct Weight {
  const uint8_t* packed;
  const float* scale;  // [N]
  const float* bias;   // [N] or null
  int64_t n;
  // [N][K], for a weight that is not packed; else null. linear.cpp packs it in parts: variants get packed weights.
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
  // Panels that are best computed together: ranges for `multiply` should be multiples of this.
  int64_t panel_tile;
  // Quantizes a row into k_padded elements of q, and lists its outliers; there is room for one per GROUP inputs.
  // `mean_factor` is t / (127 * K). `integers` has room for the row, with each run of k / rotation elements padded to a
  // multiple of LANES.
  RowStatistics (*quantize)(const Row& row, float mean_factor, int32_t* integers, void* q, Outlier* outliers);
  // Computes y[row_begin:row_end, 16 * panel_begin : 16 * panel_end].
  void (*multiply)(const Rows& rows, int64_t row_begin, int64_t row_end, const Weight& weight, int64_t panel_begin,
                   int64_t panel_end, const Output& y);
  // Writes a row's digits, `digits` rows of `stride` elements. Returns the unit, NaN if x has NaN or Inf.
  float (*quantize_digits)(const Row& row, int64_t digits, int64_t stride, int32_t* integers, void* q, int32_t* sum);
  // The same as `multiply`, weight-only.
  void (*multiply_digits)(const FixedPointRows& rows, int64_t row_begin, int64_t row_end, const Weight& weight,
                          int64_t panel_begin, int64_t panel_end, const Output& y);
  // Quantizes a weight's row into k_padded elements of q. Returns the scale, NaN if the row has NaN or Inf.
  float (*quantize_weight)(const Row& row, int32_t* floats, void* q);
};

}  // namespace int8compile
