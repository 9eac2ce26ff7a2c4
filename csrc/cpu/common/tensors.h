// How host code turns checked tensors into what kernels take: contiguous memory, typed pointers, new results.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "checks/check.h"
#include "cpu/common/simd.h"

namespace segattn::cpu {

inline void make_contiguous(Tensor& tensor) {
  tensor = torch::stable::contiguous(tensor);
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

inline Tensor new_like(const Tensor& tensor) {
  return torch::stable::new_empty(tensor, tensor.sizes());
}

inline bool is_any_wanted(const std::vector<bool>& needs_input_grad) {
  return std::find(needs_input_grad.begin(), needs_input_grad.end(), true) != needs_input_grad.end();
}

// The gradient of an input, (0,) if it is not wanted.
inline Tensor new_gradient(const Tensor& input, bool wanted) {
  return wanted ? new_like(input) : torch::stable::new_empty(input, {0});
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
  return torch::stable::new_empty(like, shape);
}

// (B, *S) in the accumulation dtype, for a feature map (B, _, *S)
inline Tensor new_position_statistics(const Tensor& like) {
  std::vector<std::int64_t> shape(like.sizes().begin(), like.sizes().end());
  shape.erase(shape.begin() + 1);
  return torch::stable::new_empty(like, shape, accumulation_dtype(like.scalar_type()));
}

// (B, C) in the accumulation dtype, for a feature map (B, C, *S)
inline Tensor new_channel_statistics(const Tensor& like) {
  return torch::stable::new_empty(like, like.sizes().slice(0, 2), accumulation_dtype(like.scalar_type()));
}

}  // namespace segattn::cpu
