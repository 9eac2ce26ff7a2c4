// Element types: conversions between the stored type and the type it accumulates in.
#pragma once

#include <cmath>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/common/ptx.cuh"

namespace segattn::cuda {

// A float32 that has been rounded to TF32 (round_to_tf32).
struct Tf32 {
  float value;
};

// Accumulation is float32 for float16, bfloat16 and float32, float64 for float64.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ __forceinline__ float to_accumulator(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float to_accumulator(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float to_accumulator(Tf32 x) {
  return x.value;
}
__device__ __forceinline__ float to_accumulator(float x) {
  return x;
}
__device__ __forceinline__ double to_accumulator(double x) {
  return x;
}

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_accumulator(Accumulator<T> x);
template <>
__device__ __forceinline__ __half from_accumulator<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_accumulator<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ float from_accumulator<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ double from_accumulator<double>(double x) {
  return x;
}

__device__ __forceinline__ float round_to_tf32(float x) {
  return __uint_as_float(ptx::to_tf32(x));
}

// pair[0] = low, pair[1] = high in one store. `pair` is aligned to two elements.
__device__ __forceinline__ void store_pair(__half* pair, float low, float high) {
  *reinterpret_cast<__half2*>(pair) = __floats2half2_rn(low, high);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* pair, float low, float high) {
  *reinterpret_cast<__nv_bfloat162*>(pair) = __floats2bfloat162_rn(low, high);
}
__device__ __forceinline__ void store_pair(float* pair, float low, float high) {
  *reinterpret_cast<float2*>(pair) = make_float2(low, high);
}

// low and high have been rounded.
__device__ __forceinline__ void store_pair(Tf32* pair, float low, float high) {
  *reinterpret_cast<float2*>(pair) = make_float2(low, high);
}

// The same as the register of a matrix operand.
template <class T>
__device__ __forceinline__ uint32_t packed_pair(float low, float high) {
  alignas(4) T pair[2];
  store_pair(pair, low, high);
  return *reinterpret_cast<const uint32_t*>(pair);
}

// The rounding error of a logsumexp as it is stored: 0 where the logsumexp is not finite.
template <class Real>
__device__ __forceinline__ Real rounding_error(Real logsumexp, Real error) {
  return fabs(logsumexp) < INFINITY ? error : Real(0);
}

}  // namespace segattn::cuda
