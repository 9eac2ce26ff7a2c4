// What the self-tests' kernels offer to Python (selftest_module.cpp).
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace segattn::selftest {

struct Buffers {
  const float* in;
  float* out;
  int size;  // elements of `in`; `out` is twice as large
};

struct Case {
  std::string name;
  std::function<void(bool broken, const Buffers&)> run;
};

// Every kernel of selftest_kernels.cu.
const std::vector<Case>& cases();

}  // namespace segattn::selftest
