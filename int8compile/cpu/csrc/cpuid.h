// What an x86-64 CPU and its operating system allow.
#pragma once

namespace int8compile {

bool has_avx2();
bool has_avxvnni();
bool has_avx512vnni();
bool has_amx();

}  // namespace int8compile
