// Feature maps with rows that start on 16 bytes, for the tensor-core kernels.
#pragma once

#include <cstdint>

#include "cuda/common/launch.cuh"
#include "cuda/common/math.h"
#include "cuda/common/operands.h"
#include "cuda/common/row_kernels.cuh"

namespace segattn::cuda {

template <class T>
void launch_pack(const PackParams& params, cudaStream_t stream) {
  SEGATTN_LAUNCH(
      (pack_rows_kernel<T>), dim3(grid_blocks(params.rows_total * params.row_blocks)), dim3(kRowThreads), 0, stream,
      params);
}

// A copy with rows that start on whole sectors of 32 bytes: 64 bytes of a row that starts within a sector would be
// three sectors instead of two.
inline FeatureMap packed(const FeatureMap& features, cudaStream_t stream) {
  const Tensor& tensor = features.tensor;
  const int64_t bytes = element_bytes(tensor.scalar_type()), per_chunk = 16 / bytes;
  const int64_t batch = tensor.size(0), rows = tensor.size(1), columns = features.positions;
  const int64_t padded = round_up(columns, 2 * per_chunk);
  const Tensor target = allocate(tensor, {batch, rows, padded}, tensor.scalar_type());
  PackParams params;
  params.source = features.operand.data;
  params.target = target.mutable_data_ptr();
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
  return {target, operand_of(target), columns};
}

// The feature map with rows that start on 16 bytes, as cp.async requires; copied if they do not. At 97 x 97 and C = 512
// the copies move 24 MB, against the 0.9 GB that the forward kernel reads from L2.
inline FeatureMap aligned(const FeatureMap& features, cudaStream_t stream) {
  const Tensor& tensor = features.tensor;
  const int64_t per_chunk = 16 / element_bytes(tensor.scalar_type());
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
  return packed(features, stream);
}

// As aligned, for a tensor map (tensor_map.h). Copied also where a stride is 0 (expanded tensors) and where samples lie
// between the rows of others: the driver's documentation has maps only whose strides span the inner dimensions.
inline FeatureMap mappable(const FeatureMap& features, cudaStream_t stream) {
  const Tensor& tensor = features.tensor;
  const Operand& operand = features.operand;
  const int64_t batch = tensor.size(0), rows = tensor.size(1);
  const bool is_nested = (rows == 1 || operand.row_stride >= features.positions) &&
      (batch == 1 || operand.batch_stride >= (rows == 1 ? features.positions : rows * operand.row_stride));
  return is_nested ? aligned(features, stream) : packed(features, stream);
}

inline FeatureMap aligned_feature_map(const Tensor& tensor, cudaStream_t stream) {
  return aligned(feature_map(tensor), stream);
}

}  // namespace segattn::cuda
