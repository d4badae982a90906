// The operators of int8compile/ops/linear.py for CPU tensors, over PyTorch's stable ABI. An operator without gradients
// is the same function as the one with them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "linear.h"

namespace int8compile {

using torch::stable::Tensor;

// The variant that is used.
const Variant& variant();
// Has a variant used from now on, by all threads. Returns whether this machine can run it.
bool use_variant(const char* name);

// `d` rotates x; a weight that is not rotated has none.
using Maybe = std::optional<Tensor>;

Tensor unpacked_linear(const Tensor& x, const Tensor& qweight, const Tensor& scale, const Maybe& d, const Maybe& bias,
              double threshold);
Tensor packed_linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const Maybe& d, const Maybe& bias,
                     double threshold);
std::tuple<Tensor, Tensor> packed_linear_pair(const Tensor& x, const Tensor& packed, const Tensor& scale,
                                              const Maybe& d, const Maybe& bias, int64_t n0, double threshold);
std::tuple<Tensor, Tensor, Tensor> packed_linear_triple(const Tensor& x, const Tensor& packed, const Tensor& scale,
                                                        const Maybe& d, const Maybe& bias, int64_t n0, int64_t n1,
                                                        double threshold);
Tensor batched_linear(const Tensor& x, const Tensor& qweight, const Tensor& scale, const Maybe& d, const Maybe& bias,
                      double threshold);
Tensor packed_batched_linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const Maybe& d,
                             const Maybe& bias, double threshold);
Tensor grouped_linear(const Tensor& x, const Tensor& qweight, const Tensor& scale, const Maybe& d, const Tensor& ends,
                      double threshold);
Tensor unpacked_weight_only_linear(const Tensor& x, const Tensor& qweight, const Tensor& scale, const Maybe& d,
                          const Maybe& bias);
Tensor packed_weight_only_linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const Maybe& d,
                                 const Maybe& bias);
std::tuple<Tensor, Tensor> quantized_weight(const Tensor& weight, const Maybe& d);
Tensor pack_weight(const Tensor& qweight);

}  // namespace int8compile
