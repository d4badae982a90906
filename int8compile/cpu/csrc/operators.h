// The operators of int8compile/ops/linears.py for CPU tensors: `cpu::` functions, declared in declared.h.
#pragma once

#include "linear.h"
#include "tensors.h"

namespace int8compile {

// The variant that is used.
const Variant& variant();
// Uses a variant from now on, in all threads. Returns whether this machine can run it.
bool use_variant(const char* name);

}  // namespace int8compile
