// The operators int8compile::packed_linear, ::packed_linears and ::packed_batched_linear for PyTorch, over its stable
// ABI; and a few C functions that Python calls through ctypes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "linear.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace int8compile {
namespace {

std::atomic<const Variant*> selected{nullptr};

const Variant& variant() {
  const Variant* chosen = selected.load(std::memory_order_relaxed);
  if (chosen) return *chosen;
  for (const Variant* const* each = variants;; ++each) {
    if (!(*each)->runs_here()) continue;
    selected.store(*each);
    return **each;
  }
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, Body run, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, run, context));
}

Dtype dtype_of(const Tensor& x, const char* op) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      STD_TORCH_CHECK(false, op, ": x must be float32, float16 or bfloat16");
  }
}

Tensor new_output(const Tensor& x, int64_t n) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  return torch::stable::new_empty(x, sizes);
}

// A weight's tensors, checked and kept alive.
struct Operand {
  Tensor scale;
  std::optional<Tensor> bias;
  Weight weight;

  Operand(const char* op, const Tensor& x, const Tensor& packed, const Tensor& scale_, const std::optional<Tensor>& bias_)
      : scale(scale_), bias(bias_) {
    const int64_t n = scale.dim() == 1 ? scale.size(0) : -1;
    const int64_t k = x.dim() > 0 ? x.size(-1) : -1;
    STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && n >= 0, op, ": scale must be float32 [N]");
    const bool fits = packed.scalar_type() == ScalarType::Byte && packed.dim() == 4 && packed.is_contiguous() &&
                      packed.size(0) == (n + LANES - 1) / LANES &&
                      packed.size(1) == (k + K_STEP - 1) / K_STEP * (K_STEP / GROUP) && packed.size(2) == LANES &&
                      packed.size(3) == GROUP;
    STD_TORCH_CHECK(fits, op, ": packed does not fit x [..., K=", k, "] and scale [N=", n,
                    "]; make it with int8compile.ops.pack_weight");
    scale = torch::stable::contiguous(scale);
    if (bias) {
      STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, op, ": bias must be [N], or none");
      if (bias->scalar_type() != ScalarType::Float) bias = torch::stable::to(*bias, ScalarType::Float);
      bias = torch::stable::contiguous(*bias);
    }
    weight = {static_cast<const uint8_t*>(packed.const_data_ptr()), static_cast<const float*>(scale.const_data_ptr()),
              bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr, n};
  }
};

Split split_of(const char* op, double threshold, const std::string& outliers) {
  STD_TORCH_CHECK(outliers == "row" || outliers == "column", op, ": outliers is '", outliers,
                  "'; allowed are 'row' and 'column'");
  STD_TORCH_CHECK(std::isfinite(threshold) && threshold >= 0, op, ": threshold must be a finite number >= 0");
  return {outliers == "row" ? Policy::row : Policy::column, threshold};
}

std::vector<Tensor> run(const char* op, const Tensor& input, const std::vector<Operand>& operands, Split split) {
  const Dtype dtype = dtype_of(input, op);
  const Tensor x = input.is_contiguous() ? input : torch::stable::contiguous(input);
  const int64_t k = x.size(-1);
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= x.size(i);
  std::vector<Tensor> results;
  std::vector<Weight> weights;
  std::vector<Output> outputs;
  for (const Operand& operand : operands) {
    results.push_back(new_output(x, operand.weight.n));
    weights.push_back(operand.weight);
    outputs.push_back({results.back().mutable_data_ptr(), operand.weight.n, dtype});
  }
  linear(variant(), {x.const_data_ptr(), dtype, m, k}, split, weights.data(), outputs.data(), int64_t(weights.size()),
         parallel_for);
  return results;
}

Tensor packed_linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& bias,
                     double threshold, const std::string& outliers) {
  constexpr const char* op = "int8compile::packed_linear";
  return run(op, x, {Operand(op, x, packed, scale, bias)}, split_of(op, threshold, outliers))[0];
}

std::vector<Tensor> packed_linears(const Tensor& x, const std::vector<Tensor>& packed,
                                   const std::vector<Tensor>& scale, const std::vector<std::optional<Tensor>>& bias,
                                   double threshold, const std::string& outliers) {
  constexpr const char* op = "int8compile::packed_linears";
  STD_TORCH_CHECK(packed.size() == scale.size() && packed.size() == bias.size(), op,
                  ": give one scale and one bias (or none) for each packed weight");
  std::vector<Operand> operands;
  for (size_t i = 0; i < packed.size(); ++i) operands.emplace_back(op, x, packed[i], scale[i], bias[i]);
  return run(op, x, operands, split_of(op, threshold, outliers));
}

}  // namespace
}  // namespace int8compile

STABLE_TORCH_LIBRARY_IMPL(int8compile, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&int8compile::packed_linear));
  m.impl("packed_linears", TORCH_BOX(&int8compile::packed_linears));
}

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// The names of the variants that run on this machine, fastest first, separated by spaces.
EXPORTED const char* int8compile_variants() {
  static const std::string names = [] {
    std::string result;
    for (const int8compile::Variant* const* each = int8compile::variants; *each; ++each) {
      if ((*each)->runs_here()) result += (result.empty() ? "" : " ") + std::string((*each)->name);
    }
    return result;
  }();
  return names.c_str();
}

// The variant that is used.
EXPORTED const char* int8compile_variant() { return int8compile::variant().name; }

// Has a variant used from now on, by all threads. Returns 0 if this machine cannot run it.
EXPORTED int int8compile_use_variant(const char* name) {
  for (const int8compile::Variant* const* each = int8compile::variants; *each; ++each) {
    if (std::strcmp((*each)->name, name) == 0 && (*each)->runs_here()) {
      int8compile::selected.store(*each);
      return 1;
    }
  }
  return 0;
}

}  // extern "C"
