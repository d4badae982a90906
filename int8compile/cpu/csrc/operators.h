// The operators of int8compile/ops/linear.py for CPU tensors, over PyTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "linear.h"

namespace int8compile {

using torch::stable::Tensor;

// The variant that is used.
const Variant& variant();
// Has a variant used from now on, by all threads. Returns whether this machine can run it.
bool use_variant(const char* name);

Tensor packed_linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& bias,
                     double threshold, const std::string& outliers);
Tensor packed_linear_no_grad(const Tensor& x, const Tensor& packed, const Tensor& scale,
                             const std::optional<Tensor>& bias, double threshold, bool by_column);
std::tuple<Tensor, Tensor> packed_linear_pair_no_grad(const Tensor& x, const Tensor& packed, const Tensor& scale,
                                                      const std::optional<Tensor>& bias, int64_t n0, double threshold,
                                                      bool by_column);
std::tuple<Tensor, Tensor, Tensor> packed_linear_triple_no_grad(const Tensor& x, const Tensor& packed,
                                                                const Tensor& scale, const std::optional<Tensor>& bias,
                                                                int64_t n0, int64_t n1, double threshold,
                                                                bool by_column);
Tensor unpacked_linear(const Tensor& x, const Tensor& qweight, const Tensor& scale, const std::optional<Tensor>& bias,
                       double threshold, const std::string& outliers);
Tensor linear_no_grad(const Tensor& x, const Tensor& qweight, const Tensor& scale, const std::optional<Tensor>& bias,
                      double threshold, bool by_column);
Tensor packed_batched_linear(const Tensor& x, const Tensor& packed, const Tensor& scale,
                             const std::optional<Tensor>& bias, double threshold, const std::string& outliers);
Tensor batched_linear(const Tensor& x, const Tensor& qweight, const Tensor& scale, const std::optional<Tensor>& bias,
                      double threshold, const std::string& outliers);
Tensor grouped_linear(const Tensor& x, const Tensor& qweight, const Tensor& scale, const Tensor& ends, double threshold,
                      const std::string& outliers);
Tensor packed_weight_only_linear(const Tensor& x, const Tensor& packed, const Tensor& scale,
                                 const std::optional<Tensor>& bias);
Tensor packed_weight_only_linear_no_grad(const Tensor& x, const Tensor& packed, const Tensor& scale,
                                         const std::optional<Tensor>& bias);
Tensor unpacked_weight_only_linear(const Tensor& x, const Tensor& qweight, const Tensor& scale,
                                   const std::optional<Tensor>& bias);
Tensor weight_only_linear_no_grad(const Tensor& x, const Tensor& qweight, const Tensor& scale,
                                  const std::optional<Tensor>& bias);
std::tuple<Tensor, Tensor> quantized_weight(const Tensor& weight_);
Tensor pack_weight(const Tensor& qweight_);

}  // namespace int8compile
