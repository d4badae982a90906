// The standard headers of every variant: those that a header inside a namespace needs must come before it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
