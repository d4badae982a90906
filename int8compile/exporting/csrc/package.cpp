// The operators for CPUs as C functions, which the generated code of an exported package calls without the dispatcher.
#include "package.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace int8compile {

void refuse(const std::string& why) { throw std::runtime_error("int8compile: " + why); }

std::string folder() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<const void*>(&folder), &info) || !info.dli_fname) {
    refuse("the package's kernels cannot be found, because the path of its library is unknown");
  }
  const std::string path = info.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

}  // namespace int8compile

extern "C" {

#define FUNCTION(name, compute, parameters, arguments) \
  AOTITorchError aoti_torch_cpu_##name parameters {    \
    return int8compile::c_function(&int8compile::cpu::compute) arguments; \
  }
INT8COMPILE_CPU_FUNCTIONS(FUNCTION)

}  // extern "C"
