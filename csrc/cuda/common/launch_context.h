// What all launches of one operator call share.
#pragma once

#include <cstdint>

#include "checks/check.h"
#include "cuda/common/device.h"
#include "cuda/common/element.cuh"

namespace segattn::cuda {

// The instructions that compute the matrix products.
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

// Makes the device of `like` current for its lifetime. The launches go to PyTorch's current stream there.
struct LaunchContext {
  const char* op;    // named in errors
  ScalarType dtype;  // of the operator's inputs
  DeviceGuard guard;
  DeviceLimits limits;
  cudaStream_t stream;
  Arithmetic arithmetic;

  LaunchContext(const char* op_, const Tensor& like)
      : op(op_),
        dtype(like.scalar_type()),
        guard(like),
        limits(device_limits()),
        stream(current_stream(like)),
        arithmetic(choose_arithmetic(dtype, limits)) {}

  // `value` as an int; an error "op: name rule (got value)" where it does not fit.
  int count(const char* name, const char* rule, int64_t value) const {
    if (value > INT32_MAX) {
      fail(op, name, " ", rule, " (got ", value, ")");
    }
    return static_cast<int>(value);
  }
  int position_count(const char* name, int64_t positions) const {
    return count(name, "must have fewer than 2^31 positions", positions);
  }
};

// visit.operator()<T>() with the element type of the tensors.
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

}  // namespace segattn::cuda
