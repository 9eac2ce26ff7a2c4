// From a tensor's dtype to a template argument.
#pragma once

#include <stdexcept>

#include "checks/check.h"
#include "cpu/common/simd.h"

namespace segattn::cpu {

// Calls use.operator()<T>() with the element type of `dtype`, which the op's checks have accepted.
template <class Use>
void dispatch_dtype(ScalarType dtype, const Use& use) {
  switch (dtype) {
    case ScalarType::Float:
      return use.template operator()<float>();
    case ScalarType::Double:
      return use.template operator()<double>();
    case ScalarType::BFloat16:
      return use.template operator()<BFloat16>();
    case ScalarType::Half:
      return use.template operator()<Half>();
    default:
      throw std::logic_error("segattn: dtype passed the checks but has no CPU kernel");
  }
}

}  // namespace segattn::cpu
