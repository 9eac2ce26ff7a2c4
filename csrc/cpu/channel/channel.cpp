// Channel attention on the CPU: checks, outputs, dtype dispatch, registration.
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/channel/backward.h"
#include "cpu/common/dispatch.h"
#include "registration.h"

namespace segattn::cpu {

namespace {

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// (B, C) for query (B, C, *S): logsumexp, grad_gamma
Tensor new_of_channels(const Tensor& query) {
  return torch::stable::new_empty(query, query.sizes().slice(0, 2), accumulation_dtype(query.scalar_type()));
}

// query (B, C, *S), key (B, K, *S), value (B, K, *T) -> output (B, C, *T), logsumexp (B, C)
std::tuple<Tensor, Tensor> channel_attention(Tensor query, Tensor key, Tensor value, double scale) {
  const ChannelSizes sizes = check_channel_attention(query, key, value, scale);
  for (Tensor* tensor : {&query, &key, &value}) {
    *tensor = torch::stable::contiguous(*tensor);
  }
  std::vector<std::int64_t> shape(value.sizes().begin(), value.sizes().end());
  shape[1] = sizes.query_channels;
  Tensor output = torch::stable::new_empty(query, shape);
  Tensor logsumexp = new_of_channels(query);
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    ChannelForward<T>({data<T>(query), data<T>(key), data<T>(value), mutable_data<T>(output),
                       mutable_data<A>(logsumexp), nullptr, sizes, static_cast<A>(scale)})
        .run();
  });
  return {output, logsumexp};
}

// grad_output (B, C, *T), query (B, C, *S), key (B, K, *S), value (B, K, *T)
// -> grad_query (B, C, *S), grad_key (B, K, *S), grad_value (B, K, *T)
std::tuple<Tensor, Tensor, Tensor> channel_attention_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, double scale) {
  const ChannelSizes sizes = check_channel_attention_backward(grad_output, query, key, value, scale);
  for (Tensor* tensor : {&grad_output, &query, &key, &value}) {
    *tensor = torch::stable::contiguous(*tensor);
  }
  Tensor grad_query = torch::stable::new_empty(query, query.sizes());
  Tensor grad_key = torch::stable::new_empty(key, key.sizes());
  Tensor grad_value = torch::stable::new_empty(value, value.sizes());
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    ChannelBackward<T>({data<T>(grad_output), data<T>(query), data<T>(key), data<T>(value), mutable_data<T>(grad_query),
                        mutable_data<T>(grad_key), mutable_data<T>(grad_value), nullptr, nullptr, sizes,
                        static_cast<AccumulatorOf<T>>(scale)})
        .run();
  });
  return {grad_query, grad_key, grad_value};
}

// gamma (B, C), contiguous, or undefined
template <class T>
const AccumulatorOf<T>* gamma_data(const std::optional<Tensor>& gamma) {
  return gamma.has_value() ? data<AccumulatorOf<T>>(*gamma) : nullptr;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// input (B, C, *S), gamma (B, C) -> output (B, C, *S), logsumexp (B, C)
std::tuple<Tensor, Tensor> channel_self_attention(Tensor input, double scale, std::optional<Tensor> gamma) {
  const ChannelSizes sizes = check_channel_self_attention(input, scale, gamma);
  input = torch::stable::contiguous(input);
  gamma = contiguous(gamma);
  Tensor output = torch::stable::new_empty(input, input.sizes());
  Tensor logsumexp = new_of_channels(input);
  dispatch_dtype(input.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    ChannelForward<T>({nullptr, data<T>(input), data<T>(input), mutable_data<T>(output), mutable_data<A>(logsumexp),
                       gamma_data<T>(gamma), sizes, static_cast<A>(scale)})
        .run();
  });
  return {output, logsumexp};
}

// grad_output (B, C, *S), input (B, C, *S), gamma (B, C) -> grad_input (B, C, *S), grad_gamma (B, C)
std::tuple<Tensor, Tensor> channel_self_attention_backward(
    Tensor grad_output, Tensor input, double scale, std::optional<Tensor> gamma) {
  const ChannelSizes sizes = check_channel_self_attention_backward(grad_output, input, scale, gamma);
  grad_output = torch::stable::contiguous(grad_output);
  input = torch::stable::contiguous(input);
  gamma = contiguous(gamma);
  Tensor grad_input = torch::stable::new_empty(input, input.sizes());
  Tensor grad_gamma = new_of_channels(input);
  dispatch_dtype(input.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    ChannelBackward<T>({data<T>(grad_output), nullptr, data<T>(input), data<T>(input), nullptr,
                        mutable_data<T>(grad_input), nullptr, gamma_data<T>(gamma), mutable_data<A>(grad_gamma), sizes,
                        static_cast<A>(scale)})
        .run();
  });
  return {grad_input, grad_gamma};
}

}  // namespace

SEGATTN_REGISTER_CPU(m) {
  m.impl("channel_attention", TORCH_BOX(&channel_attention));
  m.impl("channel_attention_backward", TORCH_BOX(&channel_attention_backward));
  m.impl("channel_self_attention", TORCH_BOX(&channel_self_attention));
  m.impl("channel_self_attention_backward", TORCH_BOX(&channel_self_attention_backward));
}

}  // namespace segattn::cpu
