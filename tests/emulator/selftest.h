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

// Single instructions (selftest_instructions.cu); they ignore `broken`.
const std::vector<Case>& instructions();

}  // namespace segattn::selftest
