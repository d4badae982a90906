// The operators on plain pointers: the rows of x are quantized once, and multiplied by one or several weights.
#pragma once

#include "kernel.h"

namespace int8compile {

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t panels_for(int64_t n) { return round_up(n, LANES) / LANES; }
inline int64_t padded(int64_t k) { return round_up(k, K_STEP); }
inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// B of int8compile/ops/reference.py.
inline int64_t rotation_size(int64_t k) {
  const int64_t power = k & -k;
  return power < 16 ? 1 : power < 128 ? power : 128;
}

// Calls `run(begin, end, context)` in parallel, for ranges that together are [begin, end).
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, Body run, void* context);

struct Activations {
  const void* data;  // [m][k], contiguous
  Dtype dtype;
  int64_t m, k;
};

// The m rows of x from `first` on.
inline Activations from_row(const Activations& x, int64_t first, int64_t m) {
  return {static_cast<const char*>(x.data) + first * x.k * size_of(x.dtype), x.dtype, m, x.k};
}

// The rows of y from `first` on.
inline Output from_row(const Output& y, int64_t first) {
  return {static_cast<char*>(y.data) + first * y.stride * size_of(y.dtype), y.stride, y.dtype};
}

// Computes y[i] = x @ weights[i] for `count` weights of the same k, all rotated with d [k], or none if d is null.
void linear(const Variant& variant, const Activations& x, const float* d, double threshold, const Weight* weights,
            const Output* y, int64_t count, ParallelFor parallel_for);

// Computes the same with int8 weights and activations in fixed point.
void weight_only_linear(const Variant& variant, const Activations& x, const float* d, const Weight& weight,
                        const Output& y, ParallelFor parallel_for);

// Rotates the rows of a weight with d, unless d is null, and quantizes them to q [m][k] and scale [m]. The scale of a
// row with NaN or Inf is NaN.
void quantize_weight(const Variant& variant, const Activations& weight, const float* d, int8_t* q, float* scale,
                     ParallelFor parallel_for);

// Packs a weight [n][k] into the layout of kernel.h.
void pack(const int8_t* qweight, int64_t n, int64_t k, uint8_t* packed, ParallelFor parallel_for);

// The variants in this library, fastest first, and a null pointer at the end.
extern const Variant* const variants[];

}  // namespace int8compile
