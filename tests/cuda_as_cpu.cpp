// A package for the CPU that calls the operators of a package for a GPU, linked into it by a test, with what PyTorch has
// for GPUs only.
#include <cstdint>

extern "C" {

using Tensor = void*;
int aoti_torch_cuda_quantize_rows(Tensor, double, int32_t, Tensor*, Tensor*);
int aoti_torch_cuda_quantized_linear(Tensor, Tensor, Tensor, Tensor, Tensor*, double, int32_t, int64_t, int64_t,
                                     int64_t, int32_t, Tensor*);
int aoti_torch_cuda_weight_only_linear(Tensor, Tensor, Tensor, Tensor*, Tensor*);

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

int aoti_torch_cpu_quantize_rows(Tensor x, double threshold, int32_t by_column, Tensor* planes, Tensor* info) {
  return aoti_torch_cuda_quantize_rows(x, threshold, by_column, planes, info);
}
int aoti_torch_cpu_quantized_linear(Tensor planes, Tensor info, Tensor qweight, Tensor scale, Tensor* bias,
                                    double threshold, int32_t by_column, int64_t activation, int64_t n0, int64_t n1,
                                    int32_t dtype, Tensor* y) {
  return aoti_torch_cuda_quantized_linear(planes, info, qweight, scale, bias, threshold, by_column, activation, n0, n1,
                                          dtype, y);
}
int aoti_torch_cpu_weight_only_linear(Tensor x, Tensor qweight, Tensor scale, Tensor* bias, Tensor* y) {
  return aoti_torch_cuda_weight_only_linear(x, qweight, scale, bias, y);
}

}  // extern "C"
