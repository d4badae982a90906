// What an exported package carries besides its model: the operators as C functions, which the generated code calls
// without the dispatcher, and the check that it runs before anything else.
//
// Errors are thrown: the caller is C++ of the same library. AOTInductor's runtime writes their text to stderr, and those
// of calls are in the exception that its user gets.
#include "package.h"

#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <fstream>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "features.h"
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

namespace {

// CRC-32 as in zip files (polynomial 0xedb88320), eight bytes at a time.
class Crc32 {
 public:
  Crc32() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = (c & 1) ? 0xedb88320u ^ (c >> 1) : c >> 1;
      table_[0][i] = c;
    }
    for (size_t t = 1; t < 8; ++t) {
      for (uint32_t i = 0; i < 256; ++i) table_[t][i] = table_[0][table_[t - 1][i] & 255] ^ (table_[t - 1][i] >> 8);
    }
  }

  uint32_t operator()(uint32_t crc, const unsigned char* data, size_t size) const {
    crc = ~crc;
    for (; size >= 8; data += 8, size -= 8) {
      uint32_t low = crc ^ (data[0] | data[1] << 8 | data[2] << 16 | uint32_t(data[3]) << 24);
      crc = table_[7][low & 255] ^ table_[6][low >> 8 & 255] ^ table_[5][low >> 16 & 255] ^ table_[4][low >> 24] ^
            table_[3][data[4]] ^ table_[2][data[5]] ^ table_[1][data[6]] ^ table_[0][data[7]];
    }
    for (; size; ++data, --size) crc = table_[0][(crc ^ *data) & 255] ^ (crc >> 8);
    return ~crc;
  }

 private:
  std::array<std::array<uint32_t, 256>, 8> table_;
};

// The CRC-32 of a file and its size; false if it cannot be read.
bool checksum(const std::string& path, uint32_t* crc, uint64_t* size) {
  FILE* file = std::fopen(path.c_str(), "rb");
  if (!file) return false;
  static const Crc32 update;
  std::vector<unsigned char> buffer(1 << 20);
  *crc = 0;
  *size = 0;
  while (const size_t count = std::fread(buffer.data(), 1, buffer.size(), file)) {
    *crc = update(*crc, buffer.data(), count);
    *size += count;
  }
  const bool whole = !std::ferror(file);
  std::fclose(file);
  return whole;
}

void check_files() {
  const std::string base = folder() + "/";
  std::ifstream list(base + "int8compile.crc32");
  std::string line;
  bool any = false;
  while (std::getline(list, line)) {
    std::istringstream fields(line);
    uint32_t expected, crc;
    uint64_t expected_size, size;
    std::string name;
    fields >> std::hex >> expected >> std::dec >> expected_size >> name;
    if (!fields) refuse("the package's list of checksums is damaged; copy or export it again");
    if (!checksum(base + name, &crc, &size)) refuse("the package lacks " + name + "; copy or export it again");
    if (crc != expected || size != expected_size) {
      refuse("the package is damaged or was edited: " + name + " is not as it was exported; copy or export it again");
    }
    any = true;
  }
  if (!any) refuse("the package has no list of checksums (int8compile.crc32); copy or export it again");
}

// `wanted`: macros of `features`, separated by spaces.
void check_cpu(const char* wanted, const char* isa) {
  std::istringstream macros(wanted);
  std::string macro, missing;
  while (macros >> macro) {
    for (const Feature* each = features; each->macro; ++each) {
      if (macro != each->macro || each->runs_here()) continue;
      missing += (missing.empty() ? "" : ", ") + macro;
    }
  }
  if (missing.empty()) return;
  refuse("the package was exported with isa=" + std::string(isa) + " and this CPU has no " + missing +
         "; export it with an isa that this CPU has");
}

}  // namespace
}  // namespace int8compile

// In the namespace of the generated code, which declares it where it calls it.
namespace torch::aot_inductor {

// Throws unless the package is whole and this CPU has what its code was compiled for. Once, however many copies of the
// model its loader makes.
void int8compile_check_package(const char* macros, const char* isa) {
  static std::once_flag once;
  std::call_once(once, [&] {
    int8compile::check_cpu(macros, isa);
    int8compile::check_files();
  });
}

}  // namespace torch::aot_inductor

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
