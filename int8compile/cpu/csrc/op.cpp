// Registers the operators, and gives Python a few functions that it calls through ctypes.
#include <torch/csrc/stable/library.h>

#include <string>

#include "features.h"
#include "operators.h"

STABLE_TORCH_LIBRARY_IMPL(int8compile, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&int8compile::pack_weight));
  m.impl("quantize_weight", TORCH_BOX(&int8compile::quantized_weight));
  m.impl("linear", TORCH_BOX(&int8compile::unpacked_linear));
  m.impl("linear_no_grad", TORCH_BOX(&int8compile::unpacked_linear));
  m.impl("packed_linear", TORCH_BOX(&int8compile::packed_linear));
  m.impl("packed_linear_no_grad", TORCH_BOX(&int8compile::packed_linear));
  m.impl("packed_linear_pair_no_grad", TORCH_BOX(&int8compile::packed_linear_pair));
  m.impl("packed_linear_triple_no_grad", TORCH_BOX(&int8compile::packed_linear_triple));
  m.impl("batched_linear", TORCH_BOX(&int8compile::batched_linear));
  m.impl("packed_batched_linear", TORCH_BOX(&int8compile::packed_batched_linear));
  m.impl("weight_only_linear", TORCH_BOX(&int8compile::unpacked_weight_only_linear));
  m.impl("weight_only_linear_no_grad", TORCH_BOX(&int8compile::unpacked_weight_only_linear));
  m.impl("packed_weight_only_linear", TORCH_BOX(&int8compile::packed_weight_only_linear));
  m.impl("packed_weight_only_linear_no_grad", TORCH_BOX(&int8compile::packed_weight_only_linear));
}

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// The names of the variants that run on this machine, fastest first, separated by spaces.
EXPORTED const char* int8compile_variants() {
  static const std::string names = [] {
    std::string result;
    for (const int8compile::Variant* const* each = int8compile::variants; *each; ++each) {
      if ((*each)->runs_here()) result += (result.empty() ? "" : " ") + std::string((*each)->name);
    }
    return result;
  }();
  return names.c_str();
}

// The variant that is used.
EXPORTED const char* int8compile_variant() { return int8compile::variant().name; }

// Has a variant used from now on, by all threads. Returns 0 if this machine cannot run it.
EXPORTED int int8compile_use_variant(const char* name) { return int8compile::use_variant(name); }

// The macros of a CPU's features, separated by spaces.
EXPORTED const char* int8compile_features() {
  static const std::string macros = [] {
    std::string result;
    for (const int8compile::Feature* each = int8compile::features; each->macro; ++each) {
      result += (result.empty() ? "" : " ") + std::string(each->macro);
    }
    return result;
  }();
  return macros.c_str();
}

}  // extern "C"
