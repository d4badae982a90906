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

extern "C" {

AOTITorchError aoti_torch_cpu_packed_linear_no_grad(AtenTensorHandle x, AtenTensorHandle packed, AtenTensorHandle scale,
                                                    AtenTensorHandle* bias, double threshold, int32_t by_column,
                                                    AtenTensorHandle* y) {
  give(packed_linear_no_grad(borrowed(x), borrowed(packed), borrowed(scale), borrowed(bias), threshold, by_column), y);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_packed_linear_pair_no_grad(AtenTensorHandle x, AtenTensorHandle packed,
                                                         AtenTensorHandle scale, AtenTensorHandle* bias, int64_t n0,
                                                         double threshold, int32_t by_column, AtenTensorHandle* y0,
                                                         AtenTensorHandle* y1) {
  const auto y = packed_linear_pair_no_grad(borrowed(x), borrowed(packed), borrowed(scale), borrowed(bias), n0,
                                            threshold, by_column);
  give(std::get<0>(y), y0);
  give(std::get<1>(y), y1);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_packed_linear_triple_no_grad(AtenTensorHandle x, AtenTensorHandle packed,
                                                           AtenTensorHandle scale, AtenTensorHandle* bias, int64_t n0,
                                                           int64_t n1, double threshold, int32_t by_column,
                                                           AtenTensorHandle* y0, AtenTensorHandle* y1,
                                                           AtenTensorHandle* y2) {
  const auto y = packed_linear_triple_no_grad(borrowed(x), borrowed(packed), borrowed(scale), borrowed(bias), n0, n1,
                                              threshold, by_column);
  give(std::get<0>(y), y0);
  give(std::get<1>(y), y1);
  give(std::get<2>(y), y2);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_packed_batched_linear(AtenTensorHandle x, AtenTensorHandle packed, AtenTensorHandle scale,
                                                    AtenTensorHandle* bias, double threshold, const char* outliers,
                                                    AtenTensorHandle* y) {
  give(packed_batched_linear(borrowed(x), borrowed(packed), borrowed(scale), borrowed(bias), threshold, outliers), y);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_linear_no_grad(AtenTensorHandle x, AtenTensorHandle qweight, AtenTensorHandle scale,
                                             AtenTensorHandle* bias, double threshold, int32_t by_column,
                                             AtenTensorHandle* y) {
  give(linear_no_grad(borrowed(x), borrowed(qweight), borrowed(scale), borrowed(bias), threshold, by_column), y);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_weight_only_linear_no_grad(AtenTensorHandle x, AtenTensorHandle qweight,
                                                         AtenTensorHandle scale, AtenTensorHandle* bias,
                                                         AtenTensorHandle* y) {
  give(weight_only_linear_no_grad(borrowed(x), borrowed(qweight), borrowed(scale), borrowed(bias)), y);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_grouped_linear(AtenTensorHandle x, AtenTensorHandle qweight, AtenTensorHandle scale,
                                             AtenTensorHandle ends, double threshold, const char* outliers,
                                             AtenTensorHandle* y) {
  give(grouped_linear(borrowed(x), borrowed(qweight), borrowed(scale), borrowed(ends), threshold, outliers), y);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_packed_weight_only_linear_no_grad(AtenTensorHandle x, AtenTensorHandle packed,
                                                                AtenTensorHandle scale, AtenTensorHandle* bias,
                                                                AtenTensorHandle* y) {
  give(packed_weight_only_linear_no_grad(borrowed(x), borrowed(packed), borrowed(scale), borrowed(bias)), y);
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
