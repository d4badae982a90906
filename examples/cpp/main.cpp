// Generate with a language model that `int8compile export` wrote. Needs libtorch and nothing else.
//
//   generate model.pt2 COUNT TOKEN...
//
// reads the token numbers of a prompt and prints those of the next COUNT tokens, the likeliest at every step.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <charconv>
#include <filesystem>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// The dtype and sizes of an input or an output.
struct Layout {
  at::ScalarType dtype;
  std::vector<int64_t> sizes;  // -1 for a size that changes from call to call.
};

at::ScalarType dtype_of(const std::string& name) {
  if (name == "int64") return at::kLong;
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float16") return at::kHalf;
  throw std::runtime_error("a tensor has the dtype " + name + ", which this program does not know");
}

// Reads for each tensor its dtype, number of dimensions and sizes: "int64 2 1 -1 int64 0 float32 4 1 2 32 16 ...".
std::vector<Layout> layouts_of(const std::string& line) {
  std::vector<Layout> found;
  std::istringstream words(line);
  std::string dtype;
  size_t dimensions;
  while (words >> dtype >> dimensions) {
    Layout& layout = found.emplace_back(Layout{dtype_of(dtype), std::vector<int64_t>(dimensions)});
    for (int64_t& size : layout.sizes) words >> size;
  }
  return found;
}

std::vector<int64_t> generate(const std::string& path, size_t count, std::vector<int64_t> tokens) {
  c10::InferenceMode guard;
  if (!std::filesystem::is_regular_file(path)) throw std::runtime_error("no such file");
  torch::inductor::AOTIModelPackageLoader model(path);
  // Inputs: the tokens to read, the number of tokens read before, and the cache, which the model writes to.
  const std::vector<Layout> inputs = layouts_of(model.get_metadata()["int8compile.inputs"]);
  if (inputs.size() < 3 || inputs[2].sizes.size() != 4) throw std::runtime_error("no exported StaticCacheDecoder");
  const size_t length = inputs[2].sizes[2];  // [1, heads, length, head_dim]
  if (tokens.size() + count > length) {
    throw std::runtime_error("the cache has room for " + std::to_string(length) + " tokens, not for " +
                             std::to_string(tokens.size()) + " and " + std::to_string(count) + " more");
  }
  const int64_t vocabulary = layouts_of(model.get_metadata()["int8compile.outputs"]).at(0).sizes.at(1);
  for (const int64_t token : tokens) {
    if (token >= vocabulary) {
      throw std::runtime_error("there is no token " + std::to_string(token) + ", only " + std::to_string(vocabulary));
    }
  }
  std::vector<at::Tensor> arguments(2);
  for (size_t i = 2; i < inputs.size(); ++i) arguments.push_back(at::zeros(inputs[i].sizes, inputs[i].dtype));

  std::vector<int64_t> generated;
  int64_t start = 0;
  while (generated.size() < count) {
    arguments[0] = at::tensor(tokens, at::kLong).unsqueeze(0);
    arguments[1] = at::scalar_tensor(start, at::kLong);
    const at::Tensor logits = model.run(arguments)[0];  // [1, vocabulary]
    start += tokens.size();
    tokens = {logits.argmax().item<int64_t>()};  // From now on, one at a time.
    generated.push_back(tokens[0]);
  }
  return generated;
}

bool parse(const std::string& text, int64_t* number) {
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, *number);
  return error == std::errc() && stop == end && *number >= 0;
}

// Returns the cause of an error in one line. The library in the file writes it to std::cerr; some exceptions lack it.
std::string reason(const std::exception& error, const std::string& written) {
  const std::string mark = "Error: ";
  const size_t found = written.rfind(mark);
  const std::string text = found == std::string::npos ? error.what() : written.substr(found + mark.size());
  return text.substr(0, text.find('\n'));
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<int64_t> numbers(argc > 3 ? argc - 2 : 0);
  bool valid = argc > 3;
  for (size_t i = 0; i < numbers.size(); ++i) valid &= parse(argv[i + 2], &numbers[i]);
  if (!valid) {
    std::cerr << "usage: generate model.pt2 COUNT TOKEN..." << std::endl;
    return 2;
  }
  std::vector<int64_t> generated;
  std::string why;
  std::ostringstream written;
  std::streambuf* const terminal = std::cerr.rdbuf(written.rdbuf());
  try {
    generated = generate(argv[1], numbers[0], {numbers.begin() + 1, numbers.end()});
  } catch (const std::exception& error) {
    why = reason(error, written.str());
  }
  std::cerr.rdbuf(terminal);
  if (!why.empty()) {
    std::cerr << "generate: " << argv[1] << ": " << why << std::endl;
    return 1;
  }
  std::cerr << written.str();  // Warnings.
  const char* separator = "";
  for (const int64_t token : generated) {
    std::cout << separator << token;
    separator = " ";
  }
  std::cout << std::endl;
}
