// The operators in a package for a GPU: C functions that start the Triton kernels beside the package's library. `Plan`,
// made by int8compile/triton_kernels, says which kernels start.
//
// The driver's functions are looked up when they are needed, as in Triton, so this file compiles without CUDA.
#include <torch/csrc/stable/ops.h>

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "package.h"
#include "plan.h"

namespace int8compile {
namespace {

// Constants of cuda.h. The functions below have not changed since CUDA 12.0.
constexpr int MAX_DYNAMIC_SHARED = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int PREFER_SHARED = 1;       // CU_FUNC_CACHE_PREFER_SHARED
constexpr int MAJOR = 75, MINOR = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...
constexpr int UINT8 = 0, NO_INTERLEAVE = 0, PROMOTE_128B = 2, FILL_ZERO = 0;
// Shared memory that a kernel may use without setting an attribute.
constexpr unsigned DEFAULT_SHARED = 48 * 1024;
// Kernels are compiled for tensors that begin at multiples of this.
constexpr uintptr_t ALIGNMENT = 16;

struct alignas(64) CUtensorMap {
  uint64_t opaque[16];
};

#define DRIVER(FUNCTION)                                                                                          \
  FUNCTION(cuInit, (unsigned))                                                                                    \
  FUNCTION(cuGetErrorString, (int, const char**))                                                                 \
  FUNCTION(cuDeviceGet, (int*, int))                                                                              \
  FUNCTION(cuDeviceGetAttribute, (int*, int, int))                                                                \
  FUNCTION(cuCtxGetCurrent, (void**))                                                                             \
  FUNCTION(cuCtxSetCurrent, (void*))                                                                              \
  FUNCTION(cuDevicePrimaryCtxRetain, (void**, int))                                                               \
  FUNCTION(cuModuleLoadData, (void**, const void*))                                                               \
  FUNCTION(cuModuleGetFunction, (void**, void*, const char*))                                                     \
  FUNCTION(cuFuncSetAttribute, (void*, int, int))                                                                 \
  FUNCTION(cuFuncSetCacheConfig, (void*, int))                                                                    \
  FUNCTION(cuLaunchKernel, (void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,   \
                            void**, void**))                                                                      \
  FUNCTION(cuTensorMapEncodeTiled, (CUtensorMap*, int, uint32_t, void*, const uint64_t*, const uint64_t*,         \
                                    const uint32_t*, const uint32_t*, int, int, int, int))

struct Driver {
#define DECLARE(name, parameters) int (*name) parameters;
  DRIVER(DECLARE)
#undef DECLARE
  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

  void check(int code, const std::string& what) const {
    if (code == 0) return;
    const char* text = nullptr;
    cuGetErrorString(code, &text);
    refuse(what + ": " + (text ? text : "CUDA error " + std::to_string(code)));
  }

 private:
  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY);
    if (!library) refuse("the package is for a GPU, and this machine has no NVIDIA driver (libcuda.so.1)");
#define FIND(name, parameters) find(library, #name, &name);
    DRIVER(FIND)
#undef FIND
  }

  template <typename Function>
  static void find(void* library, const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(library, name));
    if (!*function) refuse(std::string("the package is for a GPU, and this machine's driver is too old: no ") + name);
  }
};

// A device that a model was loaded on.
struct Device {
  void* context;               // the context that PyTorch uses
  std::vector<void*> kernels;  // the plan's
};

std::mutex mutex;
// Set once, even if the loader makes several copies of the model.
const Plan* plan = nullptr;
// PyTorch's function for the current stream of a device, which PyTorch for CPUs does not have.
CurrentStream current_stream = nullptr;
std::map<int, Device> devices;

// Makes a context the thread's current one, and restores the previous one at the end. A thread may have no context
// before PyTorch needs one itself, or the context of another device.
class Current {
 public:
  explicit Current(void* context) {
    const Driver& driver = Driver::get();
    driver.check(driver.cuCtxGetCurrent(&before_), "the GPU cannot be used");
    if (before_ == context) return;
    driver.check(driver.cuCtxSetCurrent(context), "the GPU cannot be used");
    changed_ = true;
  }
  ~Current() {
    if (changed_) Driver::get().cuCtxSetCurrent(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  void* before_ = nullptr;
  bool changed_ = false;
};

void* load(const Kernel& kernel) {
  const Driver& driver = Driver::get();
  std::ifstream file(folder() + "/" + kernel.file, std::ios::binary);
  const std::string image{std::istreambuf_iterator<char>(file), {}};
  if (image.empty()) refuse(std::string("the package lacks ") + kernel.file + "; copy or export it again");
  const std::string what = std::string("the kernel ") + kernel.file + " cannot be loaded";
  void* module = nullptr;
  void* made = nullptr;
  driver.check(driver.cuModuleLoadData(&module, image.data()), what);
  driver.check(driver.cuModuleGetFunction(&made, module, kernel.name), what);
  if (kernel.shared > DEFAULT_SHARED) {  // as in Triton
    driver.check(driver.cuFuncSetCacheConfig(made, PREFER_SHARED), what);
    driver.check(driver.cuFuncSetAttribute(made, MAX_DYNAMIC_SHARED, int(kernel.shared)), what);
  }
  return made;
}

// Loads all kernels at once, because no kernel can be loaded while a CUDA graph is captured.
void load_all(const Plan& made, CurrentStream stream, int index, int ordinal) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!plan) {
    plan = &made;
    current_stream = stream;
  }
  if (devices.count(index)) return;
  const Driver& driver = Driver::get();
  Device device;
  driver.check(driver.cuDevicePrimaryCtxRetain(&device.context, ordinal), "the GPU cannot be used");
  const Current current(device.context);
  for (const Kernel& kernel : plan->kernels) device.kernels.push_back(load(kernel));
  devices.emplace(index, std::move(device));
}

const Device& device_of(int index) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = devices.find(index);
  if (found == devices.end()) refuse("an activation is on GPU " + std::to_string(index) + ", and the model is not");
  return found->second;
}

unsigned programs(const Programs& direction, int64_t m) {
  const int64_t groups = direction.rows ? (m + direction.rows - 1) / direction.rows : 1;
  const int64_t all = groups * direction.times;
  return unsigned(direction.most ? std::min(all, direction.most) : all);
}

CUtensorMap encoded(const TensorMap& map, void* address, int64_t m) {
  // The last dimension first; strides in bytes, without the last dimension's.
  const uint64_t sizes[] = {uint64_t(map.columns), uint64_t(map.rows < 0 ? m : map.rows)};
  const uint64_t stride[] = {uint64_t(map.columns)};
  const uint32_t tile[] = {map.tile_columns, map.tile_rows}, steps[] = {1, 1};
  CUtensorMap made;
  const Driver& driver = Driver::get();
  driver.check(driver.cuTensorMapEncodeTiled(&made, UINT8, 2, address, sizes, stride, tile, steps, NO_INTERLEAVE,
                                             map.swizzle, PROMOTE_128B, FILL_ZERO),
               "a matrix cannot be described to the copy engine");
  return made;
}

const Call& call_of(const char* op, const std::vector<int64_t>& key) {
  if (!plan) refuse("the package has no kernels for a GPU; export it again");
  for (const Call& call : plan->calls) {
    if (std::strcmp(call.op, op) == 0 && call.key == key) return call;
  }
  std::string asked;
  for (const int64_t number : key) asked += (asked.empty() ? "" : ", ") + std::to_string(number);
  refuse(std::string("the package has no kernel for ") + op + " with " + asked + "; export it again");
}

const std::vector<Launch>& launches(const Call& call, int64_t m) {
  auto found = call.ranges.begin();
  if (found == call.ranges.end() || m < found->rows) {
    refuse("the package was not exported for " + std::to_string(m) + " rows of an activation");
  }
  while (found + 1 != call.ranges.end() && (found + 1)->rows <= m) ++found;
  return found->launches;
}

int64_t bits(double number) {
  int64_t result;
  std::memcpy(&result, &number, sizeof(result));
  return result;
}

void* address(const Tensor& x) { return const_cast<void*>(x.const_data_ptr()); }

// Returns x contiguous and aligned, as kernels need it; a copy if it is not.
Tensor plain(const Tensor& x) {
  if (!x.is_contiguous()) return torch::stable::contiguous(x);
  return reinterpret_cast<uintptr_t>(address(x)) % ALIGNMENT ? torch::stable::clone(x) : x;
}

Maybe plain(const Maybe& x) { return x ? Maybe(plain(*x)) : std::nullopt; }

void* address(const Maybe& x) { return x ? address(*x) : nullptr; }

void start(const Launch& launch, int64_t m, const std::vector<void*>& tensors, const Tensor& x, const Device& device,
           void* stream) {
  const unsigned programs_x = programs(launch.programs[0], m), programs_y = programs(launch.programs[1], m),
                 programs_z = programs(launch.programs[2], m);
  if (programs_x == 0 || programs_y == 0 || programs_z == 0) return;
  std::optional<Tensor> scratch;
  if (launch.scratch) scratch = empty({m * launch.scratch}, aoti_torch_dtype_int8(), x);
  std::vector<CUtensorMap> maps;
  maps.reserve(launch.maps.size());
  for (const TensorMap& map : launch.maps) maps.push_back(encoded(map, tensors[map.tensor], m));
  std::vector<uint64_t> values(launch.arguments.size());
  std::vector<void*> arguments(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const Argument& argument = launch.arguments[i];
    arguments[i] = &values[i];
    switch (argument.kind) {
      case Argument::tensor:
        values[i] = reinterpret_cast<uintptr_t>(tensors[size_t(argument.value)]);
        break;
      case Argument::scratch:
        values[i] = reinterpret_cast<uintptr_t>(address(scratch));
        break;
      case Argument::rows:
        values[i] = uint64_t(m / argument.value);
        break;
      case Argument::number:
        values[i] = uint64_t(argument.value);
        break;
      case Argument::map:
        arguments[i] = &maps[size_t(argument.value)];
        break;
    }
  }
  const Driver& driver = Driver::get();
  const Kernel& kernel = plan->kernels[launch.kernel];
  const Current current(device.context);
  driver.check(driver.cuLaunchKernel(device.kernels[launch.kernel], programs_x, programs_y, programs_z, kernel.threads,
                                     1, 1, kernel.shared, stream, arguments.data(), nullptr),
               std::string("the kernel ") + kernel.file + " cannot be started");
}

void run(const Call& call, int64_t m, const std::vector<void*>& tensors, const Tensor& x) {
  if (m == 0) return;
  const int index = x.get_device_index();
  const Device& device = device_of(index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(current_stream(index, &stream));
  for (const Launch& launch : launches(call, m)) start(launch, m, tensors, x, device, stream);
}

// The results of quantizing [M, K], see int8compile/ops/quantized.py.
struct Quantized {
  Tensor q, rows, counters;

  Quantized(int64_t m, int64_t k, double threshold, const Tensor& like)
      : q(empty({threshold == 0 ? 1 : 2, m, k}, aoti_torch_dtype_int8(), like)),
        rows(empty({threshold == 0 ? 1 : 1 + (k + WORD - 1) / WORD, m}, aoti_torch_dtype_int32(), like)),
        counters(empty({COUNTERS}, aoti_torch_dtype_int32(), like)) {}

 private:
  static constexpr int64_t WORD = 4096, COUNTERS = 512;
};

// x times weights [E, N, K], rows by rows: `ends` says which rows have which weight; without it each has as many.
Tensor expert_linear(const char* op, const Tensor& x_, const Tensor& qweight_, const Tensor& scale_, const Maybe& d_,
                     const Maybe& ends_, const Maybe& bias_, double threshold) {
  const Tensor x = plain(x_), qweight = plain(qweight_), scale = plain(scale_);
  const Maybe d = plain(d_), ends = plain(ends_), bias = plain(bias_);
  const int64_t m = count_rows(x), k = x.size(-1), experts = qweight.size(0), n = qweight.size(1);
  const int32_t dtype = dtype_of(x);
  const int64_t dims = d ? d->dim() : 0;
  const Call& call = call_of(op, {experts, n, k, dtype, dims, dtype_of(ends), dtype_of(bias), bits(threshold)});
  const Tensor y = empty(sizes_with(x, n), dtype, x);
  const Quantized made(m, k, threshold, x);
  run(call, m,
      {address(x), address(d), address(ends), address(made.q), address(made.rows), address(made.counters),
       address(qweight), address(scale), address(bias), address(y)},
      x);
  return y;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cuda::quantize_rows(const Tensor& x_, const Maybe& d_, double threshold) {
  const Tensor x = plain(x_);
  const Maybe d = plain(d_);
  const int64_t m = count_rows(x), k = x.size(-1);
  const Call& call = call_of("quantize_rows", {k, dtype_of(x), d.has_value(), bits(threshold)});
  const Quantized made(m, k, threshold, x);
  run(call, m, {address(x), address(d), address(made.q), address(made.rows), address(made.counters)}, x);
  return {made.q, made.rows, made.counters};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cuda::norm_quantize_rows(const Tensor& x_, const Maybe& residual_,
                                                                    const Maybe& weight_, const Maybe& bias_,
                                                                    const Maybe& d_, int64_t kind, double eps,
                                                                    double threshold) {
  const Tensor x = plain(x_);
  const Maybe residual = plain(residual_), weight = plain(weight_), bias = plain(bias_), d = plain(d_);
  const int64_t m = count_rows(x), k = x.size(-1);
  const int32_t dtype = dtype_of(x);
  const Call& call = call_of("norm_quantize_rows", {k, dtype, residual.has_value(), dtype_of(weight), dtype_of(bias),
                                                    d.has_value(), kind, bits(eps), bits(threshold)});
  const Tensor sum = empty(residual ? sizes_with(x, k) : std::vector<int64_t>{0}, dtype, x);
  const Quantized made(m, k, threshold, x);
  run(call, m,
      {address(x), address(residual), address(weight), address(bias), address(d), address(sum), address(made.q),
       address(made.rows), address(made.counters)},
      x);
  return {sum, made.q, made.rows, made.counters};
}

Tensor cuda::quantized_linear(const Tensor& q_, const Tensor& rows_, const Tensor& counters_, const Tensor& qweight_,
                              const Tensor& scale_, const Maybe& bias_, int64_t activation, int64_t n0, int64_t n1,
                              int32_t dtype) {
  const Tensor q = plain(q_), rows = plain(rows_), counters = plain(counters_), qweight = plain(qweight_),
               scale = plain(scale_);
  const Maybe bias = plain(bias_);
  const int64_t planes = q.size(0), m = q.size(1), k = q.size(2), n = qweight.size(0);
  const Call& call = call_of("quantized_linear", {n, k, planes, activation, n0, n1, dtype, dtype_of(bias)});
  constexpr int64_t SILU_MUL = 5;  // of int8compile/ops/quantized.py
  const int64_t width = activation == SILU_MUL ? n / 2 : n;
  const Tensor y = n0 ? empty({m * n}, dtype, q) : empty({m, width}, dtype, q);
  run(call, m,
      {address(q), address(rows), address(counters), address(qweight), address(scale), address(bias), address(y)}, q);
  return y;
}

Tensor cuda::grouped_linear(const Tensor& x, const Tensor& qweight, const Tensor& scale, const Maybe& d,
                            const Tensor& ends, double threshold) {
  return expert_linear("grouped_linear", x, qweight, scale, d, ends, std::nullopt, threshold);
}

Tensor cuda::batched_linear(const Tensor& x, const Tensor& qweight, const Tensor& scale, const Maybe& d,
                            const Maybe& bias, double threshold) {
  return expert_linear("batched_linear", x, qweight, scale, d, std::nullopt, bias, threshold);
}

Tensor cuda::weight_only_linear(const Tensor& x_, const Tensor& qweight_, const Tensor& scale_, const Maybe& d_,
                                const Maybe& bias_) {
  const Tensor x = plain(x_), qweight = plain(qweight_), scale = plain(scale_);
  const Maybe d = plain(d_), bias = plain(bias_);
  const int64_t m = count_rows(x), k = x.size(-1), n = qweight.size(0);
  const int32_t dtype = dtype_of(x);
  const Call& call = call_of("weight_only_linear", {n, k, dtype, d.has_value(), dtype_of(bias)});
  const Tensor y = empty(sizes_with(x, n), dtype, x);
  const Tensor digits = empty({4, m, k}, aoti_torch_dtype_int8(), x);
  const Tensor unit = empty({m}, aoti_torch_dtype_float32(), x);
  run(call, m,
      {address(x), address(d), address(digits), address(unit), address(qweight), address(scale), address(bias),
       address(y)},
      x);
  return y;
}

}  // namespace int8compile

// In the namespace of the generated code, which declares the function where it calls it.
namespace torch::aot_inductor {

// Takes the package's plan and loads its kernels. Throws if they were compiled for another GPU.
void int8compile_use_plan(const int8compile::Plan& made, int device, int8compile::CurrentStream stream) {
  using int8compile::Driver;
  const Driver& driver = Driver::get();
  int ordinal, major, minor;
  driver.check(driver.cuInit(0), "the NVIDIA driver cannot be used");
  driver.check(driver.cuDeviceGet(&ordinal, device), "the GPU cannot be used");
  driver.check(driver.cuDeviceGetAttribute(&major, int8compile::MAJOR, ordinal), "the GPU's compute capability cannot be read");
  driver.check(driver.cuDeviceGetAttribute(&minor, int8compile::MINOR, ordinal), "the GPU's compute capability cannot be read");
  if (major != made.major || minor != made.minor) {
    int8compile::refuse("the package was exported for " + std::string(made.gpu) + ", and this GPU is sm_" +
                        std::to_string(major) + std::to_string(minor) + "; export it on a GPU of this kind");
  }
  int8compile::load_all(made, stream, device, ordinal);
}

}  // namespace torch::aot_inductor

extern "C" {

#define FUNCTION(name, compute, parameters, arguments)                     \
  AOTITorchError aoti_torch_cuda_##name parameters {                       \
    return int8compile::c_function(&int8compile::cuda::compute) arguments; \
  }
INT8COMPILE_CUDA_FUNCTIONS(FUNCTION)

}  // extern "C"
