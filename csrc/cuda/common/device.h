// Device limits, streams and memory for host code. Uses torch only through its stable ABI.
#pragma once

#include <cstdint>
#include <vector>

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cuda/common/device_limits.h"
#include "cuda/common/launch.cuh"
#include "torch_call.h"

namespace segattn::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Limits of the current device. Throws if the library contains no code for it.
DeviceLimits device_limits();

// kHasSm90aFiles, or what a test of the emulator has set.
bool has_sm90a_code();

// Whether float32 products may round to TF32: the last setting passed to _set_allow_tf32, initially false.
bool allow_tf32();

// DeviceGuard makes the tensor's device current for its lifetime. current_stream is PyTorch's current stream there.
#ifdef SEGATTN_EMULATED
struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};
inline cudaStream_t current_stream(const Tensor&) {
  return emulator::current_stream();
}
#else
struct DeviceGuard {
  explicit DeviceGuard(const Tensor& tensor) : guard(tensor.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  SEGATTN_CHECK_TORCH(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

// Allocates every result and scratch tensor of the CUDA kernels: contiguous, uninitialised, on like's device, from
// torch's allocator. The emulator fills it with NaN to expose elements that no kernel writes.
inline Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor result =
      allocating(sizes, dtype, like.get_device_index(), [&] { return torch::stable::new_empty(like, sizes, dtype); });
#ifdef SEGATTN_EMULATED
  emulator::poison(result.mutable_data_ptr(), static_cast<size_t>(result.numel() * element_bytes(dtype)));
#endif
  return result;
}

// Same shape, dtype and device as `like`.
inline Tensor allocate_like(const Tensor& like) {
  const auto sizes = like.sizes();
  return allocate(like, std::vector<int64_t>(sizes.begin(), sizes.end()), like.scalar_type());
}

// The result of a backward operator for one input: like the input, or of shape (0) if its gradient is not needed.
inline Tensor allocate_gradient(const Tensor& input, bool needed) {
  return needed ? allocate_like(input) : allocate(input, {0}, input.scalar_type());
}

}  // namespace segattn::cuda
