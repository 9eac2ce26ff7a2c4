// Tensors as the position attention kernels want them.
#pragma once

#include <cstdint>
#include <string>

#include "../checks/check.h"
#include "device.h"
#include "position_params.cuh"
#include "position_rows.cuh"
#include "position_tiles.cuh"

namespace segattn {

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

template <class T>
void launch_pack(const PackParams& params, cudaStream_t stream) {
  SEGATTN_LAUNCH(
      (pack_rows_kernel<T>), dim3(grid_blocks(params.rows_total * params.row_blocks)), dim3(kRowThreads), 0, stream,
      params);
}

// A feature map whose rows start on 16 bytes, as the asynchronous copies need; packed into aligned rows where they do
// not. At 97 x 97 and C = 512 the pass moves 24 MB beside the 1.7 GB that the forward kernel takes from L2.
inline FeatureMap aligned_feature_map(const Tensor& tensor, cudaStream_t stream) {
  FeatureMap map = feature_map(tensor);
  const int64_t bytes = element_bytes(tensor.scalar_type()), per_piece = 16 / bytes;
  const bool aligned = reinterpret_cast<uintptr_t>(map.operand.data) % 16 == 0 &&
      (tensor.size(1) == 1 || map.operand.row_stride % per_piece == 0) &&
      (tensor.size(0) == 1 || map.operand.batch_stride % per_piece == 0);
  if (aligned) {
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
  if (bytes == 2) { // the bits move, whatever they mean
    launch_pack<__half>(params, stream);
  } else {
    launch_pack<float>(params, stream);
  }
  return {packed, operand_of(packed)};
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

} // namespace segattn
