// Registers the operators, and exports a few functions that Python calls through ctypes.
#include <torch/csrc/stable/library.h>

#include <string>

#include "features.h"
#include "operators.h"

STABLE_TORCH_LIBRARY_IMPL(int8compile, CPU, m) {
#define OPERATOR(name, compute) m.impl(#name, TORCH_BOX(&int8compile::cpu::compute));
  INT8COMPILE_CPU_OPERATORS(OPERATOR)
#undef OPERATOR
}

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// Returns the names of the variants that run on this machine, fastest first, separated by spaces.
EXPORTED const char* int8compile_variants() {
  static const std::string names = [] {
    std::string result;
    for (auto each = int8compile::variants; *each; ++each) {
      if ((*each)->runs_here()) result += (result.empty() ? "" : " ") + std::string((*each)->name);
    }
    return result;
  }();
  return names.c_str();
}

// Returns the name of the variant that is used.
EXPORTED const char* int8compile_variant() { return int8compile::variant().name; }

// Uses a variant from now on, in all threads. Returns 0 if this machine cannot run it.
EXPORTED int int8compile_use_variant(const char* name) { return int8compile::use_variant(name); }

// Returns the macros of the CPU features that packages check, separated by spaces.
EXPORTED const char* int8compile_features() {
  static const std::string macros = [] {
    std::string result;
    for (auto each = int8compile::features; each->macro; ++each) result += std::string(" ") + each->macro;
    return result;
  }();
  return macros.c_str();
}

}  // extern "C"
