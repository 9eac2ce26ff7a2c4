// The arguments of channel attention. The CPU and the CUDA host code call these checks first.
#pragma once

#include <optional>

#include "checks/check.h"

namespace segattn {

struct ChannelSizes {
  int64_t batch;            // B
  int64_t query_channels;   // C, rows of the attention map
  int64_t key_channels;     // K, columns of the attention map
  int64_t query_positions;  // S, summed over in the energy
  int64_t value_positions;  // T, positions of value and output
};

// query (B, C, *S), key (B, K, *S), value (B, K, *T)
inline ChannelSizes check_channel_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, double scale,
    std::string_view op = "channel_attention") {
  const Argument q{"query", query}, k{"key", key}, v{"value", value};
  check_dtype(op, q);
  check_like(op, k, q);
  check_like(op, v, q);
  check_feature_map(op, q);
  check_feature_map(op, k);
  check_feature_map(op, v);
  check_has_channels(op, q);
  check_has_channels(op, k);
  check_batch(op, k, q);
  check_batch(op, v, q);
  check_spatial(op, k, q);
  check_channels(op, v, k);
  check_has_positions(op, q);
  check_scale(op, scale);
  return {query.size(0), query.size(1), key.size(1), positions_of(query), positions_of(value)};
}

// grad_output (B, C, *T), query (B, C, *S), key (B, K, *S), value (B, K, *T)
inline ChannelSizes check_channel_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, double scale,
    const std::vector<bool>& needs_input_grad) {
  constexpr std::string_view op = "channel_attention_backward";
  const ChannelSizes sizes = check_channel_attention(query, key, value, scale, op);
  const Argument g{"grad_output", grad_output}, q{"query", query};
  check_like(op, g, q);
  check_feature_map(op, g);
  check_batch(op, g, q);
  check_channels(op, g, q);
  check_spatial(op, g, {"value", value});
  check_needs_input_grad(op, needs_input_grad, 3);
  return sizes;
}

// input (B, C, *S), gamma (B, C)
inline ChannelSizes check_channel_self_attention(
    const Tensor& input, double scale, const std::optional<Tensor>& gamma,
    std::string_view op = "channel_self_attention") {
  const Argument x{"input", input};
  check_dtype(op, x);
  check_feature_map(op, x);
  check_has_channels(op, x);
  check_has_positions(op, x);
  check_scale(op, scale);
  if (gamma.has_value()) {
    const Argument g{"gamma", *gamma};
    check_same_device(op, g, x);
    check_dtype_is(op, g, accumulation_dtype(input.scalar_type()), "for these inputs");
    check_shape_is(op, g, "[" + std::to_string(input.size(0)) + ", " + std::to_string(input.size(1)) + "]");
  }
  const int64_t positions = positions_of(input);
  return {input.size(0), input.size(1), input.size(1), positions, positions};
}

// grad_output (B, C, *S), input (B, C, *S), gamma (B, C)
inline ChannelSizes check_channel_self_attention_backward(
    const Tensor& grad_output, const Tensor& input, double scale, const std::optional<Tensor>& gamma,
    const std::vector<bool>& needs_input_grad) {
  constexpr std::string_view op = "channel_self_attention_backward";
  const ChannelSizes sizes = check_channel_self_attention(input, scale, gamma, op);
  const Argument g{"grad_output", grad_output}, x{"input", input};
  check_like(op, g, x);
  check_shape(op, g, x);
  check_needs_input_grad(op, needs_input_grad, 2);
  return sizes;
}

// query (B, C, *S), key (B, K, *S); query is key too if no key is given
inline ChannelSizes check_channel_energy(
    const Tensor& query, const std::optional<Tensor>& key, std::string_view op = "channel_energy") {
  const Tensor& other = key.has_value() ? *key : query;
  const Argument q{"query", query}, k{"key", other};
  check_dtype(op, q);
  check_like(op, k, q);
  check_feature_map(op, q);
  check_feature_map(op, k);
  check_has_channels(op, q);
  check_has_channels(op, k);
  check_batch(op, k, q);
  check_spatial(op, k, q);
  return {query.size(0), query.size(1), k.tensor.size(1), positions_of(query), 0};
}

// grad_energy (B, C, K), query (B, C, *S), key (B, K, *S)
inline ChannelSizes check_channel_energy_backward(
    const Tensor& grad_energy, const Tensor& query, const std::optional<Tensor>& key,
    const std::vector<bool>& needs_input_grad) {
  constexpr std::string_view op = "channel_energy_backward";
  const ChannelSizes sizes = check_channel_energy(query, key, op);
  const Argument g{"grad_energy", grad_energy};
  check_same_device(op, g, {"query", query});
  check_dtype_is(op, g, accumulation_dtype(query.scalar_type()), "for these inputs");
  check_shape_is(
      op, g,
      "[" + std::to_string(sizes.batch) + ", " + std::to_string(sizes.query_channels) + ", " +
          std::to_string(sizes.key_channels) + "]");
  check_needs_input_grad(op, needs_input_grad, 2);
  return sizes;
}

// energy (B, C, K), value (B, K, *T), gamma (B, C), which demands K = C
inline ChannelSizes check_channel_apply(
    const Tensor& energy, const Tensor& value, double scale, const std::optional<Tensor>& gamma,
    std::string_view op = "channel_apply") {
  const Argument e{"energy", energy}, v{"value", value};
  check_dtype(op, v);
  check_same_device(op, v, e);
  check_dtype_is(op, e, accumulation_dtype(value.scalar_type()), "for these inputs");
  check_feature_map(op, v);
  check_has_channels(op, v);
  if (energy.dim() != 3) {
    fail(op, "energy must have 3 dimensions, (batch, channels, keys) (got shape ", shape_of(energy), ")");
  }
  check_has_channels(op, e);
  check_batch(op, e, v);
  if (energy.size(2) != value.size(1)) {
    fail(op, "energy must have ", value.size(1), " keys, the channels of value (got ", energy.size(2), ")");
  }
  check_scale(op, scale);
  if (gamma.has_value()) {
    const Argument g{"gamma", *gamma};
    check_same_device(op, g, v);
    check_dtype_is(op, g, accumulation_dtype(value.scalar_type()), "for these inputs");
    check_shape_is(op, g, "[" + std::to_string(energy.size(0)) + ", " + std::to_string(energy.size(1)) + "]");
    if (energy.size(1) != energy.size(2)) {
      fail(op, "energy must have as many channels as keys with gamma (got shape ", shape_of(energy), ")");
    }
  }
  return {energy.size(0), energy.size(1), energy.size(2), 0, positions_of(value)};
}

// grad_output (B, C, *T), energy (B, C, K), value (B, K, *T), gamma (B, C)
inline ChannelSizes check_channel_apply_backward(
    const Tensor& grad_output, const Tensor& energy, const Tensor& value, double scale,
    const std::optional<Tensor>& gamma, const std::vector<bool>& needs_input_grad) {
  constexpr std::string_view op = "channel_apply_backward";
  const ChannelSizes sizes = check_channel_apply(energy, value, scale, gamma, op);
  const Argument g{"grad_output", grad_output}, v{"value", value};
  check_like(op, g, v);
  check_feature_map(op, g);
  check_batch(op, g, v);
  check_channels(op, g, {"energy", energy});
  check_spatial(op, g, v);
  check_needs_input_grad(op, needs_input_grad, 3);
  return sizes;
}

}  // namespace segattn
