// The tensors and sizes of criss-cross attention's passes.
#pragma once

#include "checks/criss_cross.h"
#include "cpu/common/simd.h"

namespace segattn::cpu {

struct ImageSize {
  std::int64_t height, width;
  std::int64_t positions() const { return height * width; }
};

template <class T>
struct CrissCrossForwardArguments {
  const T* query;                   // (B, E, H, W)
  const T* key;                     // (B, E, H, W)
  const T* value;                   // (B, C, H, W)
  T* output;                        // (B, C, H, W)
  AccumulatorOf<T>* logsumexp;      // (B, H, W)
  AccumulatorOf<T>* logsumexp_low;  // (B, H, W), the rounding error of logsumexp
  CrissCrossSizes sizes;
  AccumulatorOf<T> scale;
};

template <class T>
struct CrissCrossBackwardArguments {
  const T* grad_output;                   // (B, C, H, W)
  const T* query;                         // (B, E, H, W)
  const T* key;                           // (B, E, H, W)
  const T* value;                         // (B, C, H, W)
  const T* output;                        // (B, C, H, W)
  const AccumulatorOf<T>* logsumexp;      // (B, H, W)
  const AccumulatorOf<T>* logsumexp_low;  // (B, H, W), the rounding error of logsumexp; null: unknown
  T* grad_query;                          // (B, E, H, W)
  T* grad_key;                            // (B, E, H, W)
  T* grad_value;                          // (B, C, H, W)
  CrissCrossSizes sizes;
  AccumulatorOf<T> scale;
};

}  // namespace segattn::cpu
