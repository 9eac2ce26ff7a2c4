#include <stdexcept>
#include <string>

#include "cuda/common/math.h"
#include "cuda/common/tensor_map.h"

namespace segattn::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, by the runtime: the library does not link to libcuda.
Encode encode_function() {
  static const Encode function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    check_cuda(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
        "cudaGetDriverEntryPointByVersion");
    if (result != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("segattn_ops: the CUDA driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<Encode>(found);
  }();
  return function;
}

}  // namespace

CUtensorMap tensor_map(const FeatureMap& features, int box_channels) {
  const Operand& operand = features.operand;
  const cuuint64_t channels = features.tensor.size(1), samples = features.tensor.size(0);
  const cuuint64_t positions = features.positions;
  const cuuint64_t sizes[] = {positions, channels, samples};
  // In bytes. That of a dimension of size 1 is never used, and has any value in the tensor; here it has that of a
  // contiguous map, which satisfies the driver's rules: a multiple of 16, and what the inner dimensions span.
  const cuuint64_t row = channels > 1 ? 2 * operand.row_stride : round_up(2 * positions, 16);
  const cuuint64_t strides[] = {row, samples > 1 ? 2 * operand.batch_stride : row * channels};
  const cuuint32_t box[] = {kBoxPositions, static_cast<cuuint32_t>(box_channels), 1};
  const cuuint32_t element_strides[] = {1, 1, 1};
  // Both 16-bit types are copied as bits.
  CUtensorMap map;
  const CUresult result = encode_function()(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(operand.data), sizes, strides, box, element_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(
        "segattn_ops: cuTensorMapEncodeTiled failed with error " + std::to_string(static_cast<int>(result)));
  }
  return CUtensorMap{map};  // not `map`: with -fsanitize=thread, GCC does not align the caller's result to 64 bytes
}

}  // namespace segattn::cuda
