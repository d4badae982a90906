// Stands in for an NVIDIA driver (libcuda.so.1) where there is no GPU: kernels are handed to the test that loads it, and
// a kernel's image is the text by which the test knows it. Memory is the CPU's.
#include <cstdint>
#include <cstring>
#include <string>

// Returns 0, or an error code of CUDA.
using Start = int (*)(const char* image, const char* name, const uint32_t* grid, uint32_t threads, uint32_t shared,
                      void** arguments);

namespace {

constexpr int INVALID_CONTEXT = 201;

Start start = nullptr;
int capability = 90;
int contexts[2];                       // Their addresses are those of the two devices.
int numbered = 0;                      // The device that a package for the CPU, which has no number, is loaded on.
thread_local void* current = nullptr;  // A thread has none until it is given one.
bool capturing = false;

struct Function {
  std::string image, name;
  void* context;
  int shared = 48 * 1024;
};

}  // namespace

extern "C" {

void test_set(Start given, int major_minor) {
  start = given;
  capability = major_minor;
}
void test_device(int given) { numbered = given; }
// What this thread uses: a device's context, or none at all.
void test_use(int device) { current = device < 0 ? nullptr : &contexts[device]; }
int test_used() { return current ? int(static_cast<int*>(current) - contexts) : -1; }
// As while a CUDA graph is captured: nothing can be loaded.
void test_capture(bool given) { capturing = given; }

int cuInit(unsigned) { return 0; }
int cuGetErrorString(int, const char** text) {
  *text = "the test's driver refuses";
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal < 0 ? numbered : ordinal;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  if (attribute != 75 && attribute != 76) return 1;
  *value = attribute == 75 ? capability / 10 : capability % 10;
  return 0;
}
int cuCtxGetCurrent(void** found) {
  *found = current;
  return 0;
}
int cuCtxSetCurrent(void* given) {
  current = given;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** found, int device) {
  *found = &contexts[device];
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  if (!current) return INVALID_CONTEXT;
  if (capturing) return 900;
  *module = new Function{static_cast<const char*>(image), "", current};
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  const Function& loaded = *static_cast<Function*>(module);
  *function = new Function{loaded.image, name, loaded.context};
  return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute != 8 || value > 227 * 1024) return 1;
  static_cast<Function*>(function)->shared = value;
  return 0;
}
int cuFuncSetCacheConfig(void*, int) { return 0; }
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared, void*, void** arguments, void** extra) {
  const Function& kernel = *static_cast<Function*>(function);
  if (current != kernel.context) return INVALID_CONTEXT;
  const uint32_t grid[] = {x, y, z};
  if (threads_y != 1 || threads_z != 1 || extra || int(shared) > kernel.shared) return 1;
  return start(kernel.image.c_str(), kernel.name.c_str(), grid, threads, shared, arguments);
}
// What it is asked for, as numbers.
int cuTensorMapEncodeTiled(uint64_t* map, int dtype, uint32_t rank, void* address, const uint64_t* sizes,
                           const uint64_t* strides, const uint32_t* tile, const uint32_t* steps, int interleave,
                           int swizzle, int, int fill) {
  const bool aligned = reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(address) % 16 == 0;
  if (!aligned || dtype != 0 || rank != 2 || steps[0] != 1 || steps[1] != 1 || interleave || fill) return 1;
  const uint64_t made[] = {reinterpret_cast<uintptr_t>(address), sizes[1],          sizes[0], strides[0], tile[1],
                           tile[0],                              uint64_t(swizzle)};
  std::memcpy(map, made, sizeof(made));
  return 0;
}

}  // extern "C"
