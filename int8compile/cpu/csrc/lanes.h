// Vector types. Every variant includes this file inside its own anonymous namespace, and later tiles.h, which includes
// rows.h and epilogue.h: the functions are compiled for each instruction set, and the linker must not merge them.
//
// The variant has defined VL, the number of float32 in a vector register. Operations on vectors of this size become
// single instructions. Compilers split wider vectors, even by element for comparisons and conversions.

typedef int32_t Ints __attribute__((vector_size(4 * VL)));
typedef uint32_t Words __attribute__((vector_size(4 * VL)));
typedef float Floats __attribute__((vector_size(4 * VL)));
typedef uint16_t Halves __attribute__((vector_size(2 * VL)));
// Half as many elements: as doubles they fill a register.
constexpr int DL = VL / 2;
typedef int32_t FewInts __attribute__((vector_size(4 * DL)));
typedef float FewFloats __attribute__((vector_size(4 * DL)));
typedef double Doubles __attribute__((vector_size(8 * DL)));

template <typename V>
inline V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V>
inline void save(void* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}
