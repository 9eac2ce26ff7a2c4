// Position attention on the CPU: checks, outputs, dtype dispatch, registration.
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common/dispatch.h"
#include "cpu/common/parallel.h"
#include "cpu/common/tensors.h"
#include "cpu/position/backward.h"
#include "cpu/position/forward.h"
#include "cpu/position/padded_keys.h"
#include "registration.h"

namespace segattn::cpu {

namespace {

std::int64_t multiply_adds(const PositionSizes& sizes) {
  return sizes.batch * sizes.queries * sizes.keys * (sizes.key_channels + sizes.value_channels);
}

// padding: (B, M), or null
template <class T>
void attend(const PositionForwardArguments<T>& arguments, const bool* padding) {
  if (padding != nullptr) {
    attend_without_padding(arguments, padding);
  } else {
    PositionForward<T>(arguments).run();
  }
}

// padding: (B, M), or null
template <class T>
void differentiate(const PositionBackwardArguments<T>& arguments, const bool* padding) {
  if (padding != nullptr) {
    differentiate_without_padding(arguments, padding);
  } else {
    PositionBackward<T>(arguments).run();
  }
}

// (B, channels, *S) in the dtype of accumulation, for a feature map (B, _, *S)
Tensor accumulated_feature_map(const Tensor& like, std::int64_t channels) {
  std::vector<std::int64_t> shape(like.sizes().begin(), like.sizes().end());
  shape[1] = channels;
  return new_tensor(shape, accumulation_dtype(like.scalar_type()));
}

// The gradient of an input in the dtype of accumulation, (0,) if it is not wanted
Tensor accumulated_gradient(const Tensor& input, bool wanted) {
  const ScalarType dtype = accumulation_dtype(input.scalar_type());
  return wanted ? new_tensor(input.sizes(), dtype) : new_tensor({0}, dtype);
}

// query (B, E, *S), key (B, E, *T), value (B, C, *T), key_padding_mask (B, *T)
// -> output (B, C, *S), logsumexp (B, *S), output_low (B, C, *S) or (B, 0, *S), logsumexp_low (B, *S), empty for 16-bit
// types
std::tuple<Tensor, Tensor, Tensor, Tensor> position_attention(
    Tensor query, Tensor key, Tensor value, double scale, bool with_low, std::optional<Tensor> key_padding_mask) {
  const PositionSizes sizes = check_position_attention(query, key, value, scale, key_padding_mask);
  make_contiguous(query, key, value, key_padding_mask);
  Tensor output = new_feature_map(query, sizes.value_channels);
  Tensor output_low = new_feature_map(query, low_channels(value, with_low));
  Tensor logsumexp = new_position_statistics(query);
  Tensor logsumexp_low = new_tensor(logsumexp_low_sizes(query), logsumexp.scalar_type());
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    const PositionForwardArguments<T> arguments{
        .query = data<T>(query),
        .key = data<T>(key),
        .value = data<T>(value),
        .output = {.rounded = mutable_data<T>(output)},
        .output_low = low_channels(value, with_low) > 0 ? mutable_data<T>(output_low) : nullptr,
        .logsumexp = mutable_data<A>(logsumexp),
        .logsumexp_low = sizeof(T) == 2 ? nullptr : mutable_data<A>(logsumexp_low),
        .sizes = sizes,
        .scale = static_cast<A>(scale),
        .is_part = false};
    attend(arguments, data<bool>(key_padding_mask));
  });
  return {output, logsumexp, output_low, logsumexp_low};
}

// grad_output (B, C, *S), query (B, E, *S), key (B, E, *T), value (B, C, *T), output (B, C, *S), logsumexp (B, *S),
// output_low (B, C, *S), logsumexp_low, grad_logsumexp (B, *S), key_padding_mask (B, *T)
// -> grad_query (B, E, *S), grad_key (B, E, *T), grad_value (B, C, *T)
std::tuple<Tensor, Tensor, Tensor> position_attention_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, double scale,
    std::optional<Tensor> output_low, std::optional<Tensor> logsumexp_low, std::optional<Tensor> grad_logsumexp,
    std::vector<bool> needs_input_grad, std::optional<Tensor> key_padding_mask, bool keys_complete) {
  const PositionSizes sizes = check_position_attention_backward(
      grad_output, query, key, value, output, logsumexp, scale, output_low, logsumexp_low, grad_logsumexp,
      needs_input_grad, key_padding_mask);
  Tensor grad_query = new_gradient(query, needs_input_grad[0]);
  Tensor grad_key = new_gradient(key, needs_input_grad[1]);
  Tensor grad_value = new_gradient(value, needs_input_grad[2]);
  if (!is_any_wanted(needs_input_grad)) {
    return {grad_query, grad_key, grad_value};
  }
  make_contiguous(
      grad_output, query, key, value, output, logsumexp, output_low, logsumexp_low, grad_logsumexp, key_padding_mask);
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    const PositionBackwardArguments<T> arguments{
        .grad_output = data<T>(grad_output),
        .query = data<T>(query),
        .key = data<T>(key),
        .value = data<T>(value),
        .output = data<T>(output),
        .output_low = data<T>(output_low),
        .logsumexp = data<A>(logsumexp),
        .logsumexp_low = data<A>(logsumexp_low),
        .grad_logsumexp = data<A>(grad_logsumexp),
        .delta = nullptr,
        .grad_query = {.rounded = gradient_data<T>(grad_query, needs_input_grad[0])},
        .grad_key = {.rounded = gradient_data<T>(grad_key, needs_input_grad[1])},
        .grad_value = {.rounded = gradient_data<T>(grad_value, needs_input_grad[2])},
        .sizes = sizes,
        .scale = static_cast<A>(scale),
        .keys_complete = keys_complete};
    differentiate(arguments, data<bool>(key_padding_mask));
  });
  return {grad_query, grad_key, grad_value};
}

// query (B, E, *S), key (B, E, *T), value (B, C, *T), key_padding_mask (B, *T)
// -> output (B, C, *S), logsumexp, logsumexp_low (B, *S)
std::tuple<Tensor, Tensor, Tensor> position_attention_partial(
    Tensor query, Tensor key, Tensor value, double scale, std::optional<Tensor> key_padding_mask) {
  const PositionSizes sizes = check_position_attention_partial(query, key, value, scale, key_padding_mask);
  make_contiguous(query, key, value, key_padding_mask);
  Tensor output = accumulated_feature_map(query, sizes.value_channels);
  Tensor logsumexp = new_position_statistics(query), logsumexp_low = new_position_statistics(query);
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    const PositionForwardArguments<T> arguments{
        .query = data<T>(query),
        .key = data<T>(key),
        .value = data<T>(value),
        .output = {.accumulated = mutable_data<A>(output)},
        .output_low = nullptr,
        .logsumexp = mutable_data<A>(logsumexp),
        .logsumexp_low = mutable_data<A>(logsumexp_low),
        .sizes = sizes,
        .scale = static_cast<A>(scale),
        .is_part = true};
    attend(arguments, data<bool>(key_padding_mask));
  });
  return {output, logsumexp, logsumexp_low};
}

// grad_output (B, C, *S), query (B, E, *S), key (B, E, *T), value (B, C, *T), logsumexp, logsumexp_low, delta (B, *S),
// key_padding_mask (B, *T) -> grad_query (B, E, *S), grad_key (B, E, *T), grad_value (B, C, *T)
std::tuple<Tensor, Tensor, Tensor> position_attention_partial_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor logsumexp, Tensor logsumexp_low, Tensor delta,
    double scale, std::vector<bool> needs_input_grad, std::optional<Tensor> key_padding_mask) {
  const PositionSizes sizes = check_position_attention_partial_backward(
      grad_output, query, key, value, logsumexp, logsumexp_low, delta, scale, needs_input_grad, key_padding_mask);
  Tensor grad_query = accumulated_gradient(query, needs_input_grad[0]);
  Tensor grad_key = accumulated_gradient(key, needs_input_grad[1]);
  Tensor grad_value = accumulated_gradient(value, needs_input_grad[2]);
  if (!is_any_wanted(needs_input_grad)) {
    return {grad_query, grad_key, grad_value};
  }
  make_contiguous(grad_output, query, key, value, logsumexp, logsumexp_low, delta, key_padding_mask);
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    const PositionBackwardArguments<T> arguments{
        .grad_output = data<T>(grad_output),
        .query = data<T>(query),
        .key = data<T>(key),
        .value = data<T>(value),
        .output = nullptr,
        .output_low = nullptr,
        .logsumexp = data<A>(logsumexp),
        .logsumexp_low = data<A>(logsumexp_low),
        .grad_logsumexp = nullptr,
        .delta = data<A>(delta),
        .grad_query = {.accumulated = gradient_data<A>(grad_query, needs_input_grad[0])},
        .grad_key = {.accumulated = gradient_data<A>(grad_key, needs_input_grad[1])},
        .grad_value = {.accumulated = gradient_data<A>(grad_value, needs_input_grad[2])},
        .sizes = sizes,
        .scale = static_cast<A>(scale),
        .keys_complete = false};
    differentiate(arguments, data<bool>(key_padding_mask));
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace

SEGATTN_REGISTER_CPU(m) {
  m.impl("position_attention", TORCH_BOX(&position_attention));
  m.impl("position_attention_backward", TORCH_BOX(&position_attention_backward));
  m.impl("position_attention_partial", TORCH_BOX(&position_attention_partial));
  m.impl("position_attention_partial_backward", TORCH_BOX(&position_attention_partial_backward));
}

}  // namespace segattn::cpu
