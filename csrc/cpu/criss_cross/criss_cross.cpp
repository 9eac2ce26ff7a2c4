// Criss-cross attention on the CPU: checks, outputs, dtype dispatch, registration.
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common/dispatch.h"
#include "cpu/common/parallel.h"
#include "cpu/common/tensors.h"
#include "cpu/criss_cross/affinity_aggregation.h"
#include "cpu/criss_cross/backward.h"
#include "cpu/criss_cross/forward.h"
#include "registration.h"

namespace segattn::cpu {

namespace {

// query (B, E, H, W), key (B, E, H, W) -> affinity (B, H + W - 1, H, W)
Tensor criss_cross_affinity(Tensor query, Tensor key) {
  const CrissCrossSizes sizes = check_criss_cross_affinity(query, key);
  make_contiguous(query, key);
  Tensor affinity = new_feature_map(query, sizes.reach());
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    AffinityAggregation<T>(sizes, sizes.key_channels)
        .dot_products(data<T>(key), data<T>(query), mutable_data<T>(affinity));
  });
  return affinity;
}

// grad_affinity (B, H + W - 1, H, W), query (B, E, H, W), key (B, E, H, W) -> grad_query, grad_key
std::tuple<Tensor, Tensor> criss_cross_affinity_backward(
    Tensor grad_affinity, Tensor query, Tensor key, std::vector<bool> needs_input_grad) {
  const CrissCrossSizes sizes = check_criss_cross_affinity_backward(grad_affinity, query, key, needs_input_grad);
  make_contiguous(grad_affinity, query, key);
  Tensor grad_query = new_gradient(query, needs_input_grad[0]);
  Tensor grad_key = new_gradient(key, needs_input_grad[1]);
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    const AffinityAggregation<T> op(sizes, sizes.key_channels);
    if (needs_input_grad[0]) {
      op.sum_over_keys(data<T>(key), data<T>(grad_affinity), mutable_data<T>(grad_query));
    }
    if (needs_input_grad[1]) {
      op.sum_over_queries(data<T>(query), data<T>(grad_affinity), mutable_data<T>(grad_key));
    }
  });
  return {grad_query, grad_key};
}

// attention (B, H + W - 1, H, W), value (B, C, H, W) -> output (B, C, H, W)
Tensor criss_cross_aggregation(Tensor attention, Tensor value) {
  const CrissCrossSizes sizes = check_criss_cross_aggregation(attention, value);
  make_contiguous(attention, value);
  Tensor output = new_like(value);
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(value.scalar_type(), [&]<class T>() {
    AffinityAggregation<T>(sizes, sizes.value_channels)
        .sum_over_keys(data<T>(value), data<T>(attention), mutable_data<T>(output));
  });
  return output;
}

// grad_output (B, C, H, W), attention (B, H + W - 1, H, W), value (B, C, H, W) -> grad_attention, grad_value
std::tuple<Tensor, Tensor> criss_cross_aggregation_backward(
    Tensor grad_output, Tensor attention, Tensor value, std::vector<bool> needs_input_grad) {
  const CrissCrossSizes sizes = check_criss_cross_aggregation_backward(grad_output, attention, value, needs_input_grad);
  make_contiguous(grad_output, attention, value);
  Tensor grad_attention = new_gradient(attention, needs_input_grad[0]);
  Tensor grad_value = new_gradient(value, needs_input_grad[1]);
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(value.scalar_type(), [&]<class T>() {
    const AffinityAggregation<T> op(sizes, sizes.value_channels);
    if (needs_input_grad[0]) {
      op.dot_products(data<T>(value), data<T>(grad_output), mutable_data<T>(grad_attention));
    }
    if (needs_input_grad[1]) {
      op.sum_over_queries(data<T>(grad_output), data<T>(attention), mutable_data<T>(grad_value));
    }
  });
  return {grad_attention, grad_value};
}

// query (B, E, H, W), key (B, E, H, W), value (B, C, H, W)
// -> output (B, C, H, W), logsumexp (B, H, W), logsumexp_low (B, H, W)
std::tuple<Tensor, Tensor, Tensor> criss_cross_attention(Tensor query, Tensor key, Tensor value, double scale) {
  const CrissCrossSizes sizes = check_criss_cross_attention(query, key, value, scale);
  make_contiguous(query, key, value);
  Tensor output = new_like(value);
  Tensor logsumexp = new_position_statistics(query);
  Tensor logsumexp_low = new_position_statistics(query);
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    const CrissCrossForwardArguments<T, T> arguments{
        .query = data<T>(query),
        .key = data<T>(key),
        .value = data<T>(value),
        .output = mutable_data<T>(output),
        .logsumexp = mutable_data<A>(logsumexp),
        .logsumexp_low = mutable_data<A>(logsumexp_low),
        .sizes = sizes,
        .scale = static_cast<A>(scale)};
    CrissCrossForward<T, T, Keys::kRowAndColumn>(arguments).run();
  });
  return {output, logsumexp, logsumexp_low};
}

// grad_output (B, C, H, W), query (B, E, H, W), key (B, E, H, W), value (B, C, H, W), output (B, C, H, W),
// logsumexp (B, H, W), logsumexp_low (B, H, W), grad_logsumexp (B, H, W) -> grad_query, grad_key, grad_value
std::tuple<Tensor, Tensor, Tensor> criss_cross_attention_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, double scale,
    std::optional<Tensor> logsumexp_low, std::optional<Tensor> grad_logsumexp, std::vector<bool> needs_input_grad,
    bool keys_complete) {
  const CrissCrossSizes sizes = check_criss_cross_attention_backward(
      grad_output, query, key, value, output, logsumexp, scale, logsumexp_low, grad_logsumexp, needs_input_grad);
  Tensor grad_query = new_gradient(query, needs_input_grad[0]);
  Tensor grad_key = new_gradient(key, needs_input_grad[1]);
  Tensor grad_value = new_gradient(value, needs_input_grad[2]);
  if (!is_any_wanted(needs_input_grad)) {
    return {grad_query, grad_key, grad_value};
  }
  make_contiguous(grad_output, query, key, value, output, logsumexp, logsumexp_low, grad_logsumexp);
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    const CrissCrossBackwardArguments<T, T> arguments{
        .grad_output = data<T>(grad_output),
        .query = data<T>(query),
        .key = data<T>(key),
        .value = data<T>(value),
        .output = data<T>(output),
        .logsumexp = data<A>(logsumexp),
        .logsumexp_low = data<A>(logsumexp_low),
        .grad_logsumexp = data<A>(grad_logsumexp),
        .delta = nullptr,
        .grad_query = gradient_data<T>(grad_query, needs_input_grad[0]),
        .grad_key = gradient_data<T>(grad_key, needs_input_grad[1]),
        .grad_value = gradient_data<T>(grad_value, needs_input_grad[2]),
        .sizes = sizes,
        .scale = static_cast<A>(scale),
        .keys_complete = keys_complete};
    CrissCrossBackward<T, T, Keys::kRowAndColumn>(arguments).run();
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace

SEGATTN_REGISTER_CPU(m) {
  m.impl("criss_cross_affinity", TORCH_BOX(&criss_cross_affinity));
  m.impl("criss_cross_affinity_backward", TORCH_BOX(&criss_cross_affinity_backward));
  m.impl("criss_cross_aggregation", TORCH_BOX(&criss_cross_aggregation));
  m.impl("criss_cross_aggregation_backward", TORCH_BOX(&criss_cross_aggregation_backward));
  m.impl("criss_cross_attention", TORCH_BOX(&criss_cross_attention));
  m.impl("criss_cross_attention_backward", TORCH_BOX(&criss_cross_attention_backward));
}

}  // namespace segattn::cpu
