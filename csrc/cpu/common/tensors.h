// How host code turns checked tensors into what kernels take: contiguous memory, typed pointers, new results.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "checks/check.h"
#include "cpu/common/simd.h"
#include "torch_call.h"

namespace segattn::cpu {

// The stable `contiguous` and `new_empty` look an operator up by its name and dispatch it: 0.3 and 0.7 us a call.
inline void make_contiguous(Tensor& tensor) {
  if (!tensor.is_contiguous()) {
    tensor = as_contiguous(tensor);
  }
}

inline void make_contiguous(std::optional<Tensor>& tensor) {
  if (tensor.has_value()) {
    make_contiguous(*tensor);
  }
}

template <class... Tensors>
void make_contiguous(Tensors&... tensors)
  requires(sizeof...(Tensors) > 1)
{
  (make_contiguous(tensors), ...);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Null where there is no tensor.
template <class T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor new_tensor(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  std::vector<std::int64_t> strides(sizes.size());
  std::int64_t stride = 1;
  for (std::size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<std::int64_t>(sizes[d], 1);
  }
  return allocating(sizes, dtype, -1, [&] {
    AtenTensorHandle handle;
    SEGATTN_CHECK_TORCH(aoti_torch_empty_strided(
        static_cast<std::int64_t>(sizes.size()), sizes.data(), strides.data(), static_cast<std::int32_t>(dtype),
        aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  });
}

inline Tensor new_like(const Tensor& tensor) {
  return new_tensor(tensor.sizes(), tensor.scalar_type());
}

inline bool is_any_wanted(const std::vector<bool>& needs_input_grad) {
  return std::find(needs_input_grad.begin(), needs_input_grad.end(), true) != needs_input_grad.end();
}

// The gradient of an input, (0,) if it is not wanted.
inline Tensor new_gradient(const Tensor& input, bool wanted) {
  return wanted ? new_like(input) : new_tensor({0}, input.scalar_type());
}

// Null if it is not wanted or has no elements.
template <class T>
T* gradient_data(const Tensor& gradient, bool wanted) {
  return wanted ? mutable_data<T>(gradient) : nullptr;
}

// (B, channels, *S) for a feature map (B, _, *S)
inline Tensor new_feature_map(const Tensor& like, std::int64_t channels) {
  std::vector<std::int64_t> shape(like.sizes().begin(), like.sizes().end());
  shape[1] = channels;
  return new_tensor(shape, like.scalar_type());
}

// (B, *S) in the accumulation dtype, for a feature map (B, _, *S)
inline Tensor new_position_statistics(const Tensor& like) {
  std::vector<std::int64_t> shape(like.sizes().begin(), like.sizes().end());
  shape.erase(shape.begin() + 1);
  return new_tensor(shape, accumulation_dtype(like.scalar_type()));
}

// (B, C) in the accumulation dtype, for a feature map (B, C, *S)
inline Tensor new_channel_statistics(const Tensor& like) {
  return new_tensor(like.sizes().slice(0, 2), accumulation_dtype(like.scalar_type()));
}

}  // namespace segattn::cpu
