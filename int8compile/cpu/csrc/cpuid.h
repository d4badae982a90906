// Checks of what an x86-64 CPU and its operating system support.
#pragma once

#include <cstdint>

namespace int8compile {

enum Register { EAX, EBX, ECX, EDX };

// The bits of XCR0 for registers that the operating system saves.
constexpr uint64_t YMM = 0x6, ZMM = 0xe6, TILES = 0x60000;

// Returns a bit of CPUID's answer; false if the CPU does not know the leaf.
bool has_bit(uint32_t leaf, uint32_t subleaf, Register word, int position);
bool os_saves(uint64_t registers);

bool has_avx2();
bool has_avxvnni();
bool has_avx512vnni();
bool has_amx();

}  // namespace int8compile
