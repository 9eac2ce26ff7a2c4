// Runs an AOTInductor package that contains segattn_ops' operators, without Python: for inputs of any size that the
// package was exported for.
//
//   run_package PACKAGE INPUT OUTPUT LIBRARY...
//
// PACKAGE is a .pt2 file, INPUT a tensor that torch.save wrote, OUTPUT a tensor for torch.load. The LIBRARYs are those
// of segattn_ops.library_paths(), in their order. docs/deployment.md exports a package and builds this program.

#include <cstddef>
#include <dlfcn.h>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

namespace {

// The operators register themselves when their library is loaded. It stays loaded until the program ends.
void load_operators(const char* library) {
  if (dlopen(library, RTLD_NOW | RTLD_LOCAL) == nullptr) {
    throw std::runtime_error(dlerror());
  }
}

at::Tensor read_tensor(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("cannot read " + path);
  }
  return torch::jit::pickle_load({std::istreambuf_iterator<char>(file), {}}).toTensor();
}

void write_tensor(const std::string& path, const at::Tensor& tensor) {
  const std::vector<char> bytes = torch::jit::pickle_save(tensor);
  std::ofstream file(path, std::ios::binary);
  if (!file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()))) {
    throw std::runtime_error("cannot write " + path);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) {
    std::cerr << "usage: " << argv[0] << " PACKAGE INPUT OUTPUT LIBRARY...\n";
    return 2;
  }
  try {
    for (int i = 4; i < argc; ++i) {
      load_operators(argv[i]);
    }
    torch::inductor::AOTIModelPackageLoader package(argv[1]);
    const std::vector<at::Tensor> outputs = package.run({read_tensor(argv[2])});
    write_tensor(argv[3], outputs.at(0));
    std::cout << "input to output: " << outputs.at(0).sizes() << '\n';
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
