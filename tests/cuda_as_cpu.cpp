// A package for the CPU that calls the operators of a package for a GPU, linked into it by a test, with what PyTorch has
// for GPUs only.
#include <cstdint>

extern "C" {

using Tensor = void*;
int aoti_torch_cuda_quantize_rows(Tensor, Tensor*, double, Tensor*, Tensor*);
int aoti_torch_cuda_quantized_linear(Tensor, Tensor, Tensor, Tensor, Tensor*, int64_t, int64_t, int64_t, int32_t,
                                     Tensor*);
int aoti_torch_cuda_weight_only_linear(Tensor, Tensor, Tensor, Tensor*, Tensor*, Tensor*);

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

int aoti_torch_cpu_quantize_rows(Tensor x, Tensor* d, double threshold, Tensor* q, Tensor* rows) {
  return aoti_torch_cuda_quantize_rows(x, d, threshold, q, rows);
}
int aoti_torch_cpu_quantized_linear(Tensor q, Tensor rows, Tensor qweight, Tensor scale, Tensor* bias,
                                    int64_t activation, int64_t n0, int64_t n1, int32_t dtype, Tensor* y) {
  return aoti_torch_cuda_quantized_linear(q, rows, qweight, scale, bias, activation, n0, n1, dtype, y);
}
int aoti_torch_cpu_weight_only_linear(Tensor x, Tensor qweight, Tensor scale, Tensor* d, Tensor* bias, Tensor* y) {
  return aoti_torch_cuda_weight_only_linear(x, qweight, scale, d, bias, y);
}

}  // extern "C"
