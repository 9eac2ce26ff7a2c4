// The tensors and sizes of criss-cross attention's passes.
#pragma once

#include "checks/criss_cross.h"
#include "cpu/common/simd.h"

namespace segattn::cpu {

struct ImageSize {
  std::int64_t height, width;
  std::int64_t positions() const { return height * width; }
};

inline std::int64_t multiply_adds(const CrissCrossSizes& sizes) {
  return sizes.batch * sizes.height * sizes.width * sizes.reach() * (sizes.key_channels + sizes.value_channels);
}

// What a query attends to. The row contains the query itself, the column does not.
enum class Keys { kRowAndColumn, kRow, kColumn };

// R: of the results, T or AccumulatorOf<T>
template <class T, class R>
struct CrissCrossForwardArguments {
  const T* query;                   // (B, E, H, W)
  const T* key;                     // (B, E, H, W)
  const T* value;                   // (B, C, H, W)
  R* output;                        // (B, C, H, W)
  AccumulatorOf<T>* logsumexp;      // (B, H, W)
  AccumulatorOf<T>* logsumexp_low;  // (B, H, W), the rounding error of logsumexp
  CrissCrossSizes sizes;
  AccumulatorOf<T> scale;
};

template <class T, class R>
struct CrissCrossBackwardArguments {
  const T* grad_output;                    // (B, C, H, W)
  const T* query;                          // (B, E, H, W)
  const T* key;                            // (B, E, H, W)
  const T* value;                          // (B, C, H, W)
  const T* output;                         // (B, C, H, W); null with delta
  const AccumulatorOf<T>* logsumexp;       // (B, H, W)
  const AccumulatorOf<T>* logsumexp_low;   // (B, H, W), the rounding error of logsumexp; null: unknown
  const AccumulatorOf<T>* grad_logsumexp;  // (B, H, W); null: zeros, and with delta
  const AccumulatorOf<T>* delta;           // (B, H, W), D - grad_logsumexp, for the row or the column; null for both
  R* grad_query;                           // (B, E, H, W); this and the next two: null if not wanted, but one is
  R* grad_key;                             // (B, E, H, W)
  R* grad_value;                           // (B, C, H, W)
  CrissCrossSizes sizes;
  AccumulatorOf<T> scale;
  bool keys_complete;  // logsumexp and output are over row and column and no other keys; false for one of them

  // Whether a wanted gradient needs dP and dS.
  bool differentiates_energies() const { return grad_query != nullptr || grad_key != nullptr; }
  // Whether the sum s of dS is computed, to take its error off.
  bool corrects_sums() const { return keys_complete && differentiates_energies(); }
};

}  // namespace segattn::cpu
