// Tensors as the position attention kernels want them.
#pragma once

#include <cstdint>

#include "cuda/common/operands.h"
#include "cuda/position/plan.cuh"
#include "cuda/position/rows.cuh"

namespace segattn::cuda {

template <class T>
void launch_pack(const PackParams& params, cudaStream_t stream) {
  SEGATTN_LAUNCH(
      (pack_rows_kernel<T>), dim3(grid_blocks(params.rows_total * params.row_blocks)), dim3(kRowThreads), 0, stream,
      params);
}

// A feature map whose rows start on 16 bytes, as the asynchronous copies need; packed into aligned rows where they do
// not. At 97 x 97 and C = 512 the passes move 24 MB beside the 0.9 GB that the forward kernel takes from L2.
inline FeatureMap aligned_feature_map(const Tensor& tensor, cudaStream_t stream) {
  FeatureMap map = feature_map(tensor);
  const int64_t bytes = element_bytes(tensor.scalar_type()), per_piece = 16 / bytes;
  const bool aligned = reinterpret_cast<uintptr_t>(map.operand.data) % 16 == 0 &&
      (tensor.size(1) == 1 || map.operand.row_stride % per_piece == 0) &&
      (tensor.size(0) == 1 || map.operand.batch_stride % per_piece == 0);
  if (aligned) {
    if (tensor.size(1) == 1) {  // copies step over rows that are not there, by addresses that have to be aligned, too
      map.operand.row_stride = 0;
    }
    return map;
  }
  const int64_t batch = tensor.size(0), rows = tensor.size(1), columns = positions_of(tensor);
  const int64_t padded = divide_up(columns, per_piece) * per_piece;
  const Tensor packed = allocate(tensor, {batch, rows, padded}, tensor.scalar_type());
  PackParams params;
  params.source = map.operand.data;
  params.target = packed.mutable_data_ptr();
  params.batch_stride = map.operand.batch_stride;
  params.row_stride = map.operand.row_stride;
  params.rows_total = batch * rows;
  params.rows = static_cast<int>(rows);
  params.columns = static_cast<int>(columns);
  params.padded = static_cast<int>(padded);
  params.row_blocks = divide_up(padded / per_piece, kRowThreads);
  if (bytes == 2) {  // the bits move, whatever they mean
    launch_pack<__half>(params, stream);
  } else {
    launch_pack<float>(params, stream);
  }
  return {packed, operand_of(packed)};
}

// visit.operator()<Mma>()
template <class Visit>
void with_mma(Arithmetic arithmetic, const Visit& visit) {
  switch (arithmetic) {
    case Arithmetic::kFloat16:
      return visit.template operator()<Mma16<__half>>();
    case Arithmetic::kBfloat16:
      return visit.template operator()<Mma16<__nv_bfloat16>>();
    case Arithmetic::kTf32:
      return visit.template operator()<MmaTf32<1>>();
    case Arithmetic::k3xTf32:
      return visit.template operator()<MmaTf32<3>>();
    case Arithmetic::kSimt:
      return;
  }
}

}  // namespace segattn::cuda
