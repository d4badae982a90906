// What a compiler may use of a CPU, by the names that compilers give it.
#pragma once

namespace int8compile {

struct Feature {
  // The macro that is 1 where code may use it.
  const char* macro;
  bool (*runs_here)();
};

// Ends with a null macro. Empty on architectures whose code needs nothing beyond their first version.
extern const Feature features[];

}  // namespace int8compile
