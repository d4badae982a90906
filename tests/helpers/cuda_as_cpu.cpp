// A package for the CPU that calls the operators of a package for a GPU, linked into it by a test, with what PyTorch has
// for GPUs only.
#include <cstdint>
#include <tuple>

using AtenTensorHandle = void*;
using AOTITorchError = int32_t;
namespace int8compile {
struct Tensor;
struct Maybe;
}  // namespace int8compile
#include "declared.h"

extern "C" {

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

#define FORWARD(name, compute, parameters, arguments) \
  int aoti_torch_cuda_##name parameters;              \
  int aoti_torch_cpu_##name parameters { return aoti_torch_cuda_##name arguments; }
INT8COMPILE_CUDA_FUNCTIONS(FORWARD)

}  // extern "C"
