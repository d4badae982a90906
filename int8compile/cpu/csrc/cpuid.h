// What an x86-64 CPU and its operating system allow.
#pragma once

#include <cstdint>

namespace int8compile {

enum Register { EAX, EBX, ECX, EDX };

// Registers that the operating system must save (XCR0).
constexpr uint64_t YMM = 0x6, ZMM = 0xe6, TILES = 0x60000;

// A bit of CPUID's answer; false where the CPU does not know the leaf.
bool has_bit(uint32_t leaf, uint32_t subleaf, Register word, int position);
bool os_saves(uint64_t registers);

bool has_avx2();
bool has_avxvnni();
bool has_avx512vnni();
bool has_amx();

}  // namespace int8compile
