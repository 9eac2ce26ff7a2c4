// Position attention on the CPU: checks, outputs, dtype dispatch, registration.
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common/dispatch.h"
#include "cpu/common/tensors.h"
#include "cpu/position/backward.h"
#include "cpu/position/forward.h"
#include "registration.h"

namespace segattn::cpu {

namespace {

// query (B, E, *S), key (B, E, *T), value (B, C, *T), key_padding_mask (B, *T)
// -> output (B, C, *S), logsumexp (B, *S), output_low (B, C, *S) or (B, 0, *S)
std::tuple<Tensor, Tensor, Tensor> position_attention(
    Tensor query, Tensor key, Tensor value, double scale, bool with_low, std::optional<Tensor> key_padding_mask) {
  const PositionSizes sizes = check_position_attention(query, key, value, scale, key_padding_mask);
  make_contiguous(query, key, value);
  Tensor output = new_feature_map(query, sizes.value_channels);
  Tensor output_low = new_feature_map(query, low_channels(value, with_low));
  Tensor logsumexp = new_position_statistics(query);
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    const PositionForwardArguments<T> arguments{
        .query = data<T>(query),
        .key = data<T>(key),
        .value = data<T>(value),
        .output = mutable_data<T>(output),
        .output_low = low_channels(value, with_low) > 0 ? mutable_data<T>(output_low) : nullptr,
        .logsumexp = mutable_data<A>(logsumexp),
        .sizes = sizes,
        .scale = static_cast<A>(scale)};
    PositionForward<T>(arguments).run();
  });
  return {output, logsumexp, output_low};
}

// grad_output (B, C, *S), query (B, E, *S), key (B, E, *T), value (B, C, *T), output (B, C, *S), logsumexp (B, *S),
// output_low (B, C, *S), grad_logsumexp (B, *S), key_padding_mask (B, *T)
// -> grad_query (B, E, *S), grad_key (B, E, *T), grad_value (B, C, *T)
std::tuple<Tensor, Tensor, Tensor> position_attention_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, double scale,
    std::optional<Tensor> output_low, std::optional<Tensor> grad_logsumexp, std::vector<bool> needs_input_grad,
    std::optional<Tensor> key_padding_mask, bool keys_complete) {
  const PositionSizes sizes = check_position_attention_backward(
      grad_output, query, key, value, output, logsumexp, scale, output_low, grad_logsumexp, needs_input_grad,
      key_padding_mask);
  make_contiguous(grad_output, query, key, value, output, logsumexp, output_low);
  Tensor grad_query = new_like(query);
  Tensor grad_key = new_like(key);
  Tensor grad_value = new_like(value);
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
        .grad_query = mutable_data<T>(grad_query),
        .grad_key = mutable_data<T>(grad_key),
        .grad_value = mutable_data<T>(grad_value),
        .sizes = sizes,
        .scale = static_cast<A>(scale)};
    PositionBackward<T>(arguments).run();
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace

SEGATTN_REGISTER_CPU(m) {
  m.impl("position_attention", TORCH_BOX(&position_attention));
  m.impl("position_attention_backward", TORCH_BOX(&position_attention_backward));
}

}  // namespace segattn::cpu
