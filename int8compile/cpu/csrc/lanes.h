// Included first by every variant inside its own anonymous namespace, as rows.h, epilogue.h and tiles.h are: their
// functions are compiled once for each instruction set and must not be merged by the linker.
//
// The variant has said how many float32 its vector registers hold, VL. Vectors of just that size become single
// instructions; wider ones are taken apart by compilers, element by element for comparisons and conversions.

typedef int32_t Ints __attribute__((vector_size(4 * VL)));
typedef uint32_t Words __attribute__((vector_size(4 * VL)));
typedef float Floats __attribute__((vector_size(4 * VL)));
typedef uint16_t Halves __attribute__((vector_size(2 * VL)));
// Half as many, which as doubles fill a register.
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
