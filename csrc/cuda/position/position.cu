// Position attention on CUDA: the operators. They check the arguments, allocate the results and move the kept keys of a
// key padding mask (kept_keys.h); forward.h and backward.h plan the blocks (plan.cuh) and launch the kernels.
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "checks/position.h"
#include "cuda/common/delta.h"
#include "cuda/common/launch_context.h"
#include "cuda/common/operands.h"
#include "cuda/position/backward.h"
#include "cuda/position/forward.h"
#include "cuda/position/kept_keys.h"
#include "registration.h"

namespace segattn::cuda {
namespace {

using Forward = std::tuple<Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor>;

// (B, *S)
std::vector<int64_t> logsumexp_sizes(const Tensor& query) {
  const auto sizes = query.sizes();
  std::vector<int64_t> result(sizes.begin(), sizes.end());
  result.erase(result.begin() + 1);
  return result;
}

Forward position_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, double scale, bool with_low,
    const std::optional<Tensor>& key_padding_mask) {
  const PositionSizes sizes = check_position_attention(query, key, value, scale, key_padding_mask);
  const LaunchContext context("position_attention", query);
  context.position_count("query", sizes.queries);
  context.position_count("key", sizes.keys);
  const Tensor output = allocate_feature_map(query, value.size(1));
  const Tensor output_low = allocate_feature_map(query, low_channels(value, with_low));
  const Tensor logsumexp = allocate(query, logsumexp_sizes(query), accumulation_dtype(context.dtype));
  if (sizes.batch == 0 || sizes.queries == 0) {
    return {output, logsumexp, output_low};
  }
  std::optional<KeptKeys> kept;
  if (key_padding_mask.has_value()) {
    kept.emplace(context, sizes, *key_padding_mask);
  }
  const ForwardCall call{
      context,
      sizes,
      scale,
      feature_map(query),
      kept.has_value() ? kept->gather(feature_map(key)) : feature_map(key),
      kept.has_value() ? kept->gather(feature_map(value)) : feature_map(value),
      output,
      output_low,
      logsumexp,
      kept.has_value() ? kept->counts() : nullptr};
  bool done = false;
  with_mma(context.arithmetic, [&]<class Mma>() { done = forward_mma<Mma>(call); });
  if (!done) {
    forward_simt(call);
  }
  return {output, logsumexp, output_low};
}

Backward position_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& logsumexp, double scale, const std::optional<Tensor>& output_low,
    const std::optional<Tensor>& grad_logsumexp, const std::vector<bool>& needs_input_grad,
    const std::optional<Tensor>& key_padding_mask, bool keys_complete) {
  const PositionSizes sizes = check_position_attention_backward(
      grad_output, query, key, value, output, logsumexp, scale, output_low, grad_logsumexp, needs_input_grad,
      key_padding_mask);
  const LaunchContext context("position_attention_backward", query);
  context.position_count("query", sizes.queries);
  context.position_count("key", sizes.keys);
  const bool needs_query = needs_input_grad[0], needs_key = needs_input_grad[1], needs_value = needs_input_grad[2];
  const Tensor grad_query = allocate_gradient(query, needs_query), grad_key = allocate_gradient(key, needs_key);
  const Tensor grad_value = allocate_gradient(value, needs_value);
  if (sizes.batch == 0 || sizes.queries == 0) {  // no queries: the gradients of key and value are zero
    Tensor zero_key = grad_key, zero_value = grad_value;
    torch::stable::zero_(zero_key);
    torch::stable::zero_(zero_value);
    return {grad_query, grad_key, grad_value};
  }
  if (!needs_query && !needs_key && !needs_value) {
    return {grad_query, grad_key, grad_value};
  }
  std::optional<KeptKeys> kept;
  if (key_padding_mask.has_value()) {
    kept.emplace(context, sizes, *key_padding_mask);
  }
  const bool uses_value = needs_query || needs_key;  // else value is not read, and not copied
  const FeatureMap key_map = feature_map(key);
  const FeatureMap value_map = uses_value ? feature_map(value) : FeatureMap{value, operand_of(value), sizes.keys};
  BackwardCall call{
      context,
      sizes,
      scale,
      feature_map(grad_output),
      feature_map(query),
      kept.has_value() ? kept->gather(key_map) : key_map,
      kept.has_value() && uses_value ? kept->gather(value_map) : value_map,
      torch::stable::contiguous(logsumexp),
      contiguous(grad_logsumexp),
      kept.has_value() ? kept->counts() : nullptr,
      keys_complete,
      grad_query,
      kept.has_value() ? allocate_like(grad_key) : grad_key,
      kept.has_value() ? allocate_like(grad_value) : grad_value,
      std::nullopt};
  if (uses_value) {
    const std::optional<FeatureMap> low =
        output_low.has_value() ? std::optional(feature_map(*output_low)) : std::nullopt;
    call.delta = delta_of(
        context, call.grad_output, feature_map(output), low, call.grad_logsumexp, {sizes.batch, sizes.queries},
        rounds_weight_gradients_to_tf32(context, sizes));
  }
  bool value_done = !needs_value, query_key_done = !uses_value;
  with_mma(context.arithmetic, [&]<class Mma>() {
    const AlignedOperands operands{
        aligned(call.grad_output, context.stream), aligned(call.query, context.stream),
        aligned(call.key, context.stream), uses_value ? aligned(call.value, context.stream) : call.value};
    value_done = value_done || value_gradient_mma<Mma>(call, operands);
    query_key_done = query_key_done || query_key_gradient_mma<Mma>(call, operands);
  });
  if (!value_done) {
    value_gradient_simt(call);
  }
  if (!query_key_done && needs_query) {
    query_gradient_simt(call);
  }
  if (!query_key_done && needs_key) {
    key_gradient_simt(call);
  }
  if (kept.has_value() && needs_key) {
    kept->scatter(call.grad_key, grad_key);
  }
  if (kept.has_value() && needs_value) {
    kept->scatter(call.grad_value, grad_value);
  }
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace segattn::cuda

SEGATTN_REGISTER_CUDA(m) {
  m.impl("position_attention", TORCH_BOX(&segattn::cuda::position_attention));
  m.impl("position_attention_backward", TORCH_BOX(&segattn::cuda::position_attention_backward));
}
