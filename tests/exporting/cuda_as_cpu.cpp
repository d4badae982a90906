// A package for the CPU that calls the operators of a package for a GPU, linked into it by a test, with what PyTorch has
// for GPUs only.
#include <cstdint>

extern "C" {

using Tensor = void*;
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

#define FORWARD(name, parameters, ...)                                                        \
  int aoti_torch_cuda_##name parameters;                                                      \
  int aoti_torch_cpu_##name parameters { return aoti_torch_cuda_##name(__VA_ARGS__); }

FORWARD(quantize_rows, (Tensor x, Tensor* d, double threshold, Tensor* q, Tensor* rows, Tensor* counters), x, d,
        threshold, q, rows, counters)
FORWARD(norm_quantize_rows,
        (Tensor x, Tensor* residual, Tensor* weight, Tensor* bias, Tensor* d, int64_t kind, double eps,
         double threshold, Tensor* sum, Tensor* q, Tensor* rows, Tensor* counters),
        x, residual, weight, bias, d, kind, eps, threshold, sum, q, rows, counters)
FORWARD(quantized_linear,
        (Tensor q, Tensor rows, Tensor counters, Tensor qweight, Tensor scale, Tensor* bias, int64_t activation,
         int64_t n0, int64_t n1, int32_t dtype, Tensor* y),
        q, rows, counters, qweight, scale, bias, activation, n0, n1, dtype, y)
FORWARD(grouped_linear,
        (Tensor x, Tensor qweight, Tensor scale, Tensor* d, Tensor ends, double threshold, Tensor* y), x, qweight,
        scale, d, ends, threshold, y)
FORWARD(batched_linear,
        (Tensor x, Tensor qweight, Tensor scale, Tensor* d, Tensor* bias, double threshold, Tensor* y), x, qweight,
        scale, d, bias, threshold, y)
FORWARD(weight_only_linear, (Tensor x, Tensor qweight, Tensor scale, Tensor* d, Tensor* bias, Tensor* y), x, qweight,
        scale, d, bias, y)

}  // extern "C"
