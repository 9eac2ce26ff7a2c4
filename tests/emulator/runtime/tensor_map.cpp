// cuTensorMapEncodeTiled with the rules of the CUDA driver API's documentation.
#include "tensor_map.h"

#include <cstring>

#include "../include/runtime_api.h"
#include "device.h"
#include "host.h"

namespace segattn::emulator {
namespace {

constexpr uint64_t kMaxSize = uint64_t(1) << 32;
constexpr uint64_t kMaxStride = uint64_t(1) << 40;
constexpr uint32_t kMaxBox = 256;
constexpr uint32_t kMaxElementStride = 8;

int bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      return 4;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
  }
  return 0;
}

int bytes_of(CUtensorMapSwizzle swizzle) {
  return swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : 16 << int(swizzle);
}

bool is_float(CUtensorMapDataType type) {
  return type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ||
      type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT64;
}

bool aligned(const void* address, uintptr_t bytes) {
  return uintptr_t(address) % bytes == 0;
}

}  // namespace
}  // namespace segattn::emulator

using namespace segattn::emulator;

CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
    const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
    CUtensorMapFloatOOBfill fill) {
  if (call_fails(__func__))
    return CUDA_ERROR_INVALID_VALUE;
  const int element_bytes = bytes_of(type);
  if (map == nullptr || !aligned(map, 64) || element_bytes == 0 || rank == 0 || rank > TensorMap::kMaxRank)
    return CUDA_ERROR_INVALID_VALUE;
  if (address == nullptr || !aligned(address, 16) || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE)
    return CUDA_ERROR_INVALID_VALUE;
  if (swizzle < CU_TENSOR_MAP_SWIZZLE_NONE || swizzle > CU_TENSOR_MAP_SWIZZLE_128B ||
      promotion < CU_TENSOR_MAP_L2_PROMOTION_NONE || promotion > CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && !is_float(type))
    return CUDA_ERROR_INVALID_VALUE;
  TensorMap encoded{};
  encoded.mark = TensorMap::kMark;
  encoded.address = static_cast<const char*>(address);
  encoded.rank = uint8_t(rank);
  encoded.element_bytes = uint8_t(element_bytes);
  encoded.swizzle_bytes = uint8_t(bytes_of(swizzle));
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || sizes[i] > kMaxSize || box[i] == 0 || box[i] > kMaxBox || element_strides[i] == 0 ||
        element_strides[i] > kMaxElementStride) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    encoded.last[i] = uint32_t(sizes[i] - 1);
    encoded.box[i] = uint16_t(box[i]);
    encoded.element_strides[i] = uint8_t(element_strides[i]);
    if (i + 1 == rank)
      continue;
    if (strides[i] % 16 != 0 || strides[i] >= kMaxStride)
      return CUDA_ERROR_INVALID_VALUE;
    encoded.strides[i] = strides[i];
  }
  const uint32_t row_bytes = box[0] * uint32_t(element_bytes);
  if (row_bytes % 16 != 0 || (encoded.swizzle_bytes > 0 && row_bytes > encoded.swizzle_bytes))
    return CUDA_ERROR_INVALID_VALUE;
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &encoded, sizeof encoded);
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(
    const char* symbol, void** function, unsigned version, unsigned long long,
    cudaDriverEntryPointQueryResult* result) {
  if (call_fails(__func__))
    return cudaErrorInvalidValue;
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0 && version >= 12000;
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
