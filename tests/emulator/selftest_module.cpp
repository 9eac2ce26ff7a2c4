// The self-tests' kernels as a Python module; addresses are those of torch tensors (data_ptr()).
#include <stdexcept>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "selftest.h"

namespace py = pybind11;
using namespace segattn::selftest;

namespace {

void run(const std::vector<Case>& all, const std::string& name, bool broken, const Buffers& buffers) {
  for (const Case& c : all) {
    if (c.name == name)
      return c.run(broken, buffers);
  }
  throw std::invalid_argument("no self-test kernel is called " + name);
}

Buffers buffers(uintptr_t in, uintptr_t out, int size) {
  return {reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out), size};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("cases", [] {
    std::vector<std::string> names;
    for (const Case& c : cases())
      names.push_back(c.name);
    return names;
  });
  m.def(
      "run_case",
      [](const std::string& name, bool broken, uintptr_t in, uintptr_t out, int size) {
        run(cases(), name, broken, buffers(in, out, size));
      },
      py::arg("name"), py::arg("broken"), py::arg("input"), py::arg("output"), py::arg("size"));
  m.def(
      "run_instruction",
      [](const std::string& name, uintptr_t in, uintptr_t out, int size) {
        run(instructions(), name, false, buffers(in, out, size));
      },
      py::arg("name"), py::arg("input"), py::arg("output"), py::arg("size"));
}
