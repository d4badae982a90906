// What the parts of an exported package's own library share.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

namespace int8compile {

using torch::stable::Tensor;

// A tensor of the caller's, for as long as the result lives.
Tensor borrowed(AtenTensorHandle handle);
std::optional<Tensor> borrowed(AtenTensorHandle* handle);

// Hands a tensor to the caller.
void give(const Tensor& tensor, AtenTensorHandle* result);

// Ends loading or a call. The caller is C++ of the same library, AOTInductor's.
[[noreturn]] void refuse(const std::string& why);

// The folder that this library lies in: the loader unpacks a package to a folder of its own.
std::string folder();

}  // namespace int8compile
