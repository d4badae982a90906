// The operators as C functions, which the generated code of an exported package calls without the dispatcher.
//
// Errors are thrown: the caller is C++ of the same library. AOTInductor's runtime writes their text to stderr, and those
// of calls are in the exception that its user gets.
#include "package.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "operators.h"

namespace int8compile {

Tensor borrowed(AtenTensorHandle handle) {
  AtenTensorHandle copy;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &copy));
  return Tensor(copy);
}

std::optional<Tensor> borrowed(AtenTensorHandle* handle) {
  if (!handle) return std::nullopt;
  return borrowed(*handle);
}

void give(const Tensor& tensor, AtenTensorHandle* result) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.get(), result));
}

void refuse(const std::string& why) { throw std::runtime_error("int8compile: " + why); }

std::string folder() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<const void*>(&folder), &info) || !info.dli_fname) {
    refuse("the package cannot be checked, because the system does not say where its library lies");
  }
  const std::string path = info.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

}  // namespace int8compile

using namespace int8compile;

// What generated code calls: a C function for each operator, whose parameters follow from the operator's schema
// (int8compile.ops.c_parameters; tests/cpu/test_cpu_kernel.py compares them).
#define WEIGHT(weight) AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle scale, AtenTensorHandle* d
#define GIVEN(weight) borrowed(x), borrowed(weight), borrowed(scale), borrowed(d)

extern "C" {

AOTITorchError aoti_torch_cpu_linear_no_grad(WEIGHT(qweight), AtenTensorHandle* bias, double threshold,
                                             AtenTensorHandle* y) {
  give(unpacked_linear(GIVEN(qweight), borrowed(bias), threshold), y);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_packed_linear_no_grad(WEIGHT(packed), AtenTensorHandle* bias, double threshold,
                                                    AtenTensorHandle* y) {
  give(packed_linear(GIVEN(packed), borrowed(bias), threshold), y);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_packed_linear_pair_no_grad(WEIGHT(packed), AtenTensorHandle* bias, int64_t n0,
                                                         double threshold, AtenTensorHandle* y0, AtenTensorHandle* y1) {
  const auto y = packed_linear_pair(GIVEN(packed), borrowed(bias), n0, threshold);
  give(std::get<0>(y), y0);
  give(std::get<1>(y), y1);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_packed_linear_triple_no_grad(WEIGHT(packed), AtenTensorHandle* bias, int64_t n0,
                                                           int64_t n1, double threshold, AtenTensorHandle* y0,
                                                           AtenTensorHandle* y1, AtenTensorHandle* y2) {
  const auto y = packed_linear_triple(GIVEN(packed), borrowed(bias), n0, n1, threshold);
  give(std::get<0>(y), y0);
  give(std::get<1>(y), y1);
  give(std::get<2>(y), y2);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_packed_batched_linear(WEIGHT(packed), AtenTensorHandle* bias, double threshold,
                                                    AtenTensorHandle* y) {
  give(packed_batched_linear(GIVEN(packed), borrowed(bias), threshold), y);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_grouped_linear(WEIGHT(qweight), AtenTensorHandle ends, double threshold,
                                             AtenTensorHandle* y) {
  give(grouped_linear(GIVEN(qweight), borrowed(ends), threshold), y);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_weight_only_linear_no_grad(WEIGHT(qweight), AtenTensorHandle* bias,
                                                         AtenTensorHandle* y) {
  give(unpacked_weight_only_linear(GIVEN(qweight), borrowed(bias)), y);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_packed_weight_only_linear_no_grad(WEIGHT(packed), AtenTensorHandle* bias,
                                                                AtenTensorHandle* y) {
  give(packed_weight_only_linear(GIVEN(packed), borrowed(bias)), y);
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
