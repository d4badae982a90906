// Included first by every variant inside its own anonymous namespace, as rows.h, epilogue.h and tiles.h are: their
// functions are compiled once for each instruction set and must not be merged by the linker.

// Vectors of one panel; compilers split them into registers of the width they have.
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef double Doubles __attribute__((vector_size(8 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

template <typename V>
inline V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}
