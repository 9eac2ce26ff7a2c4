// Tensors in the layout of the kernels: contiguous positions. aligned.h adds rows that start on 16 bytes.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "checks/check.h"
#include "cuda/common/device.h"
#include "cuda/common/operand.h"

namespace segattn::cuda {

// A feature map and the tensor that owns its memory. PyTorch's allocator reuses memory in stream order, so the tensor
// may be released as soon as the kernel is launched.
struct FeatureMap {
  Tensor tensor;      // (B, channels, *spatial), or (B, channels, positions and padding)
  Operand operand;    // of `tensor`
  int64_t positions;  // without padding
};

inline Operand operand_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

// (B, channels, *S) for a feature map (B, _, *S), in its dtype.
inline Tensor allocate_feature_map(const Tensor& like, int64_t channels) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes[1] = channels;
  return allocate(like, sizes, like.scalar_type());
}

// Null where no tensor is given.
inline const void* data_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

// (B, channels, *spatial); copied if its positions are not contiguous (channels_last).
inline FeatureMap feature_map(const Tensor& tensor) {
  int64_t expected = 1;
  bool contiguous_positions = true;
  for (int64_t d = tensor.dim() - 1; d >= 2; --d) {
    contiguous_positions &= tensor.size(d) == 1 || tensor.stride(d) == expected;
    expected *= tensor.size(d);
  }
  const Tensor ready = contiguous_positions ? tensor : as_contiguous(tensor);
  return {ready, operand_of(ready), positions_of(ready)};
}

}  // namespace segattn::cuda
