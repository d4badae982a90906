// The stub library of an exported package, which PyTorch's loader opens. It checks the CPU and all the files.
// Then it opens the model's own library, and forwards all calls to it.
//
// The check cannot be in the model's library, because opening a library runs its code: a damaged relocation or start-up
// function would end the process before any check. The stub is small, so that damage rarely hits it. It is compiled for
// the architecture's first version, so that it runs on every CPU.
//
// `stub_contents.h` is written at export (int8compile/exporting/stub.py): LIBRARY, ISA, NEEDS, FILES and FUNCTIONS.
#include <dlfcn.h>
#include <pthread.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <string>

#include "features.h"

namespace {

struct File {
  const char* name;
  uint64_t size;
  uint32_t crc;
};

#include "stub_contents.h"

// AOTIRuntimeError of PyTorch's aoti_runtime/interface.h.
using Status = int32_t;
constexpr Status SUCCESS = 0, FAILURE = 1;

// The CRC-32, as in zip files, of any bytes followed by their own CRC-32, four bytes with the lowest first.
constexpr uint32_t CRC_OF_SEALED = 0x2144df1c;

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
  uint32_t table_[8][256];
};

// Computes the CRC-32 and size of a file. Returns false if it cannot be read.
bool checksum(const std::string& path, uint32_t* crc, uint64_t* size) {
  FILE* file = std::fopen(path.c_str(), "rb");
  if (!file) return false;
  const Crc32 update;
  std::string buffer(1 << 20, '\0');
  *crc = 0;
  *size = 0;
  while (const size_t count = std::fread(&buffer[0], 1, buffer.size(), file)) {
    *crc = update(*crc, reinterpret_cast<const unsigned char*>(buffer.data()), count);
    *size += count;
  }
  const bool whole = !std::ferror(file);
  std::fclose(file);
  return whole;
}

// Each check returns why the package is refused, or "".

std::string check_cpu() {
  std::string missing;
  for (const char* macro : NEEDS) {
    for (const int8compile::Feature* each = int8compile::features; each->macro; ++each) {
      if (std::strcmp(macro, each->macro) != 0 || each->runs_here()) continue;
      missing += (missing.empty() ? "" : ", ") + std::string(macro);
    }
  }
  if (missing.empty()) return "";
  return std::string("the package was exported with isa=") + ISA + " and this CPU has no " + missing +
         "; export it with an isa that this CPU has";
}

std::string check_files(const std::string& itself, const std::string& folder) {
  uint32_t crc;
  uint64_t size;
  const std::string damaged = "the package is damaged or was edited: ";
  const std::string again = " has changed since its export; copy or export it again";
  if (!checksum(itself, &crc, &size) || crc != CRC_OF_SEALED) return damaged + itself.substr(folder.size()) + again;
  for (const File& file : FILES) {
    if (!checksum(folder + file.name, &crc, &size)) {
      return "the package lacks " + std::string(file.name) + "; copy or export it again";
    }
    if (crc != file.crc || size != file.size) return damaged + file.name + again;
  }
  return "";
}

pthread_once_t once = PTHREAD_ONCE_INIT;
void* library = nullptr;
// Why there is no library. It is never freed: other threads may read it when this library is closed.
std::string* refused = nullptr;

// The functions of the model's library.
#define DECLARE(name, parameters, arguments) Status(*name) parameters = nullptr;
struct {
  FUNCTIONS(DECLARE)
} model;
#undef DECLARE

std::string open_model() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<const void*>(&open_model), &info) || !info.dli_fname) {
    return "the package cannot be checked, because the path of its library is unknown";
  }
  const std::string itself = info.dli_fname;
  const std::string folder = itself.substr(0, itself.rfind('/') + 1);
  std::string why = check_cpu();
  if (why.empty()) why = check_files(itself, folder);
  if (!why.empty()) return why;
  // The loader would look for a name without a folder among the system's libraries.
  library = dlopen(((folder.empty() ? "./" : folder) + LIBRARY).c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) return std::string("the model's library cannot be opened: ") + dlerror();
#define FIND(name, parameters, arguments) \
  model.name = reinterpret_cast<Status(*) parameters>(dlsym(library, #name)); \
  if (!model.name) return std::string("the model's library lacks ") + #name + "; export it again";
  FUNCTIONS(FIND)
#undef FIND
  return "";
}

void open_once() {
  const std::string why = open_model();
  if (why.empty()) return;
  refused = new std::string("int8compile: " + why);
  // The functions of a model's library report errors in this way. Callers who catch them redirect std::cerr.
  std::cerr << "Error: " << *refused << '\n';
}

bool opened() {
  pthread_once(&once, &open_once);
  return !refused;
}

__attribute__((destructor)) void close_model() {
  if (library) dlclose(library);
}

}  // namespace

extern "C" {

#define FORWARD(name, parameters, arguments) \
  __attribute__((visibility("default"))) Status name parameters { return opened() ? model.name arguments : FAILURE; }
FUNCTIONS(FORWARD)
#undef FORWARD

#ifdef HAS_LAST_ERROR
__attribute__((visibility("default"))) Status AOTInductorGetLastError(const char** message) {
  if (opened()) {
    using Function = Status (*)(const char**);
    static const auto last_error = reinterpret_cast<Function>(dlsym(library, "AOTInductorGetLastError"));
    return last_error ? last_error(message) : FAILURE;
  }
  *message = refused->c_str();
  return SUCCESS;
}
#endif

}  // extern "C"
