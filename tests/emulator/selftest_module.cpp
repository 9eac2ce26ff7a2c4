// The self-tests' kernels as a Python module; addresses are those of torch tensors (data_ptr()).
#include <stdexcept>

#include <cuda.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "selftest.h"

namespace py = pybind11;
using namespace segattn::selftest;

namespace {

void run(
    std::initializer_list<const std::vector<Case>*> lists, const std::string& name, bool broken,
    const Buffers& buffers) {
  for (const std::vector<Case>* list : lists) {
    for (const Case& c : *list) {
      if (c.name == name)
        return c.run(broken, buffers);
    }
  }
  throw std::invalid_argument("no self-test kernel is called " + name);
}

std::vector<std::string> names(const std::vector<Case>& all) {
  std::vector<std::string> result;
  for (const Case& c : all)
    result.push_back(c.name);
  return result;
}

Buffers buffers(uintptr_t in, uintptr_t out, int size) {
  return {reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out), size};
}

// The result of cuTensorMapEncodeTiled for 16-bit elements.
int encode(
    uintptr_t address, const std::vector<cuuint64_t>& sizes, const std::vector<cuuint64_t>& strides,
    const std::vector<cuuint32_t>& box, const std::vector<cuuint32_t>& element_strides, int swizzle) {
  CUtensorMap map;
  return cuTensorMapEncodeTiled(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, cuuint32_t(sizes.size()), reinterpret_cast<void*>(address), sizes.data(),
      strides.data(), box.data(), element_strides.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CUtensorMapSwizzle(swizzle),
      CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("cases", [] { return names(cases()); });
  m.def("bulk_cases", [] { return names(bulk_cases()); });
  m.def("wgmma_cases", [] { return names(wgmma_cases()); });
  m.def(
      "run_case",
      [](const std::string& name, bool broken, uintptr_t in, uintptr_t out, int size) {
        run({&cases(), &wgmma_cases(), &bulk_cases()}, name, broken, buffers(in, out, size));
      },
      py::arg("name"), py::arg("broken"), py::arg("input"), py::arg("output"), py::arg("size"));
  m.def(
      "run_instruction",
      [](const std::string& name, uintptr_t in, uintptr_t out, int size) {
        run({&instructions(), &wgmma_instructions(), &bulk_instructions()}, name, false, buffers(in, out, size));
      },
      py::arg("name"), py::arg("input"), py::arg("output"), py::arg("size"));
  m.def(
      "encode", &encode, py::arg("address"), py::arg("sizes"), py::arg("strides"), py::arg("box"),
      py::arg("element_strides"), py::arg("swizzle"));
}
