#include "operators.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

using torch::headeronly::ScalarType;

namespace int8compile {

namespace {

std::atomic<const Variant*> selected{nullptr};

}  // namespace

const Variant& variant() {
  const Variant* chosen = selected.load(std::memory_order_relaxed);
  if (chosen) return *chosen;
  for (const Variant* const* each = variants;; ++each) {
    if (!(*each)->runs_here()) continue;
    selected.store(*each);
    return **each;
  }
}

bool use_variant(const char* name) {
  for (const Variant* const* each = variants; *each; ++each) {
    if (std::strcmp((*each)->name, name) == 0 && (*each)->runs_here()) {
      selected.store(*each);
      return true;
    }
  }
  return false;
}

namespace {

void parallel_for(int64_t begin, int64_t end, int64_t grain, Body run, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, run, context));
}

Dtype checked_dtype(const Tensor& x, const char* op) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      STD_TORCH_CHECK(false, op, ": x must be float32, float16 or bfloat16");
  }
}

// An uninitialized y of x [..., K] and N outputs.
Tensor new_output(const Tensor& x, int64_t n) {
  return empty(sizes_with(x, n), dtype_of(x), aoti_torch_device_type_cpu(), 0);
}

Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

template <typename Sizes>
std::string text(const Sizes& sizes) {
  std::string result;
  for (const int64_t size : sizes) result += (result.empty() ? "[" : ", ") + std::to_string(size);
  return result.empty() ? "[]" : result + "]";
}

bool same_shape(const Tensor& a, const Tensor& b) {
  return a.dim() == b.dim() && std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin());
}

// MAX_K of int8compile/ops/reference.py.
constexpr int64_t MAX_K = 131071;

// x as contiguous rows, checked.
struct Input {
  Tensor x;
  Activations rows;

  Input(const char* op, const Tensor& x_) : x(dense(x_)) {
    STD_TORCH_CHECK(x.dim() >= 1, op, ": x must be [..., K]");
    rows = {x.const_data_ptr(), checked_dtype(x, op), count_rows(x), x.size(-1)};
    STD_TORCH_CHECK(rows.k <= MAX_K, op, ": x has ", rows.k, " inputs; at most ", MAX_K, " are exact in int32");
  }
};

// The scales and bias of a weight, checked, in float32 and kept alive.
struct Affine {
  Tensor scale;
  Maybe bias;

  Affine(const char* op, const Tensor& scale_, const Maybe& bias_) : scale(dense(scale_)), bias(bias_) {
    STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float, op, ": scale must be float32");
    if (!bias) return;
    const ScalarType dtype = bias->scalar_type();
    STD_TORCH_CHECK(same_shape(*bias, scale), op, ": bias must have the shape of scale");
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
                        dtype == ScalarType::BFloat16,
                    op, ": bias must be of a float dtype");
    if (bias->scalar_type() != ScalarType::Float) bias = torch::stable::to(*bias, ScalarType::Float);
    bias = dense(*bias);
  }

  // Returns the packed weight of `n` outputs from `first` on.
  Weight weight(const uint8_t* packed, int64_t first, int64_t n) const {
    return {packed, static_cast<const float*>(scale.const_data_ptr()) + first,
            bias ? static_cast<const float*>(bias->const_data_ptr()) + first : nullptr, n};
  }

  // Returns the weight of `n` outputs from `first` on, which is not packed and whose rows begin at `rows`.
  Weight unpacked(const int8_t* rows, int64_t first, int64_t n) const {
    Weight result = weight(nullptr, first, n);
    result.rows = rows;
    return result;
  }
};

// A weight [..., N, K] that is not packed, checked and kept alive.
struct PlainWeight {
  Tensor qweight;
  const int8_t* data;

  PlainWeight(const char* op, const Tensor& x, const Tensor& qweight_, const Tensor& scale, int64_t dims)
      : qweight(dense(qweight_)) {
    bool fits = qweight.scalar_type() == ScalarType::Char && qweight.dim() == dims && scale.dim() == dims - 1 &&
                x.dim() >= dims - 1 && x.size(-1) == qweight.size(dims - 1);
    for (int64_t i = 0; fits && i + 1 < dims; ++i) fits = scale.size(i) == qweight.size(i);
    STD_TORCH_CHECK(fits, op, ": x is ", text(x.sizes()), ", qweight ", text(qweight.sizes()), " and scale ",
                    text(scale.sizes()), "; give x [..., K], int8 [..., N, K] and [..., N]");
    data = static_cast<const int8_t*>(qweight.const_data_ptr());
  }
};

const uint8_t* packed_bytes(const char* op, const Tensor& packed, int64_t batch_dims, int64_t panels, int64_t k) {
  const bool fits = packed.scalar_type() == ScalarType::Byte && packed.dim() == batch_dims + 4 &&
                    packed.is_contiguous() && packed.size(batch_dims) == panels &&
                    packed.size(batch_dims + 1) == padded(k) / GROUP && packed.size(batch_dims + 2) == LANES &&
                    packed.size(batch_dims + 3) == GROUP;
  STD_TORCH_CHECK(fits, op, ": packed does not fit x [..., K=", k, "] and scale, or is not contiguous; make it with ",
                  "int8compile.ops.pack_weight");
  return static_cast<const uint8_t*>(packed.const_data_ptr());
}

// The d that rotates x, checked and kept alive: one d [K] for all weights, or one for each weight of `batch`.
struct Rotation {
  Maybe d;
  int64_t step = 0;

  Rotation(const char* op, const Maybe& d_, int64_t k, std::vector<int64_t> batch = {}) {
    if (!d_) return;
    d = dense(*d_);
    step = d->dim() > 1 ? k : 0;
    batch.push_back(k);
    const bool each = d->sizes().size() == batch.size() && std::equal(batch.begin(), batch.end(), d->sizes().begin());
    const bool shared = d->dim() == 1 && d->size(0) == k;
    STD_TORCH_CHECK(d->scalar_type() == ScalarType::Float && (each || shared), op, ": d is ", text(d->sizes()),
                    "; give float32 [", k, "] or ", text(batch));
  }

  const float* of(int64_t weight) const {
    return d ? static_cast<const float*>(d->const_data_ptr()) + weight * step : nullptr;
  }
};

double checked(const char* op, double threshold) {
  STD_TORCH_CHECK(std::isfinite(threshold) && (threshold >= 1 || threshold == 0), op, ": threshold is ", threshold,
                  "; give a finite number >= 1, or 0 for no outliers");
  return threshold;
}

// Multiplies x by several weights that lie one behind the other, with sizes[i] outputs each.
template <size_t COUNT>
std::array<Tensor, COUNT> run(const char* op, const Tensor& x, const Tensor& packed, const Tensor& scale,
                              const Maybe& d, const Maybe& bias, std::array<int64_t, COUNT> sizes, double threshold) {
  const Input input(op, x);
  const Affine affine(op, scale, bias);
  STD_TORCH_CHECK(scale.dim() == 1, op, ": scale must be [N]");
  sizes.back() = scale.size(0);
  int64_t panels = 0;
  for (size_t i = 0; i + 1 < COUNT; ++i) sizes.back() -= sizes[i];
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 0, op, ": the numbers of outputs do not add up to scale's");
    panels += panels_for(size);
  }
  const uint8_t* bytes = packed_bytes(op, packed, 0, panels, input.rows.k);
  const Rotation rotation(op, d, input.rows.k);
  std::array<Tensor, COUNT> results;
  std::array<Weight, COUNT> weights;
  std::array<Output, COUNT> outputs;
  int64_t first = 0, panel = 0;
  for (size_t i = 0; i < COUNT; ++i) {
    results[i] = new_output(input.x, sizes[i]);
    weights[i] = affine.weight(bytes + panel * LANES * padded(input.rows.k), first, sizes[i]);
    outputs[i] = {results[i].mutable_data_ptr(), sizes[i], input.rows.dtype};
    first += sizes[i];
    panel += panels_for(sizes[i]);
  }
  linear(variant(), input.rows, rotation.of(0), checked(op, threshold), weights.data(), outputs.data(), COUNT,
         parallel_for);
  return results;
}

// Multiplies x [B, M, K], with scale and bias [B, N]. `weight_of(b)` returns a weight of the batch.
template <typename F>
Tensor run_batched(const char* op, const Tensor& x, const Tensor& scale, const Maybe& d, double threshold,
                   const F& weight_of) {
  const Input input(op, x);
  checked(op, threshold);
  STD_TORCH_CHECK(x.dim() == 3 && scale.dim() == 2 && x.size(0) == scale.size(0), op,
                  ": give x [B, M, K] and scale [B, N]");
  const int64_t m = x.size(1), k = x.size(2), n = scale.size(1);
  const Rotation rotation(op, d, k, {x.size(0)});
  const Tensor y = new_output(input.x, n);
  for (int64_t b = 0; b < x.size(0); ++b) {
    const Weight weight = weight_of(b);
    const Output output = from_row({y.mutable_data_ptr(), n, input.rows.dtype}, b * m);
    linear(variant(), from_row(input.rows, b * m, m), rotation.of(b), threshold, &weight, &output, 1, parallel_for);
  }
  return y;
}

Tensor run_weight_only(const char* op, const Tensor& x, const Maybe& d, const Weight& weight) {
  const Input input(op, x);
  const Rotation rotation(op, d, input.rows.k);
  const Tensor y = new_output(input.x, weight.n);
  weight_only_linear(variant(), input.rows, rotation.of(0), weight,
                     {y.mutable_data_ptr(), weight.n, input.rows.dtype}, parallel_for);
  return y;
}

}  // namespace

Tensor cpu::linear(const Tensor& x, const Tensor& qweight, const Tensor& scale, const Maybe& d, const Maybe& bias,
                   double threshold) {
  constexpr const char* op = "int8compile::linear";
  const Input input(op, x);
  const Affine affine(op, scale, bias);
  const PlainWeight rows(op, x, qweight, scale, 2);
  const Rotation rotation(op, d, input.rows.k);
  const int64_t n = scale.size(0);
  const Weight weight = affine.unpacked(rows.data, 0, n);
  const Tensor y = new_output(input.x, n);
  const Output output = {y.mutable_data_ptr(), n, input.rows.dtype};
  linear(variant(), input.rows, rotation.of(0), checked(op, threshold), &weight, &output, 1, parallel_for);
  return y;
}

Tensor cpu::packed_linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const Maybe& d,
                          const Maybe& bias, double threshold) {
  return run<1>("int8compile::packed_linear", x, packed, scale, d, bias, {}, threshold)[0];
}

std::tuple<Tensor, Tensor> cpu::packed_linear_pair(const Tensor& x, const Tensor& packed, const Tensor& scale,
                                                   const Maybe& d, const Maybe& bias, int64_t n0, double threshold) {
  const auto y = run<2>("int8compile::packed_linear_pair_no_grad", x, packed, scale, d, bias, {n0, 0}, threshold);
  return {y[0], y[1]};
}

std::tuple<Tensor, Tensor, Tensor> cpu::packed_linear_triple(const Tensor& x, const Tensor& packed,
                                                             const Tensor& scale, const Maybe& d, const Maybe& bias,
                                                             int64_t n0, int64_t n1, double threshold) {
  constexpr const char* op = "int8compile::packed_linear_triple_no_grad";
  const auto y = run<3>(op, x, packed, scale, d, bias, {n0, n1, 0}, threshold);
  return {y[0], y[1], y[2]};
}

Tensor cpu::batched_linear(const Tensor& x, const Tensor& qweight, const Tensor& scale, const Maybe& d,
                           const Maybe& bias, double threshold) {
  constexpr const char* op = "int8compile::batched_linear";
  const Affine affine(op, scale, bias);
  const PlainWeight rows(op, x, qweight, scale, 3);
  const int64_t k = x.size(-1), n = scale.size(1);
  return run_batched(op, x, scale, d, threshold,
                     [&](int64_t b) { return affine.unpacked(rows.data + b * n * k, b * n, n); });
}

Tensor cpu::packed_batched_linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const Maybe& d,
                                  const Maybe& bias, double threshold) {
  constexpr const char* op = "int8compile::packed_batched_linear";
  const Affine affine(op, scale, bias);
  STD_TORCH_CHECK(x.dim() == 3 && scale.dim() == 2 && packed.dim() == 5 && packed.size(0) == scale.size(0), op,
                  ": give x [B, M, K], packed [B, ...] and scale [B, N]");
  const int64_t k = x.size(2), n = scale.size(1);
  const uint8_t* bytes = packed_bytes(op, packed, 1, panels_for(n), k);
  return run_batched(op, x, scale, d, threshold, [&](int64_t b) {
    return affine.weight(bytes + b * panels_for(n) * LANES * padded(k), b * n, n);
  });
}

Tensor cpu::grouped_linear(const Tensor& x, const Tensor& qweight, const Tensor& scale, const Maybe& d,
                           const Tensor& ends, double threshold) {
  constexpr const char* op = "int8compile::grouped_linear";
  checked(op, threshold);
  const Input input(op, x);
  const Affine affine(op, scale, std::nullopt);
  STD_TORCH_CHECK(x.dim() == 2, op, ": x must be [S, K]");
  const PlainWeight weights(op, x, qweight, scale, 3);
  const int64_t experts = scale.size(0), n = scale.size(1), k = x.size(1), rows = x.size(0);
  const Rotation rotation(op, d, k, {experts});
  const Tensor last = dense(torch::stable::to(ends, ScalarType::Long));
  STD_TORCH_CHECK(last.dim() == 1 && last.size(0) == experts, op, ": ends must be [E]");
  const int64_t* end = static_cast<const int64_t*>(last.const_data_ptr());
  const Tensor y = new_output(input.x, n);
  const Output all = {y.mutable_data_ptr(), n, input.rows.dtype};
  int64_t begin = 0;
  for (int64_t e = 0; e < experts; ++e) {
    STD_TORCH_CHECK(begin <= end[e] && end[e] <= rows, op, ": ends must ascend and be at most ", rows, ", x's rows");
    const Activations part = from_row(input.rows, begin, end[e] - begin);
    const Weight weight = affine.unpacked(weights.data + e * n * k, e * n, n);
    const Output output = from_row(all, begin);
    if (part.m > 0) linear(variant(), part, rotation.of(e), threshold, &weight, &output, 1, parallel_for);
    begin = end[e];
  }
  // An empty tensor's address is null, which memset does not allow.
  const int64_t rest = (rows - begin) * n * size_of(all.dtype);
  if (rest) std::memset(from_row(all, begin).data, 0, size_t(rest));
  return y;
}

Tensor cpu::weight_only_linear(const Tensor& x, const Tensor& qweight, const Tensor& scale, const Maybe& d,
                               const Maybe& bias) {
  constexpr const char* op = "int8compile::weight_only_linear";
  const Affine affine(op, scale, bias);
  const PlainWeight rows(op, x, qweight, scale, 2);
  return run_weight_only(op, x, d, affine.unpacked(rows.data, 0, scale.size(0)));
}

Tensor cpu::packed_weight_only_linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const Maybe& d,
                                      const Maybe& bias) {
  constexpr const char* op = "int8compile::packed_weight_only_linear";
  const Affine affine(op, scale, bias);
  STD_TORCH_CHECK(scale.dim() == 1 && x.dim() >= 1, op, ": give x [..., K] and scale [N]");
  const int64_t n = scale.size(0);
  return run_weight_only(op, x, d, affine.weight(packed_bytes(op, packed, 0, panels_for(n), x.size(-1)), 0, n));
}

std::tuple<Tensor, Tensor> cpu::quantize_weight(const Tensor& weight_, const Maybe& d) {
  constexpr const char* op = "int8compile::quantize_weight";
  const Input weight(op, weight_);
  const int64_t k = weight.rows.k;
  std::vector<int64_t> sizes(weight.x.sizes().begin(), weight.x.sizes().end());
  const Tensor q = torch::stable::new_empty(weight.x, sizes, ScalarType::Char);
  sizes.pop_back();
  const Tensor scale = torch::stable::new_empty(weight.x, sizes, ScalarType::Float);
  // The sizes of a weight [K] have no N.
  const int64_t rows = sizes.empty() ? 1 : sizes.back();
  if (!sizes.empty()) sizes.pop_back();
  const Rotation rotation(op, d, k, sizes);
  // All rows at once if they share their d.
  const int64_t n = rotation.step ? rows : weight.rows.m;
  for (int64_t first = 0, i = 0; first < weight.rows.m; first += n, ++i) {
    quantize_weight(variant(), from_row(weight.rows, first, n), rotation.of(i),
                    static_cast<int8_t*>(q.mutable_data_ptr()) + first * k,
                    static_cast<float*>(scale.mutable_data_ptr()) + first, parallel_for);
  }
  return {q, scale};
}

Tensor cpu::pack_weight(const Tensor& qweight_) {
  constexpr const char* op = "int8compile::pack_weight";
  const Tensor qweight = dense(qweight_);
  STD_TORCH_CHECK(qweight.scalar_type() == ScalarType::Char && qweight.dim() >= 2, op,
                  ": qweight must be int8 [..., N, K]");
  const int64_t dims = qweight.dim(), n = qweight.size(dims - 2), k = qweight.size(dims - 1);
  std::vector<int64_t> sizes(qweight.sizes().begin(), qweight.sizes().end() - 2);
  int64_t batch = 1;
  for (int64_t size : sizes) batch *= size;
  for (int64_t size : {panels_for(n), padded(k) / GROUP, int64_t(LANES), int64_t(GROUP)}) sizes.push_back(size);
  const Tensor packed = torch::stable::new_empty(qweight, sizes, ScalarType::Byte);
  for (int64_t b = 0; b < batch; ++b) {
    pack(static_cast<const int8_t*>(qweight.const_data_ptr()) + b * n * k, n, k,
         static_cast<uint8_t*>(packed.mutable_data_ptr()) + b * panels_for(n) * LANES * padded(k), parallel_for);
  }
  return packed;
}

}  // namespace int8compile
