// The tensors and sizes of position attention's passes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "checks/position.h"
#include "cpu/common/math.h"
#include "cpu/common/simd.h"

namespace segattn::cpu {

// A result: rounded to T, or in the dtype of accumulation. One array is given, or none where it is not wanted.
template <class T>
struct PositionResult {
  T* rounded = nullptr;
  AccumulatorOf<T>* accumulated = nullptr;

  bool is_wanted() const { return rounded != nullptr || accumulated != nullptr; }
  PositionResult from(std::int64_t element) const { return {advance(rounded, element), advance(accumulated, element)}; }

  // Calls use(array) with the given array.
  template <class Use>
  void visit(const Use& use) const {
    if (rounded != nullptr) {
      use(rounded);
    } else if (accumulated != nullptr) {
      use(accumulated);
    }
  }

  void fill(std::int64_t elements) const {
    visit([&]<class Element>(Element* array) { std::fill_n(array, elements, Element(0)); });
  }
};

template <class T>
struct PositionForwardArguments {
  const T* query;                   // (B, E, N)
  const T* key;                     // (B, E, M)
  const T* value;                   // (B, C, M)
  PositionResult<T> output;         // (B, C, N)
  T* output_low;                    // (B, C, N), the rounding error of output; null: not computed
  AccumulatorOf<T>* logsumexp;      // (B, N)
  AccumulatorOf<T>* logsumexp_low;  // (B, N), the rounding error of logsumexp; null: not computed
  PositionSizes sizes;
  AccumulatorOf<T> scale;
  bool is_part;  // of the keys: a query whose energies are all -inf has the output 0, not NaN

  PositionForwardArguments of_samples(std::int64_t first, std::int64_t samples) const {
    PositionForwardArguments part = *this;
    part.sizes.batch = samples;
    part.query = advance(query, first * sizes.queries * sizes.key_channels);
    part.key = advance(key, first * sizes.keys * sizes.key_channels);
    part.value = advance(value, first * sizes.keys * sizes.value_channels);
    part.output = output.from(first * sizes.queries * sizes.value_channels);
    part.output_low = advance(output_low, first * sizes.queries * sizes.value_channels);
    part.logsumexp = advance(logsumexp, first * sizes.queries);
    part.logsumexp_low = advance(logsumexp_low, first * sizes.queries);
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
  const T* output;                         // (B, C, N); null: delta is given
  const T* output_low;                     // (B, C, N), the rounding error of output; null: unknown
  const AccumulatorOf<T>* logsumexp;       // (B, N)
  const AccumulatorOf<T>* logsumexp_low;   // (B, N), the rounding error of logsumexp; null: unknown
  const AccumulatorOf<T>* grad_logsumexp;  // (B, N); null: zeros
  const AccumulatorOf<T>* delta;           // (B, N), of a part of the keys; null: computed
  PositionResult<T> grad_query;            // (B, E, N); one of the three is wanted
  PositionResult<T> grad_key;              // (B, E, M)
  PositionResult<T> grad_value;            // (B, C, M)
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
    part.logsumexp_low = advance(logsumexp_low, first * sizes.queries);
    part.grad_logsumexp = advance(grad_logsumexp, first * sizes.queries);
    part.delta = advance(delta, first * sizes.queries);
    part.grad_query = grad_query.from(first * sizes.queries * sizes.key_channels);
    part.grad_key = grad_key.from(first * sizes.keys * sizes.key_channels);
    part.grad_value = grad_value.from(first * sizes.keys * sizes.value_channels);
    return part;
  }

  PositionGradients wanted() const { return {grad_query.is_wanted(), grad_key.is_wanted(), grad_value.is_wanted()}; }
};

}  // namespace segattn::cpu
