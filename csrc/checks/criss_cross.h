// The arguments of the criss-cross ops. The CPU and the CUDA host code call these checks first.
#pragma once

#include <optional>

#include "checks/check.h"

namespace segattn {

struct CrissCrossSizes {
  int64_t batch;           // B
  int64_t key_channels;    // E, of query and key; 0 where the op has none
  int64_t value_channels;  // C; 0 where the op has none
  int64_t height;          // H
  int64_t width;           // W

  int64_t reach() const { return height + width - 1; }  // positions of a query's row and column
};

// (B, H + W - 1, H, W): one channel for each position of the row and the column
inline void check_reach(std::string_view op, const Argument& argument, const CrissCrossSizes& sizes) {
  check_image(op, argument);
  if (argument.tensor.size(1) != sizes.reach()) {
    fail(op, argument.name, " must have H + W - 1 = ", sizes.reach(), " channels (got ", argument.tensor.size(1), ")");
  }
}

// query (B, E, H, W), key (B, E, H, W)
inline CrissCrossSizes check_criss_cross_affinity(
    const Tensor& query, const Tensor& key, std::string_view op = "criss_cross_affinity") {
  const Argument q{"query", query}, k{"key", key};
  check_dtype(op, q);
  check_like(op, k, q);
  check_image(op, q);
  check_image(op, k);
  check_has_channels(op, q);
  check_batch(op, k, q);
  check_channels(op, k, q);
  check_spatial(op, k, q);
  return {query.size(0), query.size(1), 0, query.size(2), query.size(3)};
}

// grad_affinity (B, H + W - 1, H, W), query (B, E, H, W), key (B, E, H, W)
inline CrissCrossSizes check_criss_cross_affinity_backward(
    const Tensor& grad_affinity, const Tensor& query, const Tensor& key, const std::vector<bool>& needs_input_grad) {
  constexpr std::string_view op = "criss_cross_affinity_backward";
  const CrissCrossSizes sizes = check_criss_cross_affinity(query, key, op);
  const Argument g{"grad_affinity", grad_affinity}, q{"query", query};
  check_like(op, g, q);
  check_reach(op, g, sizes);
  check_batch(op, g, q);
  check_spatial(op, g, q);
  check_needs_input_grad(op, needs_input_grad, 2);
  return sizes;
}

// attention (B, H + W - 1, H, W), value (B, C, H, W)
inline CrissCrossSizes check_criss_cross_aggregation(
    const Tensor& attention, const Tensor& value, std::string_view op = "criss_cross_aggregation") {
  const Argument a{"attention", attention}, v{"value", value};
  check_dtype(op, a);
  check_like(op, v, a);
  check_image(op, a);
  check_image(op, v);
  check_has_channels(op, v);
  const CrissCrossSizes sizes{value.size(0), 0, value.size(1), value.size(2), value.size(3)};
  check_batch(op, v, a);
  check_spatial(op, v, a);
  check_reach(op, a, sizes);
  return sizes;
}

// grad_output (B, C, H, W), attention (B, H + W - 1, H, W), value (B, C, H, W)
inline CrissCrossSizes check_criss_cross_aggregation_backward(
    const Tensor& grad_output, const Tensor& attention, const Tensor& value,
    const std::vector<bool>& needs_input_grad) {
  constexpr std::string_view op = "criss_cross_aggregation_backward";
  const CrissCrossSizes sizes = check_criss_cross_aggregation(attention, value, op);
  const Argument g{"grad_output", grad_output}, v{"value", value};
  check_like(op, g, v);
  check_shape(op, g, v);
  check_needs_input_grad(op, needs_input_grad, 2);
  return sizes;
}

// query (B, E, H, W), key (B, E, H, W), value (B, C, H, W)
inline CrissCrossSizes check_criss_cross_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, double scale,
    std::string_view op = "criss_cross_attention") {
  CrissCrossSizes sizes = check_criss_cross_affinity(query, key, op);
  const Argument q{"query", query}, v{"value", value};
  check_like(op, v, q);
  check_image(op, v);
  check_has_channels(op, v);
  check_batch(op, v, q);
  check_spatial(op, v, q);
  check_scale(op, scale);
  sizes.value_channels = value.size(1);
  return sizes;
}

// grad_output (B, C, H, W), query (B, E, H, W), key (B, E, H, W), value (B, C, H, W), output (B, C, H, W),
// logsumexp (B, H, W), logsumexp_low (B, H, W), grad_logsumexp (B, H, W)
inline CrissCrossSizes check_criss_cross_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& logsumexp, double scale, const std::optional<Tensor>& logsumexp_low,
    const std::optional<Tensor>& grad_logsumexp, const std::vector<bool>& needs_input_grad) {
  constexpr std::string_view op = "criss_cross_attention_backward";
  const CrissCrossSizes sizes = check_criss_cross_attention(query, key, value, scale, op);
  const Argument v{"value", value}, o{"output", output}, g{"grad_output", grad_output}, l{"logsumexp", logsumexp};
  check_like(op, o, v);
  check_shape(op, o, v);
  check_like(op, g, v);
  check_shape(op, g, v);
  check_same_device(op, l, v);
  check_dtype_is(op, l, accumulation_dtype(query.scalar_type()), "for these inputs");
  check_shape_is(
      op, l,
      "[" + std::to_string(sizes.batch) + ", " + std::to_string(sizes.height) + ", " + std::to_string(sizes.width) +
          "]");
  if (logsumexp_low.has_value()) {
    const Argument low{"logsumexp_low", *logsumexp_low};
    check_like(op, low, l);
    check_shape(op, low, l);
  }
  if (grad_logsumexp.has_value()) {
    const Argument gradient{"grad_logsumexp", *grad_logsumexp};
    check_like(op, gradient, l);
    check_shape(op, gradient, l);
  }
  check_needs_input_grad(op, needs_input_grad, 3);
  return sizes;
}

// grad_output (B, C, H, W), query (B, E, H, W), key (B, E, H, W), value (B, C, H, W), logsumexp (B, H, W),
// logsumexp_low (B, H, W), delta (B, H, W)
inline CrissCrossSizes check_criss_cross_part_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& logsumexp,
    const Tensor& logsumexp_low, const Tensor& delta, double scale, const std::vector<bool>& needs_input_grad,
    std::string_view op) {
  const CrissCrossSizes sizes = check_criss_cross_attention(query, key, value, scale, op);
  const Argument v{"value", value}, g{"grad_output", grad_output}, l{"logsumexp", logsumexp};
  const Argument low{"logsumexp_low", logsumexp_low}, d{"delta", delta};
  check_like(op, g, v);
  check_shape(op, g, v);
  check_same_device(op, l, v);
  check_dtype_is(op, l, accumulation_dtype(query.scalar_type()), "for these inputs");
  check_shape_is(
      op, l,
      "[" + std::to_string(sizes.batch) + ", " + std::to_string(sizes.height) + ", " + std::to_string(sizes.width) +
          "]");
  check_like(op, low, l);
  check_shape(op, low, l);
  check_like(op, d, l);
  check_shape(op, d, l);
  check_needs_input_grad(op, needs_input_grad, 3);
  return sizes;
}

}  // namespace segattn
