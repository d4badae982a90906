// The operators of int8compile/ops/quantized.py in a package for a GPU: C functions that start the Triton kernels which
// the package has beside its library. What is started follows `Plan`, by rules of int8compile/triton_kernels.
//
// The driver's functions are looked up when they are needed, as Triton does: this compiles without CUDA.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "package.h"
#include "plan.h"

using torch::headeronly::ScalarType;

namespace int8compile {
namespace {

// As in cuda.h, whose functions below have not changed since CUDA 12.0.
constexpr int MAX_DYNAMIC_SHARED = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int PREFER_SHARED = 1;       // CU_FUNC_CACHE_PREFER_SHARED
constexpr int MAJOR = 75, MINOR = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...
constexpr int UINT8 = 0, NO_INTERLEAVE = 0, PROMOTE_128B = 2, FILL_ZERO = 0;
// What every kernel may have without asking.
constexpr unsigned DEFAULT_SHARED = 48 * 1024;
// Tensors begin at multiples of this: kernels are compiled for that.
constexpr uintptr_t ALIGNMENT = 16;

struct alignas(64) CUtensorMap {
  uint64_t opaque[16];
};

struct Driver {
  int (*cuInit)(unsigned);
  int (*cuGetErrorString)(int, const char**);
  int (*cuDeviceGet)(int*, int);
  int (*cuDeviceGetAttribute)(int*, int, int);
  int (*cuCtxGetCurrent)(void**);
  int (*cuCtxSetCurrent)(void*);
  int (*cuDevicePrimaryCtxRetain)(void**, int);
  int (*cuModuleLoadData)(void**, const void*);
  int (*cuModuleGetFunction)(void**, void*, const char*);
  int (*cuFuncSetAttribute)(void*, int, int);
  int (*cuFuncSetCacheConfig)(void*, int);
  int (*cuLaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                        void**);
  int (*cuTensorMapEncodeTiled)(CUtensorMap*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,
                                const uint32_t*, int, int, int, int);
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
#define FIND(name) find(library, #name, &name)
    FIND(cuInit);
    FIND(cuGetErrorString);
    FIND(cuDeviceGet);
    FIND(cuDeviceGetAttribute);
    FIND(cuCtxGetCurrent);
    FIND(cuCtxSetCurrent);
    FIND(cuDevicePrimaryCtxRetain);
    FIND(cuModuleLoadData);
    FIND(cuModuleGetFunction);
    FIND(cuFuncSetAttribute);
    FIND(cuFuncSetCacheConfig);
    FIND(cuLaunchKernel);
    FIND(cuTensorMapEncodeTiled);
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
  void* context;               // the one that PyTorch uses too
  std::vector<void*> kernels;  // the plan's
};

std::mutex mutex;
// Set once, however many copies of the model its loader makes.
const Plan* plan = nullptr;
// PyTorch's function for the current stream of a device, which only PyTorch for GPUs has.
CurrentStream current_stream = nullptr;
std::map<int, Device> devices;

// Has this thread use a context, and then again what it used before. PyTorch makes a thread's context no sooner than it
// needs one itself, and it may be another device's.
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
  if (kernel.shared > DEFAULT_SHARED) {  // As Triton does.
    driver.check(driver.cuFuncSetCacheConfig(made, PREFER_SHARED), what);
    driver.check(driver.cuFuncSetAttribute(made, MAX_DYNAMIC_SHARED, int(kernel.shared)), what);
  }
  return made;
}

// All kernels at once, since nothing can be loaded while a CUDA graph is captured.
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
  // The last dimension first; strides in bytes, without that of 1.
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

// As kernels want it: contiguous, and beginning where a tensor of its own does.
Tensor plain(const Tensor& x) {
  if (!x.is_contiguous()) return torch::stable::contiguous(x);
  return reinterpret_cast<uintptr_t>(address(x)) % ALIGNMENT ? torch::stable::clone(x) : x;
}

// Uninitialized, where `like` is.
Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  int32_t type, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype, type,
                                                  index, &made));
  return Tensor(made);
}

int32_t dtype_of(const Tensor& x) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

// [M, K] of an x of [..., K].
std::pair<int64_t, int64_t> rows_of(const Tensor& x) {
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= x.size(i);
  return {m, x.size(-1)};
}

std::optional<Tensor> plain(const std::optional<Tensor>& x) {
  return x ? std::optional(plain(*x)) : std::nullopt;
}

void* address(const std::optional<Tensor>& x) { return x ? address(*x) : nullptr; }

int64_t dtype_of(const std::optional<Tensor>& x) { return x ? dtype_of(*x) : -1; }

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

// What quantizes [M, K], as int8compile/ops/quantized.py says.
struct Quantized {
  Tensor q, rows, counters;

  Quantized(int64_t m, int64_t k, double threshold, const Tensor& like)
      : q(empty({threshold == 0 ? 1 : 2, m, k}, aoti_torch_dtype_int8(), like)),
        rows(empty({threshold == 0 ? 1 : 1 + (k + WORD - 1) / WORD, m}, aoti_torch_dtype_int32(), like)),
        counters(empty({COUNTERS}, aoti_torch_dtype_int32(), like)) {}

 private:
  static constexpr int64_t WORD = 4096, COUNTERS = 512;
};

Quantized quantize_rows(const Tensor& x_, const std::optional<Tensor>& d_, double threshold) {
  const Tensor x = plain(x_);
  const std::optional<Tensor> d = plain(d_);
  const auto [m, k] = rows_of(x);
  const Call& call = call_of("quantize_rows", {k, dtype_of(x), d.has_value(), bits(threshold)});
  const Quantized made(m, k, threshold, x);
  run(call, m, {address(x), address(d), address(made.q), address(made.rows), address(made.counters)}, x);
  return made;
}

std::pair<Tensor, Quantized> norm_quantize_rows(const Tensor& x_, const std::optional<Tensor>& residual_,
                                                const std::optional<Tensor>& weight_,
                                                const std::optional<Tensor>& bias_, const std::optional<Tensor>& d_,
                                                int64_t kind, double eps, double threshold) {
  const Tensor x = plain(x_);
  const std::optional<Tensor> residual = plain(residual_), weight = plain(weight_), bias = plain(bias_), d = plain(d_);
  const auto [m, k] = rows_of(x);
  const int32_t dtype = dtype_of(x);
  const Call& call = call_of("norm_quantize_rows", {k, dtype, residual.has_value(), dtype_of(weight), dtype_of(bias),
                                                    d.has_value(), kind, bits(eps), bits(threshold)});
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const Tensor sum = empty(residual ? sizes : std::vector<int64_t>{0}, dtype, x);
  const Quantized made(m, k, threshold, x);
  run(call, m,
      {address(x), address(residual), address(weight), address(bias), address(d), address(sum), address(made.q),
       address(made.rows), address(made.counters)},
      x);
  return {sum, made};
}

Tensor quantized_linear(const Tensor& q_, const Tensor& rows_, const Tensor& counters_, const Tensor& qweight_,
                        const Tensor& scale_, const std::optional<Tensor>& bias_, int64_t activation, int64_t n0,
                        int64_t n1, int32_t dtype) {
  const Tensor q = plain(q_), rows = plain(rows_), counters = plain(counters_), qweight = plain(qweight_),
               scale = plain(scale_);
  const std::optional<Tensor> bias = plain(bias_);
  const int64_t planes = q.size(0), m = q.size(1), k = q.size(2), n = qweight.size(0);
  const Call& call = call_of("quantized_linear", {n, k, planes, activation, n0, n1, dtype, dtype_of(bias)});
  constexpr int64_t SILU_MUL = 5;  // Of int8compile/ops/quantized.py.
  const int64_t width = activation == SILU_MUL ? n / 2 : n;
  const Tensor y = n0 ? empty({m * n}, dtype, q) : empty({m, width}, dtype, q);
  run(call, m,
      {address(q), address(rows), address(counters), address(qweight), address(scale), address(bias), address(y)}, q);
  return y;
}

// x times weights [E, N, K], rows by rows: those that `ends` says, or as many for each.
Tensor expert_linear(const char* op, const Tensor& x_, const Tensor& qweight_, const Tensor& scale_,
                     const std::optional<Tensor>& d_, const std::optional<Tensor>& ends_,
                     const std::optional<Tensor>& bias_, double threshold) {
  const Tensor x = plain(x_), qweight = plain(qweight_), scale = plain(scale_);
  const std::optional<Tensor> d = plain(d_), ends = plain(ends_), bias = plain(bias_);
  const auto [m, k] = rows_of(x);
  const int64_t experts = qweight.size(0), n = qweight.size(1);
  const int32_t dtype = dtype_of(x);
  const int64_t dims = d ? d->dim() : 0;
  const Call& call = call_of(op, {experts, n, k, dtype, dims, dtype_of(ends), dtype_of(bias), bits(threshold)});
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  const Tensor y = empty(sizes, dtype, x);
  const Quantized made(m, k, threshold, x);
  run(call, m,
      {address(x), address(d), address(ends), address(made.q), address(made.rows), address(made.counters),
       address(qweight), address(scale), address(bias), address(y)},
      x);
  return y;
}

Tensor weight_only_linear(const Tensor& x_, const Tensor& qweight_, const Tensor& scale_,
                          const std::optional<Tensor>& d_, const std::optional<Tensor>& bias_) {
  const Tensor x = plain(x_), qweight = plain(qweight_), scale = plain(scale_);
  const std::optional<Tensor> d = plain(d_), bias = plain(bias_);
  const auto [m, k] = rows_of(x);
  const int64_t n = qweight.size(0);
  const int32_t dtype = dtype_of(x);
  const Call& call = call_of("weight_only_linear", {n, k, dtype, d.has_value(), dtype_of(bias)});
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  const Tensor y = empty(sizes, dtype, x);
  const Tensor digits = empty({4, m, k}, aoti_torch_dtype_int8(), x);
  const Tensor unit = empty({m}, aoti_torch_dtype_float32(), x);
  run(call, m,
      {address(x), address(d), address(digits), address(unit), address(qweight), address(scale), address(bias),
       address(y)},
      x);
  return y;
}

}  // namespace
}  // namespace int8compile

// In the namespace of the generated code, which declares it where it calls it.
namespace torch::aot_inductor {

// Tells which kernels there are, and loads them; throws unless the GPU is one that they were compiled for.
void int8compile_use_plan(const int8compile::Plan& made, int device, int8compile::CurrentStream stream) {
  using int8compile::Driver;
  const Driver& driver = Driver::get();
  int ordinal, major, minor;
  driver.check(driver.cuInit(0), "the NVIDIA driver cannot be used");
  driver.check(driver.cuDeviceGet(&ordinal, device), "the GPU cannot be used");
  driver.check(driver.cuDeviceGetAttribute(&major, int8compile::MAJOR, ordinal), "the GPU does not say what it is");
  driver.check(driver.cuDeviceGetAttribute(&minor, int8compile::MINOR, ordinal), "the GPU does not say what it is");
  if (major != made.major || minor != made.minor) {
    int8compile::refuse("the package was exported for " + std::string(made.gpu) + ", and this GPU is sm_" +
                        std::to_string(major) + std::to_string(minor) + "; export it on a GPU of this kind");
  }
  int8compile::load_all(made, stream, device, ordinal);
}

}  // namespace torch::aot_inductor

using namespace int8compile;

extern "C" {

AOTITorchError aoti_torch_cuda_quantize_rows(AtenTensorHandle x, AtenTensorHandle* d, double threshold,
                                             AtenTensorHandle* q, AtenTensorHandle* rows, AtenTensorHandle* counters) {
  const Quantized made = quantize_rows(borrowed(x), borrowed(d), threshold);
  give(made.q, q);
  give(made.rows, rows);
  give(made.counters, counters);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cuda_norm_quantize_rows(AtenTensorHandle x, AtenTensorHandle* residual,
                                                  AtenTensorHandle* weight, AtenTensorHandle* bias, AtenTensorHandle* d,
                                                  int64_t kind, double eps, double threshold, AtenTensorHandle* sum,
                                                  AtenTensorHandle* q, AtenTensorHandle* rows,
                                                  AtenTensorHandle* counters) {
  const auto [total, made] = norm_quantize_rows(borrowed(x), borrowed(residual), borrowed(weight), borrowed(bias),
                                                borrowed(d), kind, eps, threshold);
  give(total, sum);
  give(made.q, q);
  give(made.rows, rows);
  give(made.counters, counters);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cuda_quantized_linear(AtenTensorHandle q, AtenTensorHandle rows, AtenTensorHandle counters,
                                                AtenTensorHandle qweight, AtenTensorHandle scale,
                                                AtenTensorHandle* bias, int64_t activation, int64_t n0, int64_t n1,
                                                int32_t dtype, AtenTensorHandle* y) {
  give(quantized_linear(borrowed(q), borrowed(rows), borrowed(counters), borrowed(qweight), borrowed(scale),
                        borrowed(bias), activation, n0, n1, dtype),
       y);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cuda_grouped_linear(AtenTensorHandle x, AtenTensorHandle qweight, AtenTensorHandle scale,
                                              AtenTensorHandle* d, AtenTensorHandle ends, double threshold,
                                              AtenTensorHandle* y) {
  give(expert_linear("grouped_linear", borrowed(x), borrowed(qweight), borrowed(scale), borrowed(d), borrowed(ends),
                     std::nullopt, threshold),
       y);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cuda_batched_linear(AtenTensorHandle x, AtenTensorHandle qweight, AtenTensorHandle scale,
                                              AtenTensorHandle* d, AtenTensorHandle* bias, double threshold,
                                              AtenTensorHandle* y) {
  give(expert_linear("batched_linear", borrowed(x), borrowed(qweight), borrowed(scale), borrowed(d), std::nullopt,
                     borrowed(bias), threshold),
       y);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cuda_weight_only_linear(AtenTensorHandle x, AtenTensorHandle qweight, AtenTensorHandle scale,
                                                  AtenTensorHandle* d, AtenTensorHandle* bias, AtenTensorHandle* y) {
  give(weight_only_linear(borrowed(x), borrowed(qweight), borrowed(scale), borrowed(d), borrowed(bias)), y);
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
