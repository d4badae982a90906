// A program without torch that calls `linear` once, in one thread: `count VARIANT M K N`. benchmarks/instructions.py runs
// it in callgrind, which counts the instructions inside of `linear`. Without arguments it lists the variants that run
// here, which in callgrind are fewer.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "linear.h"

using namespace int8compile;

namespace {

void at_once(int64_t begin, int64_t end, int64_t, Body run, void* context) { run(begin, end, context); }

void call(const Variant& variant, int64_t m, int64_t k, int64_t n) {
  std::vector<int8_t> q(n * k);
  for (int64_t i = 0; i < n * k; ++i) q[i] = int8_t(i * 7 % 255 - 127);
  std::vector<uint8_t> packed(panels_for(n) * LANES * padded(k));
  pack(q.data(), n, k, packed.data(), at_once);
  const std::vector<float> scale(n, 0.01f), d(k, 1.0f);
  std::vector<float> x(m * k), y(m * n);
  for (int64_t i = 0; i < m * k; ++i) x[i] = float(i * 13 % 101 - 50);
  x[k / 2] = 5000;  // an outlier
  const Weight weight = {packed.data(), scale.data(), nullptr, n};
  const Output output = {y.data(), n, Dtype::float32};
  linear(variant, {x.data(), Dtype::float32, m, k}, d.data(), 12.0, &weight, &output, 1, at_once);
}

}  // namespace

int main(int count, char** arguments) {
  for (const Variant* const* each = variants; *each; ++each) {
    if (!(*each)->runs_here()) continue;
    if (count == 1) std::puts((*each)->name);
    if (count != 5 || std::strcmp((*each)->name, arguments[1]) != 0) continue;
    call(**each, std::atoll(arguments[2]), std::atoll(arguments[3]), std::atoll(arguments[4]));
    return 0;
  }
  return count != 1;
}
