// Criss-cross attention on the CPU: checks, outputs, dtype dispatch, registration.
#include <algorithm>
#include <limits>
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

std::int64_t multiply_adds(const CrissCrossSizes& sizes) {
  return sizes.batch * sizes.height * sizes.width * sizes.reach() * (sizes.key_channels + sizes.value_channels);
}

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
        .scale = static_cast<A>(scale),
        .keys = Keys::kRowAndColumn};
    CrissCrossForward<T, T>(arguments).run();
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
        .keys = Keys::kRowAndColumn,
        .keys_complete = keys_complete};
    CrissCrossBackward<T, T>(arguments).run();
  });
  return {grad_query, grad_key, grad_value};
}

// As of criss_cross_attention, all results in the dtype of accumulation.
std::tuple<Tensor, Tensor, Tensor> attend_to_part(
    const char* op, Keys keys, Tensor query, Tensor key, Tensor value, double scale) {
  const CrissCrossSizes sizes = check_criss_cross_attention(query, key, value, scale, op);
  make_contiguous(query, key, value);
  Tensor output = new_tensor(value.sizes(), accumulation_dtype(value.scalar_type()));
  Tensor logsumexp = new_position_statistics(query);
  Tensor logsumexp_low = new_position_statistics(query);
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    if (keys == Keys::kColumn && sizes.height == 1) {  // no keys
      std::fill_n(mutable_data<A>(output), output.numel(), A(0));
      std::fill_n(mutable_data<A>(logsumexp), logsumexp.numel(), -std::numeric_limits<A>::infinity());
      std::fill_n(mutable_data<A>(logsumexp_low), logsumexp_low.numel(), A(0));
      return;
    }
    const CrissCrossForwardArguments<T, A> arguments{
        .query = data<T>(query),
        .key = data<T>(key),
        .value = data<T>(value),
        .output = mutable_data<A>(output),
        .logsumexp = mutable_data<A>(logsumexp),
        .logsumexp_low = mutable_data<A>(logsumexp_low),
        .sizes = sizes,
        .scale = static_cast<A>(scale),
        .keys = keys};
    CrissCrossForward<T, A>(arguments).run();
  });
  return {output, logsumexp, logsumexp_low};
}

// The gradient of an input in the dtype of accumulation, (0,) if it is not wanted.
Tensor new_part_gradient(const Tensor& input, bool wanted) {
  const ScalarType dtype = accumulation_dtype(input.scalar_type());
  return wanted ? new_tensor(input.sizes(), dtype) : new_tensor({0}, dtype);
}

// grad_output (B, C, H, W), query (B, E, H, W), key (B, E, H, W), value (B, C, H, W), logsumexp (B, H, W),
// logsumexp_low (B, H, W), delta (B, H, W) -> grad_query, grad_key, grad_value in the dtype of accumulation
std::tuple<Tensor, Tensor, Tensor> differentiate_part(
    const char* op, Keys keys, Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor logsumexp,
    Tensor logsumexp_low, Tensor delta, double scale, const std::vector<bool>& needs_input_grad) {
  const CrissCrossSizes sizes = check_criss_cross_part_backward(
      grad_output, query, key, value, logsumexp, logsumexp_low, delta, scale, needs_input_grad, op);
  Tensor grad_query = new_part_gradient(query, needs_input_grad[0]);
  Tensor grad_key = new_part_gradient(key, needs_input_grad[1]);
  Tensor grad_value = new_part_gradient(value, needs_input_grad[2]);
  if (!is_any_wanted(needs_input_grad)) {
    return {grad_query, grad_key, grad_value};
  }
  make_contiguous(grad_output, query, key, value, logsumexp, logsumexp_low, delta);
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    if (keys == Keys::kColumn && sizes.height == 1) {  // no keys
      for (const Tensor* gradient : {&grad_query, &grad_key, &grad_value}) {
        std::fill_n(mutable_data<A>(*gradient), gradient->numel(), A(0));
      }
      return;
    }
    // Of a query without keys or with energies of -inf alone: exp(energy - infinity) is 0, exp(-inf - -inf) is not.
    const Buffer<A> finite_or_infinite(logsumexp.numel());
    const A infinity = std::numeric_limits<A>::infinity();
    std::replace_copy(
        data<A>(logsumexp), data<A>(logsumexp) + logsumexp.numel(), finite_or_infinite.data(), -infinity, infinity);
    const CrissCrossBackwardArguments<T, A> arguments{
        .grad_output = data<T>(grad_output),
        .query = data<T>(query),
        .key = data<T>(key),
        .value = data<T>(value),
        .output = nullptr,
        .logsumexp = finite_or_infinite.data(),
        .logsumexp_low = data<A>(logsumexp_low),
        .grad_logsumexp = nullptr,
        .delta = data<A>(delta),
        .grad_query = gradient_data<A>(grad_query, needs_input_grad[0]),
        .grad_key = gradient_data<A>(grad_key, needs_input_grad[1]),
        .grad_value = gradient_data<A>(grad_value, needs_input_grad[2]),
        .sizes = sizes,
        .scale = static_cast<A>(scale),
        .keys = keys,
        .keys_complete = false};
    CrissCrossBackward<T, A>(arguments).run();
  });
  return {grad_query, grad_key, grad_value};
}

// query (B, E, H, W), key (B, E, H, W), value (B, C, H, W)
std::tuple<Tensor, Tensor, Tensor> criss_cross_rows(Tensor query, Tensor key, Tensor value, double scale) {
  return attend_to_part("criss_cross_rows", Keys::kRow, query, key, value, scale);
}
std::tuple<Tensor, Tensor, Tensor> criss_cross_columns(Tensor query, Tensor key, Tensor value, double scale) {
  return attend_to_part("criss_cross_columns", Keys::kColumn, query, key, value, scale);
}

// As of differentiate_part.
std::tuple<Tensor, Tensor, Tensor> criss_cross_rows_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor logsumexp, Tensor logsumexp_low, Tensor delta,
    double scale, std::vector<bool> needs_input_grad) {
  return differentiate_part(
      "criss_cross_rows_backward", Keys::kRow, grad_output, query, key, value, logsumexp, logsumexp_low, delta, scale,
      needs_input_grad);
}
std::tuple<Tensor, Tensor, Tensor> criss_cross_columns_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor logsumexp, Tensor logsumexp_low, Tensor delta,
    double scale, std::vector<bool> needs_input_grad) {
  return differentiate_part(
      "criss_cross_columns_backward", Keys::kColumn, grad_output, query, key, value, logsumexp, logsumexp_low, delta,
      scale, needs_input_grad);
}

}  // namespace

SEGATTN_REGISTER_CPU(m) {
  m.impl("criss_cross_affinity", TORCH_BOX(&criss_cross_affinity));
  m.impl("criss_cross_affinity_backward", TORCH_BOX(&criss_cross_affinity_backward));
  m.impl("criss_cross_aggregation", TORCH_BOX(&criss_cross_aggregation));
  m.impl("criss_cross_aggregation_backward", TORCH_BOX(&criss_cross_aggregation_backward));
  m.impl("criss_cross_attention", TORCH_BOX(&criss_cross_attention));
  m.impl("criss_cross_attention_backward", TORCH_BOX(&criss_cross_attention_backward));
  m.impl("criss_cross_rows", TORCH_BOX(&criss_cross_rows));
  m.impl("criss_cross_rows_backward", TORCH_BOX(&criss_cross_rows_backward));
  m.impl("criss_cross_columns", TORCH_BOX(&criss_cross_columns));
  m.impl("criss_cross_columns_backward", TORCH_BOX(&criss_cross_columns_backward));
}

}  // namespace segattn::cpu
