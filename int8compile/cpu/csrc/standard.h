// The standard headers of every variant: those that a header inside a namespace needs must come before it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

// A function in which a * b + c may be one instruction with one rounding; everything else is built without. Clang wants
// to be told inside the function.
#if defined(__clang__)
#define FUSED_MULTIPLY_ADD __attribute__((noinline))
#define ALLOW_FUSED _Pragma("clang fp contract(fast)")
#else
#define FUSED_MULTIPLY_ADD __attribute__((noinline, optimize("fp-contract=fast")))
#define ALLOW_FUSED
#endif
