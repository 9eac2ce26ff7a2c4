// Position attention on the CPU: checks, outputs, dtype dispatch, registration.
#include <tuple>

#include "cpu/common/dispatch.h"
#include "cpu/position/backward.h"
#include "cpu/position/forward.h"
#include "registration.h"

namespace segattn::cpu {

namespace {

// query (B, E, *S), key (B, E, *T), value (B, C, *T) -> output (B, C, *S), logsumexp (B, *S), output_low (B, C, *S) or
// empty
std::tuple<Tensor, Tensor, Tensor> position_attention(
    Tensor query, Tensor key, Tensor value, double scale, bool with_low) {
  const PositionSizes sizes = check_position_attention(query, key, value, scale);
  query = torch::stable::contiguous(query);
  key = torch::stable::contiguous(key);
  value = torch::stable::contiguous(value);
  std::vector<std::int64_t> shape(query.sizes().begin(), query.sizes().end());
  shape[1] = sizes.value_channels;
  Tensor output = torch::stable::new_empty(query, shape);
  shape[1] = low_channels(value, with_low);
  Tensor output_low = torch::stable::new_empty(query, shape);
  shape.erase(shape.begin() + 1);
  Tensor logsumexp = torch::stable::new_empty(query, shape, accumulation_dtype(query.scalar_type()));
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    const PositionForwardArguments<T> arguments{
        static_cast<const T*>(query.const_data_ptr()),
        static_cast<const T*>(key.const_data_ptr()),
        static_cast<const T*>(value.const_data_ptr()),
        static_cast<T*>(output.mutable_data_ptr()),
        low_channels(value, with_low) > 0 ? static_cast<T*>(output_low.mutable_data_ptr()) : nullptr,
        static_cast<AccumulatorOf<T>*>(logsumexp.mutable_data_ptr()),
        sizes,
        static_cast<AccumulatorOf<T>>(scale)};
    PositionForward<T>(arguments).run();
  });
  return {output, logsumexp, output_low};
}

// grad_output (B, C, *S), query (B, E, *S), key (B, E, *T), value (B, C, *T), output (B, C, *S), logsumexp (B, *S),
// output_low (B, C, *S) -> grad_query (B, E, *S), grad_key (B, E, *T), grad_value (B, C, *T)
std::tuple<Tensor, Tensor, Tensor> position_attention_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, double scale,
    std::optional<Tensor> output_low) {
  const PositionSizes sizes =
      check_position_attention_backward(grad_output, query, key, value, output, logsumexp, scale, output_low);
  for (Tensor* tensor : {&grad_output, &query, &key, &value, &output, &logsumexp}) {
    *tensor = torch::stable::contiguous(*tensor);
  }
  if (output_low.has_value()) {
    output_low = torch::stable::contiguous(*output_low);
  }
  Tensor grad_query = torch::stable::new_empty(query, query.sizes());
  Tensor grad_key = torch::stable::new_empty(key, key.sizes());
  Tensor grad_value = torch::stable::new_empty(value, value.sizes());
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    const PositionBackwardArguments<T> arguments{
        static_cast<const T*>(grad_output.const_data_ptr()),
        static_cast<const T*>(query.const_data_ptr()),
        static_cast<const T*>(key.const_data_ptr()),
        static_cast<const T*>(value.const_data_ptr()),
        static_cast<const T*>(output.const_data_ptr()),
        output_low.has_value() ? static_cast<const T*>(output_low->const_data_ptr()) : nullptr,
        static_cast<const AccumulatorOf<T>*>(logsumexp.const_data_ptr()),
        static_cast<T*>(grad_query.mutable_data_ptr()),
        static_cast<T*>(grad_key.mutable_data_ptr()),
        static_cast<T*>(grad_value.mutable_data_ptr()),
        sizes,
        static_cast<AccumulatorOf<T>>(scale)};
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
