// The Triton kernels of a package for a GPU, and which of them start for which call. int8compile/triton_kernels/plan.py
// writes the values into the package's generated code, after this file.
#ifndef INT8COMPILE_PLAN_H
#define INT8COMPILE_PLAN_H

#include <cstddef>
#include <cstdint>
#include <vector>

namespace int8compile {

// A compiled kernel.
struct Kernel {
  const char* file;  // beside the package's library
  const char* name;  // in the file
  unsigned threads;  // of a program
  unsigned shared;   // bytes of shared memory of a program
};

// The number of programs in one direction: ceil(M / rows) * times, or times if rows is 0; at most `most`, if not 0.
struct Programs {
  int64_t times, rows, most;
};

// An argument of a kernel, with the meaning of `value` for each kind.
struct Argument {
  enum Kind {
    tensor,   // the number of the tensor whose address it is
    scratch,  // none; the argument is the address of the launch's own memory
    rows,     // the divisor of M
    number,   // the bits of an integer or a float, the lowest first
    map,      // an index of `Launch::maps`
  } kind;
  int64_t value;
};

// How the copy engine of sm_90 reads tiles of an int8 matrix.
struct TensorMap {
  size_t tensor;
  int64_t rows, columns;  // rows: -1 for M
  uint32_t tile_rows, tile_columns;
  int swizzle;  // CUtensorMapSwizzle
};

// One call of a kernel.
struct Launch {
  size_t kernel;
  Programs programs[3];
  std::vector<Argument> arguments;
  std::vector<TensorMap> maps;
  int64_t scratch;  // bytes of its own memory for each row, uninitialized
};

// The launches from this number of rows on.
struct Range {
  int64_t rows;
  std::vector<Launch> launches;
};

// An operator, with everything but M that its kernels depend on: the key that launcher.cpp looks up.
struct Call {
  const char* op;
  std::vector<int64_t> key;
  std::vector<Range> ranges;
};

struct Plan {
  const char* gpu;  // "sm_90"
  int major, minor;
  std::vector<Kernel> kernels;
  std::vector<Call> calls;
};

using CurrentStream = int32_t (*)(int32_t device, void** stream);

}  // namespace int8compile

// PyTorch's, with the types of its C functions.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

#endif
