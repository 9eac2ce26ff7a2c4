// Calls of torch's C interface and of its stable functions that allocate.
#pragma once

#include <cstdint>
#include <iomanip>
#include <optional>
#include <sstream>
#include <stdexcept>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

// Throws std::runtime_error naming the call if it fails. The headers of torch 2.10 and 2.11 lack the macro that adds
// torch's own message, such as that of a failed allocation.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define SEGATTN_CHECK_TORCH(call) STABLE_TORCH_ERROR_CODE_CHECK(call)
#else
#define SEGATTN_CHECK_TORCH(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace segattn {

inline int64_t element_bytes(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    default:
      return 1;
  }
}

// allocate(), which makes a tensor. If it fails, throws std::runtime_error with the bytes, the shape and the device
// (device_index: -1 on the CPU): torch before 2.13 does not pass its own message on. _out_of_memory.py looks for this
// message.
template <class Allocate>
torch::stable::Tensor allocating(
    torch::headeronly::IntHeaderOnlyArrayRef sizes, torch::headeronly::ScalarType dtype, int32_t device_index,
    const Allocate& allocate) {
  try {
    return allocate();
  } catch (const std::runtime_error& error) {
    double mib = static_cast<double>(element_bytes(dtype)) / (1 << 20);
    std::ostringstream shape;
    for (std::size_t d = 0; d < sizes.size(); ++d) {
      mib *= static_cast<double>(sizes[d]);
      shape << (d == 0 ? "" : ", ") << sizes[d];
    }
    std::ostringstream message;
    message << "segattn_ops: cannot allocate " << std::fixed << std::setprecision(1) << mib << " MiB, shape ("
            << shape.str() << "), on ";
    if (device_index < 0) {
      message << "the CPU";
    } else {
      message << "cuda:" << device_index;
    }
    throw std::runtime_error(message.str() + ": " + error.what());
  }
}

// The tensor, copied if it is not contiguous.
inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& tensor) {
  if (tensor.is_contiguous()) {
    return tensor;
  }
  return allocating(tensor.sizes(), tensor.scalar_type(), tensor.get_device_index(), [&] {
    return torch::stable::contiguous(tensor);
  });
}

inline std::optional<torch::stable::Tensor> as_contiguous(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor.has_value() ? std::optional(as_contiguous(*tensor)) : std::nullopt;
}

}  // namespace segattn
