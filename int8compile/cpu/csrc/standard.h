// The standard headers for every variant. They come before the headers that are included inside a namespace.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
