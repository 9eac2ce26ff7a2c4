// Channel attention on the CPU: checks, outputs, dtype dispatch, registration.
#include "../registration.h"
#include "channel_backward.h"
#include "dispatch.h"

#include <tuple>
#include <vector>

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

Tensor new_logsumexp(const Tensor& query) {
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
  Tensor logsumexp = new_logsumexp(query);
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    ChannelForward<T>({data<T>(query), data<T>(key), data<T>(value), mutable_data<T>(output),
                       mutable_data<A>(logsumexp), sizes, static_cast<A>(scale)})
        .run();
  });
  return {output, logsumexp};
}

// grad_output (B, C, *T), query (B, C, *S), key (B, K, *S), value (B, K, *T), logsumexp (B, C)
// -> grad_query (B, C, *S), grad_key (B, K, *S), grad_value (B, K, *T)
std::tuple<Tensor, Tensor, Tensor> channel_attention_backward(Tensor grad_output, Tensor query, Tensor key,
                                                              Tensor value, Tensor logsumexp, double scale) {
  const ChannelSizes sizes = check_channel_attention_backward(grad_output, query, key, value, logsumexp, scale);
  for (Tensor* tensor : {&grad_output, &query, &key, &value}) {
    *tensor = torch::stable::contiguous(*tensor);
  }
  Tensor grad_query = torch::stable::new_empty(query, query.sizes());
  Tensor grad_key = torch::stable::new_empty(key, key.sizes());
  Tensor grad_value = torch::stable::new_empty(value, value.sizes());
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    ChannelBackward<T>({data<T>(grad_output), data<T>(query), data<T>(key), data<T>(value),
                        mutable_data<T>(grad_query), mutable_data<T>(grad_key), mutable_data<T>(grad_value), sizes,
                        static_cast<AccumulatorOf<T>>(scale)})
        .run();
  });
  return {grad_query, grad_key, grad_value};
}

// input (B, C, *S) -> output (B, C, *S), logsumexp (B, C)
std::tuple<Tensor, Tensor> channel_self_attention(Tensor input, double scale) {
  const ChannelSizes sizes = check_channel_self_attention(input, scale);
  input = torch::stable::contiguous(input);
  Tensor output = torch::stable::new_empty(input, input.sizes());
  Tensor logsumexp = new_logsumexp(input);
  dispatch_dtype(input.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    ChannelForward<T>({nullptr, data<T>(input), data<T>(input), mutable_data<T>(output), mutable_data<A>(logsumexp),
                       sizes, static_cast<A>(scale)})
        .run();
  });
  return {output, logsumexp};
}

// grad_output (B, C, *S), input (B, C, *S), logsumexp (B, C) -> grad_input (B, C, *S)
Tensor channel_self_attention_backward(Tensor grad_output, Tensor input, Tensor logsumexp, double scale) {
  const ChannelSizes sizes = check_channel_self_attention_backward(grad_output, input, logsumexp, scale);
  grad_output = torch::stable::contiguous(grad_output);
  input = torch::stable::contiguous(input);
  Tensor grad_input = torch::stable::new_empty(input, input.sizes());
  dispatch_dtype(input.scalar_type(), [&]<class T>() {
    ChannelBackward<T>({data<T>(grad_output), nullptr, data<T>(input), data<T>(input), nullptr,
                        mutable_data<T>(grad_input), nullptr, sizes, static_cast<AccumulatorOf<T>>(scale)})
        .run();
  });
  return grad_input;
}

}  // namespace

SEGATTN_REGISTER_CPU(m) {
  m.impl("channel_attention", TORCH_BOX(&channel_attention));
  m.impl("channel_attention_backward", TORCH_BOX(&channel_attention_backward));
  m.impl("channel_self_attention", TORCH_BOX(&channel_self_attention));
  m.impl("channel_self_attention_backward", TORCH_BOX(&channel_self_attention_backward));
}

}  // namespace segattn::cpu
