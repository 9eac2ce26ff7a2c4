// Tensors in the layout of the kernels: contiguous positions and, for tensor cores, rows that start on 16 bytes.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cuda/common/launch_context.h"
#include "cuda/common/math.h"
#include "cuda/common/operand.h"
#include "cuda/common/row_kernels.cuh"

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

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// (B, channels, *spatial); copied if its positions are not contiguous (channels_last).
inline FeatureMap feature_map(const Tensor& tensor) {
  int64_t expected = 1;
  bool contiguous_positions = true;
  for (int64_t d = tensor.dim() - 1; d >= 2; --d) {
    contiguous_positions &= tensor.size(d) == 1 || tensor.stride(d) == expected;
    expected *= tensor.size(d);
  }
  const Tensor ready = contiguous_positions ? tensor : torch::stable::contiguous(tensor);
  return {ready, operand_of(ready), positions_of(ready)};
}

template <class T>
void launch_pack(const PackParams& params, cudaStream_t stream) {
  SEGATTN_LAUNCH(
      (pack_rows_kernel<T>), dim3(grid_blocks(params.rows_total * params.row_blocks)), dim3(kRowThreads), 0, stream,
      params);
}

// The feature map with rows that start on 16 bytes, as cp.async requires; copied if they do not. At 97 x 97 and C = 512
// the copies move 24 MB, against the 0.9 GB that the forward kernel reads from L2.
inline FeatureMap aligned(const FeatureMap& features, cudaStream_t stream) {
  const Tensor& tensor = features.tensor;
  const int64_t bytes = element_bytes(tensor.scalar_type()), per_chunk = 16 / bytes;
  const bool is_aligned = reinterpret_cast<uintptr_t>(features.operand.data) % 16 == 0 &&
      (tensor.size(1) == 1 || features.operand.row_stride % per_chunk == 0) &&
      (tensor.size(0) == 1 || features.operand.batch_stride % per_chunk == 0);
  if (is_aligned) {
    FeatureMap result = features;
    if (tensor.size(1) == 1) {  // copies form addresses of rows past the edge, which must be aligned too
      result.operand.row_stride = 0;
    }
    return result;
  }
  const int64_t batch = tensor.size(0), rows = tensor.size(1), columns = features.positions;
  const int64_t padded = round_up(columns, per_chunk);
  const Tensor packed = allocate(tensor, {batch, rows, padded}, tensor.scalar_type());
  PackParams params;
  params.source = features.operand.data;
  params.target = packed.mutable_data_ptr();
  params.batch_stride = features.operand.batch_stride;
  params.row_stride = features.operand.row_stride;
  params.rows_total = batch * rows;
  params.rows = static_cast<int>(rows);
  params.columns = static_cast<int>(columns);
  params.padded = static_cast<int>(padded);
  params.row_blocks = static_cast<int>(ceil_div(padded / per_chunk, kRowThreads));
  if (bytes == 2) {  // the copy does not interpret the elements: one kernel serves both 16-bit types
    launch_pack<__half>(params, stream);
  } else {
    launch_pack<float>(params, stream);
  }
  return {packed, operand_of(packed), columns};
}

inline FeatureMap aligned_feature_map(const Tensor& tensor, cudaStream_t stream) {
  return aligned(feature_map(tensor), stream);
}

// delta (B, N) in the dtype of accumulation, allocated with `sizes`: sum_c grad_output * output, with the output before
// rounding where output_low is given. grad_output, output, output_low: (B, C, *S), N positions.
inline Tensor delta_of(
    const LaunchContext& context, const FeatureMap& grad_output, const FeatureMap& output,
    const std::optional<FeatureMap>& output_low, const std::vector<int64_t>& sizes) {
  const Tensor delta = allocate(output.tensor, sizes, accumulation_dtype(context.dtype));
  DeltaParams params{};
  params.grad_output = grad_output.operand;
  params.output = output.operand;
  if (output_low.has_value()) {
    params.output_low = output_low->operand;
  }
  params.delta = delta.mutable_data_ptr();
  params.channels = static_cast<int>(output.tensor.size(1));
  params.positions = context.position_count("output", output.positions);
  params.position_blocks = ceil_div(params.positions, 32);
  const int64_t blocks = output.tensor.size(0) * params.position_blocks;
  with_element(context.dtype, [&]<class T>() {
    SEGATTN_LAUNCH((delta_kernel<T>), dim3(grid_blocks(blocks)), dim3(kRowThreads), 0, context.stream, params);
  });
  return delta;
}

}  // namespace segattn::cuda
