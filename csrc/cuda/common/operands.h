// Tensors as the kernels want them, and what the products are computed with; for all op families.
#pragma once

#include <cstdint>

#include "checks/check.h"
#include "cuda/common/device.h"
#include "cuda/common/element.cuh"
#include "cuda/position/params.h"

namespace segattn::cuda {

// A feature map and the tensor that keeps its memory; PyTorch's allocator reuses memory in stream order, so that it may
// be let go as soon as the kernel is launched.
struct FeatureMap {
  Tensor tensor;
  Operand operand;
};

inline Operand operand_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

// (B, channels, *spatial) with positions next to each other in memory; copied where they are not (channels_last).
inline FeatureMap feature_map(const Tensor& tensor) {
  int64_t expected = 1;
  bool in_order = true;
  for (int64_t d = tensor.dim() - 1; d >= 2; --d) {
    in_order &= tensor.size(d) == 1 || tensor.stride(d) == expected;
    expected *= tensor.size(d);
  }
  const Tensor ready = in_order ? tensor : torch::stable::contiguous(tensor);
  return {ready, operand_of(ready)};
}

// What the products are computed with.
enum class Arithmetic { kFloat16, kBfloat16, kTf32, k3xTf32, kSimt };

inline Arithmetic choose_arithmetic(ScalarType dtype, const DeviceLimits& limits) {
  if (limits.architecture < 80 || dtype == ScalarType::Double) {
    return Arithmetic::kSimt;
  }
  if (dtype == ScalarType::Half) {
    return Arithmetic::kFloat16;
  }
  if (dtype == ScalarType::BFloat16) {
    return Arithmetic::kBfloat16;
  }
  return allow_tf32() ? Arithmetic::kTf32 : Arithmetic::k3xTf32;
}

// visit.operator()<T>() with the type the tensors hold
template <class Visit>
void with_element(ScalarType dtype, const Visit& visit) {
  switch (dtype) {
    case ScalarType::Half:
      return visit.template operator()<__half>();
    case ScalarType::BFloat16:
      return visit.template operator()<__nv_bfloat16>();
    case ScalarType::Float:
      return visit.template operator()<float>();
    default:
      return visit.template operator()<double>();
  }
}

inline int position_count(const char* op, const char* name, int64_t positions) {
  if (positions > INT32_MAX) {
    fail(op, name, " must have fewer than 2^31 positions (got ", positions, ")");
  }
  return static_cast<int>(positions);
}

}  // namespace segattn::cuda
