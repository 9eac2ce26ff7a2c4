// Channel attention on the CPU: checks, outputs, dtype dispatch, registration.
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/channel/backward.h"
#include "cpu/channel/forward.h"
#include "cpu/common/dispatch.h"
#include "cpu/common/parallel.h"
#include "cpu/common/tensors.h"
#include "registration.h"

namespace segattn::cpu {

namespace {

std::int64_t multiply_adds(const ChannelSizes& sizes) {
  return sizes.batch * sizes.query_channels * sizes.key_channels * (sizes.query_positions + sizes.value_positions);
}

// (B, C), usually one number that is expanded: copied here because the stable ABI's `contiguous` takes 1.2 us.
void make_factors_contiguous(std::optional<Tensor>& factors) {
  if (!factors.has_value() || factors->is_contiguous()) {
    return;
  }
  const Tensor copy = new_like(*factors);
  const auto copy_as = [&]<class A>(const A* source, A* target) {
    for (std::int64_t b = 0; b < factors->size(0); ++b) {
      for (std::int64_t c = 0; c < factors->size(1); ++c) {
        *target++ = source[b * factors->stride(0) + c * factors->stride(1)];
      }
    }
  };
  if (factors->scalar_type() == ScalarType::Double) {
    copy_as(data<double>(*factors), mutable_data<double>(copy));
  } else {
    copy_as(data<float>(*factors), mutable_data<float>(copy));
  }
  factors = copy;
}

// query (B, C, S) and key (B, K, S), contiguous; without key, query is both.
template <class T>
ChannelEnergySource<T> energy_source(const Tensor& query, const std::optional<Tensor>& key) {
  return {
      .symmetric = !key.has_value(),
      .query = data<T>(query),
      .key = key.has_value() ? data<T>(*key) : data<T>(query),
      .matrix = nullptr};
}

// query (B, C, *S), key (B, K, *S), value (B, K, *T) -> output (B, C, *T), logsumexp (B, C)
std::tuple<Tensor, Tensor> channel_attention(Tensor query, Tensor key, Tensor value, double scale) {
  const ChannelSizes sizes = check_channel_attention(query, key, value, scale);
  make_contiguous(query, key, value);
  Tensor output = new_feature_map(value, sizes.query_channels);
  Tensor logsumexp = new_channel_statistics(query);
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    const ChannelForwardArguments<T> arguments{
        .energy = energy_source<T>(query, key),
        .value = data<T>(value),
        .output = mutable_data<T>(output),
        .logsumexp = mutable_data<A>(logsumexp),
        .gamma = nullptr,
        .sizes = sizes,
        .scale = static_cast<A>(scale)};
    ChannelForward<T>(arguments).run();
  });
  return {output, logsumexp};
}

// grad_output (B, C, *T), query (B, C, *S), key (B, K, *S), value (B, K, *T)
// -> grad_query (B, C, *S), grad_key (B, K, *S), grad_value (B, K, *T)
std::tuple<Tensor, Tensor, Tensor> channel_attention_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, double scale, std::vector<bool> needs_input_grad) {
  const ChannelSizes sizes = check_channel_attention_backward(grad_output, query, key, value, scale, needs_input_grad);
  Tensor grad_query = new_gradient(query, needs_input_grad[0]);
  Tensor grad_key = new_gradient(key, needs_input_grad[1]);
  Tensor grad_value = new_gradient(value, needs_input_grad[2]);
  if (!is_any_wanted(needs_input_grad)) {
    return {grad_query, grad_key, grad_value};
  }
  make_contiguous(grad_output, query, key, value);
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    const ChannelBackwardArguments<T> arguments{
        .grad_output = data<T>(grad_output),
        .energy = energy_source<T>(query, key),
        .given = nullptr,
        .value = data<T>(value),
        .grad_energy = nullptr,
        .grad_query = gradient_data<T>(grad_query, needs_input_grad[0]),
        .grad_key = gradient_data<T>(grad_key, needs_input_grad[1]),
        .grad_value = gradient_data<T>(grad_value, needs_input_grad[2]),
        .gamma = nullptr,
        .grad_gamma = nullptr,
        .sizes = sizes,
        .scale = static_cast<A>(scale)};
    ChannelBackward<T>(arguments).run();
  });
  return {grad_query, grad_key, grad_value};
}

// input (B, C, *S), gamma (B, C) -> output (B, C, *S), logsumexp (B, C)
std::tuple<Tensor, Tensor> channel_self_attention(Tensor input, double scale, std::optional<Tensor> gamma) {
  const ChannelSizes sizes = check_channel_self_attention(input, scale, gamma);
  make_contiguous(input);
  make_factors_contiguous(gamma);
  Tensor output = new_like(input);
  Tensor logsumexp = new_channel_statistics(input);
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(input.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    const ChannelForwardArguments<T> arguments{
        .energy = energy_source<T>(input, std::nullopt),
        .value = data<T>(input),
        .output = mutable_data<T>(output),
        .logsumexp = mutable_data<A>(logsumexp),
        .gamma = data<A>(gamma),
        .sizes = sizes,
        .scale = static_cast<A>(scale)};
    ChannelForward<T>(arguments).run();
  });
  return {output, logsumexp};
}

// grad_output (B, C, *S), input (B, C, *S), gamma (B, C) -> grad_input (B, C, *S), grad_gamma (B, C)
std::tuple<Tensor, Tensor> channel_self_attention_backward(
    Tensor grad_output, Tensor input, double scale, std::optional<Tensor> gamma, std::vector<bool> needs_input_grad) {
  const ChannelSizes sizes = check_channel_self_attention_backward(grad_output, input, scale, gamma, needs_input_grad);
  Tensor grad_input = new_gradient(input, needs_input_grad[0]);
  Tensor grad_gamma = new_gradient(new_channel_statistics(input), needs_input_grad[1]);
  if (!is_any_wanted(needs_input_grad)) {
    return {grad_input, grad_gamma};
  }
  make_contiguous(grad_output, input);
  make_factors_contiguous(gamma);
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(input.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    const ChannelBackwardArguments<T> arguments{
        .grad_output = data<T>(grad_output),
        .energy = energy_source<T>(input, std::nullopt),
        .given = nullptr,
        .value = data<T>(input),
        .grad_energy = nullptr,
        .grad_query = nullptr,
        .grad_key = gradient_data<T>(grad_input, needs_input_grad[0]),
        .grad_value = nullptr,
        .gamma = data<A>(gamma),
        .grad_gamma = gradient_data<A>(grad_gamma, needs_input_grad[1]),
        .sizes = sizes,
        .scale = static_cast<A>(scale)};
    ChannelBackward<T>(arguments).run();
  });
  return {grad_input, grad_gamma};
}

// query (B, C, *S), key (B, K, *S) -> energy (B, C, K)
Tensor channel_energy(Tensor query, std::optional<Tensor> key) {
  const ChannelSizes sizes = check_channel_energy(query, key);
  make_contiguous(query);
  make_contiguous(key);
  Tensor energy =
      new_tensor({sizes.batch, sizes.query_channels, sizes.key_channels}, accumulation_dtype(query.scalar_type()));
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    const ChannelEnergySource<T> source = energy_source<T>(query, key);
    ChannelEnergies<T>(source, sizes).store(mutable_data<AccumulatorOf<T>>(energy));
  });
  return energy;
}

// grad_energy (B, C, K), query (B, C, *S), key (B, K, *S) -> grad_query (B, C, *S), grad_key (B, K, *S)
std::tuple<Tensor, Tensor> channel_energy_backward(
    Tensor grad_energy, Tensor query, std::optional<Tensor> key, std::vector<bool> needs_input_grad) {
  const ChannelSizes sizes = check_channel_energy_backward(grad_energy, query, key, needs_input_grad);
  const bool needs_query = needs_input_grad[0], needs_key = key.has_value() && needs_input_grad[1];
  Tensor grad_query = new_gradient(query, needs_query);
  Tensor grad_key = new_gradient(needs_key ? *key : query, needs_key);
  if ((!needs_query && !needs_key) || sizes.query_positions == 0) {
    return {grad_query, grad_key};
  }
  make_contiguous(grad_energy, query);
  make_contiguous(key);
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    T* const of_query = gradient_data<T>(grad_query, needs_query);
    const ChannelBackwardArguments<T> arguments{
        .grad_output = nullptr,
        .energy = energy_source<T>(query, key),
        .given = data<AccumulatorOf<T>>(grad_energy),
        .value = nullptr,
        .grad_energy = nullptr,
        .grad_query = key.has_value() ? of_query : nullptr,
        .grad_key = key.has_value() ? gradient_data<T>(grad_key, needs_key) : of_query,
        .grad_value = nullptr,
        .gamma = nullptr,
        .grad_gamma = nullptr,
        .sizes = sizes,
        .scale = 1};
    ChannelBackward<T>(arguments).run();
  });
  return {grad_query, grad_key};
}

// energy (B, C, K), value (B, K, *T), gamma (B, C) -> output (B, C, *T), logsumexp (B, C)
std::tuple<Tensor, Tensor> channel_apply(Tensor energy, Tensor value, double scale, std::optional<Tensor> gamma) {
  const ChannelSizes sizes = check_channel_apply(energy, value, scale, gamma);
  make_contiguous(energy, value);
  make_factors_contiguous(gamma);
  Tensor output = new_feature_map(value, sizes.query_channels);
  Tensor logsumexp = new_channel_statistics(energy);
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(value.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    const ChannelForwardArguments<T> arguments{
        .energy = {.symmetric = false, .query = nullptr, .key = nullptr, .matrix = data<A>(energy)},
        .value = data<T>(value),
        .output = mutable_data<T>(output),
        .logsumexp = mutable_data<A>(logsumexp),
        .gamma = data<A>(gamma),
        .sizes = sizes,
        .scale = static_cast<A>(scale)};
    ChannelForward<T>(arguments).run();
  });
  return {output, logsumexp};
}

// grad_output (B, C, *T), energy (B, C, K), value (B, K, *T), gamma (B, C)
// -> grad_energy (B, C, K), grad_value (B, K, *T), grad_gamma (B, C)
std::tuple<Tensor, Tensor, Tensor> channel_apply_backward(
    Tensor grad_output, Tensor energy, Tensor value, double scale, std::optional<Tensor> gamma,
    std::vector<bool> needs_input_grad) {
  const ChannelSizes sizes = check_channel_apply_backward(grad_output, energy, value, scale, gamma, needs_input_grad);
  Tensor grad_energy = new_gradient(energy, needs_input_grad[0]);
  Tensor grad_value = new_gradient(value, needs_input_grad[1]);
  Tensor grad_gamma = new_gradient(new_channel_statistics(energy), needs_input_grad[2]);
  if (!is_any_wanted(needs_input_grad)) {
    return {grad_energy, grad_value, grad_gamma};
  }
  make_contiguous(grad_output, energy, value);
  make_factors_contiguous(gamma);
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(value.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    const ChannelBackwardArguments<T> arguments{
        .grad_output = data<T>(grad_output),
        .energy = {.symmetric = false, .query = nullptr, .key = nullptr, .matrix = data<A>(energy)},
        .given = nullptr,
        .value = data<T>(value),
        .grad_energy = gradient_data<A>(grad_energy, needs_input_grad[0]),
        .grad_query = nullptr,
        .grad_key = nullptr,
        .grad_value = gradient_data<T>(grad_value, needs_input_grad[1]),
        .gamma = data<A>(gamma),
        .grad_gamma = gradient_data<A>(grad_gamma, needs_input_grad[2]),
        .sizes = sizes,
        .scale = static_cast<A>(scale)};
    ChannelBackward<T>(arguments).run();
  });
  return {grad_energy, grad_value, grad_gamma};
}

}  // namespace

SEGATTN_REGISTER_CPU(m) {
  m.impl("channel_attention", TORCH_BOX(&channel_attention));
  m.impl("channel_attention_backward", TORCH_BOX(&channel_attention_backward));
  m.impl("channel_self_attention", TORCH_BOX(&channel_self_attention));
  m.impl("channel_self_attention_backward", TORCH_BOX(&channel_self_attention_backward));
  m.impl("channel_energy", TORCH_BOX(&channel_energy));
  m.impl("channel_energy_backward", TORCH_BOX(&channel_energy_backward));
  m.impl("channel_apply", TORCH_BOX(&channel_apply));
  m.impl("channel_apply_backward", TORCH_BOX(&channel_apply_backward));
}

}  // namespace segattn::cpu
