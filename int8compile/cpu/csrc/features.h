// The features of CPUs that compilers use, by compilers' names.
#pragma once

namespace int8compile {

struct Feature {
  // The macro that is 1 where code may use the feature.
  const char* macro;
  bool (*runs_here)();
};

// The list ends with a null macro. It is empty on architectures whose code needs their first version only.
extern const Feature features[];

}  // namespace int8compile
