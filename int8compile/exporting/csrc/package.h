// Functions that the parts of an exported package's own library share.
#pragma once

#include <string>
#include <tuple>
#include <utility>

#include "tensors.h"

namespace int8compile {

// Returns an argument of a C function as C++ functions take it. The caller's tensor must outlive the result.
inline Tensor borrowed(AtenTensorHandle handle) {
  AtenTensorHandle copy;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &copy));
  return Tensor(copy);
}
inline Maybe borrowed(AtenTensorHandle* handle) { return handle ? Maybe(borrowed(*handle)) : std::nullopt; }
template <typename Number>
inline Number borrowed(Number number) {
  return number;
}

// Hands a tensor to the caller.
inline void give(const Tensor& tensor, AtenTensorHandle* result) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.get(), result));
}
template <typename... Tensors, typename... Handles>
inline void give(const std::tuple<Tensors...>& tensors, Handles... results) {
  std::apply([&](const Tensors&... each) { (give(each, results), ...); }, tensors);
}

template <typename Result, typename... Parameters, typename Given, size_t... IN, size_t... OUT>
inline void call(Result (*compute)(Parameters...), const Given& given, std::index_sequence<IN...>,
                 std::index_sequence<OUT...>) {
  give(compute(borrowed(std::get<IN>(given))...), std::get<sizeof...(IN) + OUT>(given)...);
}

// Returns the body of a C function: it computes an operator of its first arguments, and gives results to the others.
// Errors are thrown, because the caller is C++ of the same library. AOTInductor's runtime writes their text to stderr,
// and puts errors of calls into the exception that the user gets.
template <typename Result, typename... Parameters>
inline auto c_function(Result (*compute)(Parameters...)) {
  return [compute](auto... given) {
    call(compute, std::make_tuple(given...), std::index_sequence_for<Parameters...>(),
         std::make_index_sequence<sizeof...(given) - sizeof...(Parameters)>());
    return AOTI_TORCH_SUCCESS;
  };
}

// Ends loading or a call with an error.
[[noreturn]] void refuse(const std::string& why);

// The folder of this library: the loader unpacks a package to a folder of its own.
std::string folder();

}  // namespace int8compile
