// The tensors and sizes of position attention's passes.
#pragma once

#include "checks/position.h"
#include "cpu/common/math.h"
#include "cpu/common/simd.h"

namespace segattn::cpu {

template <class T>
struct PositionForwardArguments {
  const T* query;               // (B, E, N)
  const T* key;                 // (B, E, M)
  const T* value;               // (B, C, M)
  T* output;                    // (B, C, N)
  T* output_low;                // (B, C, N), the rounding error of output; null: not computed
  AccumulatorOf<T>* logsumexp;  // (B, N)
  PositionSizes sizes;
  AccumulatorOf<T> scale;

  PositionForwardArguments of_samples(std::int64_t first, std::int64_t samples) const {
    PositionForwardArguments part = *this;
    part.sizes.batch = samples;
    part.query = advance(query, first * sizes.queries * sizes.key_channels);
    part.key = advance(key, first * sizes.keys * sizes.key_channels);
    part.value = advance(value, first * sizes.keys * sizes.value_channels);
    part.output = advance(output, first * sizes.queries * sizes.value_channels);
    part.output_low = advance(output_low, first * sizes.queries * sizes.value_channels);
    part.logsumexp = advance(logsumexp, first * sizes.queries);
    return part;
  }
};

// Which gradients are wanted.
struct PositionGradients {
  bool query, key, value;
  // Whether any needs dP and dS.
  bool of_energies() const { return query || key; }
};

template <class T>
struct PositionBackwardArguments {
  const T* grad_output;                    // (B, C, N)
  const T* query;                          // (B, E, N)
  const T* key;                            // (B, E, M)
  const T* value;                          // (B, C, M)
  const T* output;                         // (B, C, N)
  const T* output_low;                     // (B, C, N), the rounding error of output; null: unknown
  const AccumulatorOf<T>* logsumexp;       // (B, N)
  const AccumulatorOf<T>* grad_logsumexp;  // (B, N); null: zeros
  T* grad_query;                           // (B, E, N); this and the next two: null if not wanted, but one is
  T* grad_key;                             // (B, E, M)
  T* grad_value;                           // (B, C, M)
  PositionSizes sizes;
  AccumulatorOf<T> scale;
  bool keys_complete;  // logsumexp and output are over these keys and no others

  PositionBackwardArguments of_samples(std::int64_t first, std::int64_t samples) const {
    PositionBackwardArguments part = *this;
    part.sizes.batch = samples;
    part.grad_output = advance(grad_output, first * sizes.queries * sizes.value_channels);
    part.query = advance(query, first * sizes.queries * sizes.key_channels);
    part.key = advance(key, first * sizes.keys * sizes.key_channels);
    part.value = advance(value, first * sizes.keys * sizes.value_channels);
    part.output = advance(output, first * sizes.queries * sizes.value_channels);
    part.output_low = advance(output_low, first * sizes.queries * sizes.value_channels);
    part.logsumexp = advance(logsumexp, first * sizes.queries);
    part.grad_logsumexp = advance(grad_logsumexp, first * sizes.queries);
    part.grad_query = advance(grad_query, first * sizes.queries * sizes.key_channels);
    part.grad_key = advance(grad_key, first * sizes.keys * sizes.key_channels);
    part.grad_value = advance(grad_value, first * sizes.keys * sizes.value_channels);
    return part;
  }

  PositionGradients wanted() const { return {grad_query != nullptr, grad_key != nullptr, grad_value != nullptr}; }
};

}  // namespace segattn::cpu
