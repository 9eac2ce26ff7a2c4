// The self-tests' kernels as a Python module; addresses are those of torch tensors (data_ptr()).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "selftest.h"

namespace py = pybind11;
using namespace segattn::selftest;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("cases", [] {
    std::vector<std::string> names;
    for (const Case& c : cases()) names.push_back(c.name);
    return names;
  });
  m.def(
      "run",
      [](const std::string& name, bool broken, uintptr_t in, uintptr_t out, int size) {
        for (const Case& c : cases()) {
          if (c.name == name) return c.run(broken, {reinterpret_cast<float*>(in), reinterpret_cast<float*>(out), size});
        }
        throw std::invalid_argument("no self-test kernel is called " + name);
      },
      py::arg("name"), py::arg("broken"), py::arg("input"), py::arg("output"), py::arg("size"));
}
