// The whole operator on plain pointers: quantize the rows of x once, multiply them by one weight or several.
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

// `run(begin, end, context)` for ranges that together are [begin, end), in parallel.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, Body run, void* context);

struct Activations {
  const void* data;  // [m][k], rows side by side
  Dtype dtype;
  int64_t m, k;
};

// y[i] = x @ weights[i], for `count` weights over the same k, all rotated with d [k], or none where it is null.
void linear(const Variant& variant, const Activations& x, const float* d, double threshold, const Weight* weights,
            const Output* y, int64_t count, ParallelFor parallel_for);

// The same with int8 weights and activations in fixed point.
void weight_only_linear(const Variant& variant, const Activations& x, const float* d, const Weight& weight,
                        const Output& y, ParallelFor parallel_for);

// Rotates with d, or not, and quantizes the rows of a weight: q [m][k] and scale [m], which is NaN where a row has NaN
// or Inf.
void quantize_weight(const Variant& variant, const Activations& weight, const float* d, int8_t* q, float* scale,
                     ParallelFor parallel_for);

// A weight [n][k] in the layout of kernel.h.
void pack(const int8_t* qweight, int64_t n, int64_t k, uint8_t* packed, ParallelFor parallel_for);

// The variants compiled into this library, fastest first, closed by a null pointer.
extern const Variant* const variants[];

}  // namespace int8compile
