// The arguments of position attention. The CPU and the CUDA host code call these checks first.
#pragma once

#include <optional>

#include "checks/check.h"

namespace segattn {

struct PositionSizes {
  int64_t batch;           // B
  int64_t key_channels;    // E, of query and key
  int64_t value_channels;  // C
  int64_t queries;         // N, the positions of query
  int64_t keys;            // M, the positions of key and value
};

// query (B, E, *S), key (B, E, *T), value (B, C, *T), key_padding_mask (B, *T). is_part: the keys are a part of all
// keys, perhaps none.
inline PositionSizes check_position_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, double scale,
    const std::optional<Tensor>& key_padding_mask, std::string_view op = "position_attention", bool is_part = false) {
  const Argument q{"query", query}, k{"key", key}, v{"value", value};
  check_dtype(op, q);
  check_like(op, k, q);
  check_like(op, v, q);
  check_feature_map(op, q);
  check_feature_map(op, k);
  check_feature_map(op, v);
  check_has_channels(op, q);
  check_has_channels(op, v);
  check_batch(op, k, q);
  check_batch(op, v, q);
  check_channels(op, k, q);
  check_spatial(op, v, k);
  if (!is_part) {
    check_has_positions(op, k);
  }
  check_scale(op, scale);
  if (key_padding_mask.has_value()) {
    const Argument mask{"key_padding_mask", *key_padding_mask};
    check_same_device(op, mask, k);
    check_dtype_is(op, mask, ScalarType::Bool, "with True for padding");
    check_shape_is(op, mask, "[" + std::to_string(key.size(0)) + ", " + shape_of(key, 2).substr(1));
  }
  return {query.size(0), query.size(1), value.size(1), positions_of(query), positions_of(key)};
}

// Channels of output_low: C where the op returns the rounding error of output for the backward pass, else 0
inline int64_t low_channels(const Tensor& value, bool with_low) {
  return with_low && is_16_bit(value.scalar_type()) ? value.size(1) : 0;
}

// The shape of logsumexp_low: that of logsumexp, (B, *S), or (B, 0, *S[1:]) for 16-bit types, whose weights are rounded
// more coarsely.
inline std::vector<int64_t> logsumexp_low_sizes(const Tensor& query) {
  const auto sizes = query.sizes();
  std::vector<int64_t> result(sizes.begin(), sizes.end());
  result.erase(result.begin() + 1);
  result[1] = is_16_bit(query.scalar_type()) ? 0 : result[1];
  return result;
}

// grad_output (B, C, *S), query (B, E, *S), key (B, E, *T), value (B, C, *T), output (B, C, *S), logsumexp (B, *S),
// output_low (B, C, *S), logsumexp_low, grad_logsumexp (B, *S), key_padding_mask (B, *T)
inline PositionSizes check_position_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& logsumexp, double scale, const std::optional<Tensor>& output_low,
    const std::optional<Tensor>& logsumexp_low, const std::optional<Tensor>& grad_logsumexp,
    const std::vector<bool>& needs_input_grad, const std::optional<Tensor>& key_padding_mask) {
  constexpr std::string_view op = "position_attention_backward";
  const PositionSizes sizes = check_position_attention(query, key, value, scale, key_padding_mask, op);
  const Argument q{"query", query}, o{"output", output}, g{"grad_output", grad_output}, l{"logsumexp", logsumexp};
  check_like(op, o, q);
  check_like(op, g, q);
  check_feature_map(op, o);
  check_batch(op, o, q);
  check_channels(op, o, {"value", value});
  check_spatial(op, o, q);
  check_shape(op, g, o);
  check_same_device(op, l, q);
  check_dtype_is(op, l, accumulation_dtype(query.scalar_type()), "for these inputs");
  const std::string spatial = shape_of(query, 2);
  check_shape_is(op, l, "[" + std::to_string(sizes.batch) + ", " + spatial.substr(1));
  if (output_low.has_value()) {
    const Argument low{"output_low", *output_low};
    check_like(op, low, q);
    check_shape(op, low, o);
  }
  if (logsumexp_low.has_value()) {
    const Argument rest{"logsumexp_low", *logsumexp_low};
    check_like(op, rest, l);
    check_shape(op, rest, l);
  }
  if (grad_logsumexp.has_value()) {
    const Argument gradient{"grad_logsumexp", *grad_logsumexp};
    check_like(op, gradient, l);
    check_shape(op, gradient, l);
  }
  check_needs_input_grad(op, needs_input_grad, 3);
  return sizes;
}

// query (B, E, *S), key (B, E, *T), value (B, C, *T), key_padding_mask (B, *T)
inline PositionSizes check_position_attention_partial(
    const Tensor& query, const Tensor& key, const Tensor& value, double scale,
    const std::optional<Tensor>& key_padding_mask, std::string_view op = "position_attention_partial") {
  return check_position_attention(query, key, value, scale, key_padding_mask, op, true);
}

// grad_output (B, C, *S), query (B, E, *S), key (B, E, *T), value (B, C, *T), logsumexp, logsumexp_low, delta (B, *S),
// key_padding_mask (B, *T)
inline PositionSizes check_position_attention_partial_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& logsumexp,
    const Tensor& logsumexp_low, const Tensor& delta, double scale, const std::vector<bool>& needs_input_grad,
    const std::optional<Tensor>& key_padding_mask) {
  constexpr std::string_view op = "position_attention_partial_backward";
  const PositionSizes sizes = check_position_attention_partial(query, key, value, scale, key_padding_mask, op);
  const Argument q{"query", query}, g{"grad_output", grad_output}, l{"logsumexp", logsumexp};
  check_like(op, g, q);
  check_feature_map(op, g);
  check_batch(op, g, q);
  check_channels(op, g, {"value", value});
  check_spatial(op, g, q);
  check_same_device(op, l, q);
  check_dtype_is(op, l, accumulation_dtype(query.scalar_type()), "for these inputs");
  const std::string spatial = shape_of(query, 2);
  check_shape_is(op, l, "[" + std::to_string(sizes.batch) + ", " + spatial.substr(1));
  const Argument low{"logsumexp_low", logsumexp_low}, d{"delta", delta};
  check_like(op, low, l);
  check_shape(op, low, l);
  check_like(op, d, l);
  check_shape(op, d, l);
  check_needs_input_grad(op, needs_input_grad, 3);
  return sizes;
}

}  // namespace segattn
