// The Triton kernels of a package for a GPU, and when which of them is started. The values are written into the
// package's generated code, with this file before them, by int8compile/triton_kernels/plan.py.
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

// How many programs in one direction: ceil(M / rows) * times, or times where rows is 0; at most `most`, if not 0.
struct Programs {
  int64_t times, rows, most;
};

// What is handed to a kernel. The kinds with what `value` is.
struct Argument {
  enum Kind {
    tensor,   // the number of the tensor whose address it is
    scratch,  // nothing: it is the address of the launch's own memory
    rows,     // what M is divided by
    number,   // the bits of an integer or a float, the lowest first
    map,      // an index of `Launch::maps`
  } kind;
  int64_t value;
};

// How the copy engine of sm_90 reads a matrix of int8 in tiles.
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
  int64_t scratch;  // bytes of memory of its own for each row; they begin with any values
};

// What is started from so many rows on.
struct Range {
  int64_t rows;
  std::vector<Launch> launches;
};

// An operator with all that its kernels depend on but M: the numbers that it looks itself up by, see launcher.cpp.
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
