// Tensors over PyTorch's stable ABI, for operators of the library and of exported packages.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

namespace int8compile {

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

inline int32_t dtype_of(const Tensor& x) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

// Returns -1 for None.
inline int32_t dtype_of(const Maybe& x) { return x ? dtype_of(*x) : -1; }

// Returns an uninitialized tensor, made without the dispatcher, which takes a microsecond.
inline Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype, int32_t device_type, int32_t device) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                  device_type, device, &result));
  return Tensor(result);
}

// Returns an uninitialized tensor on the device of `like`.
inline Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype, const Tensor& like) {
  int32_t type, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  return empty(sizes, dtype, type, index);
}

// Returns the sizes of x, with n in place of the last one.
inline std::vector<int64_t> sizes_with(const Tensor& x, int64_t n) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  return sizes;
}

// Returns M of x [..., K].
inline int64_t count_rows(const Tensor& x) {
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= x.size(i);
  return m;
}

}  // namespace int8compile

// Declares the operators' `cpu::` and `cuda::` functions, and lists the registered operators and the C functions of
// packages. The build writes this file from the operators' schemas (int8compile/ops/signatures.py).
#include "declared.h"
