// The self-tests' kernels, as selftest_module.cpp exposes them to Python.
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace segattn::selftest {

struct Buffers {
  const float* in;
  float* out;
  int size;
};

struct Case {
  std::string name;
  std::function<void(bool broken, const Buffers&)> run;
};

// The kernels with a fault and a corrected twin (selftest_kernels.cu).
const std::vector<Case>& cases();

// The same of bulk copies, memory barriers and clusters (selftest_bulk.cu).
const std::vector<Case>& bulk_cases();
// A launch of a cluster: `size` is 100 times the blocks of a cluster and the blocks of the grid.
const std::vector<Case>& bulk_instructions();

// Single instructions (selftest_instructions.cu); they ignore `broken`.
const std::vector<Case>& instructions();

// The same for matrix products of a warpgroup (selftest_wgmma.cu).
const std::vector<Case>& wgmma_instructions();
const std::vector<Case>& wgmma_cases();

}  // namespace segattn::selftest
