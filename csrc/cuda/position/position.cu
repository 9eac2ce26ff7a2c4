// Position attention on CUDA: the operators. They check the arguments, allocate the results and move the kept keys of a
// key padding mask (kept_keys.h); forward.h and backward.h plan the blocks (plan.cuh) and launch the kernels.
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "checks/position.h"
#include "cuda/common/delta.h"
#include "cuda/common/launch_context.h"
#include "cuda/common/operands.h"
#include "cuda/position/backward.h"
#include "cuda/position/engine.h"
#include "cuda/position/forward.h"
#include "cuda/position/kept_keys.h"
#include "registration.h"

namespace segattn::cuda {
namespace {

using Backward = std::tuple<Tensor, Tensor, Tensor>;

// (B, *S), in the dtype of accumulation
Tensor allocate_statistic(const Tensor& query) {
  const auto sizes = query.sizes();
  std::vector<int64_t> result(sizes.begin(), sizes.end());
  result.erase(result.begin() + 1);
  return allocate(query, result, accumulation_dtype(query.scalar_type()));
}

// (B, channels, *S) in the dtype of accumulation, for a feature map (B, _, *S)
Tensor allocate_accumulated(const Tensor& like, int64_t channels) {
  const auto sizes = like.sizes();
  std::vector<int64_t> result(sizes.begin(), sizes.end());
  result[1] = channels;
  return allocate(like, result, accumulation_dtype(like.scalar_type()));
}

// As allocate_gradient, in the dtype of accumulation.
Tensor allocate_accumulated_gradient(const Tensor& input, bool needed) {
  return needed ? allocate_accumulated(input, input.size(1))
                : allocate(input, {0}, accumulation_dtype(input.scalar_type()));
}

// Checks the numbers of positions and applies the choice of the engine.
void prepare(LaunchContext& context, const PositionSizes& sizes) {
  context.position_count("query", sizes.queries);
  context.position_count("key", sizes.keys);
  if (choose_position_engine(context, sizes.key_channels) == PositionEngine::kSimt) {
    context.arithmetic = Arithmetic::kSimt;
  }
}

struct ForwardResults {
  Tensor output, output_low, logsumexp, logsumexp_low;  // as in ForwardCall
  bool is_part;
};

// query (B, E, *S), key (B, E, *T), value (B, C, *T), key_padding_mask (B, *T). There are queries and keys.
void attend(
    const LaunchContext& context, const PositionSizes& sizes, const Tensor& query, const Tensor& key,
    const Tensor& value, double scale, const std::optional<Tensor>& key_padding_mask, const ForwardResults& results) {
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
      results.output,
      results.output_low,
      results.logsumexp,
      results.logsumexp_low,
      kept.has_value() ? kept->counts() : nullptr,
      results.is_part};
  bool done = false;
  with_mma(context.arithmetic, [&]<class Mma>() { done = forward_mma<Mma>(call); });
  if (!done) {
    check_simt_may_serve(context, sizes.key_channels);
    forward_simt(call);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> position_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, double scale, bool with_low,
    const std::optional<Tensor>& key_padding_mask) {
  const PositionSizes sizes = check_position_attention(query, key, value, scale, key_padding_mask);
  LaunchContext context("position_attention", query);
  prepare(context, sizes);
  const ForwardResults results{
      allocate_feature_map(query, value.size(1)), allocate_feature_map(query, low_channels(value, with_low)),
      allocate_statistic(query), allocate(query, logsumexp_low_sizes(query), accumulation_dtype(context.dtype)), false};
  if (sizes.batch > 0 && sizes.queries > 0) {
    attend(context, sizes, query, key, value, scale, key_padding_mask, results);
  }
  return {results.output, results.logsumexp, results.output_low, results.logsumexp_low};
}

std::tuple<Tensor, Tensor, Tensor> position_attention_partial(
    const Tensor& query, const Tensor& key, const Tensor& value, double scale,
    const std::optional<Tensor>& key_padding_mask) {
  const PositionSizes sizes = check_position_attention_partial(query, key, value, scale, key_padding_mask);
  LaunchContext context("position_attention_partial", query);
  prepare(context, sizes);
  ForwardResults results{
      allocate_accumulated(query, value.size(1)), allocate_accumulated(query, 0), allocate_statistic(query),
      allocate_statistic(query), true};
  if (sizes.keys == 0) {
    torch::stable::zero_(results.output);
    torch::stable::fill_(results.logsumexp, -std::numeric_limits<double>::infinity());
    torch::stable::zero_(results.logsumexp_low);
  } else if (sizes.batch > 0 && sizes.queries > 0) {
    attend(context, sizes, query, key, value, scale, key_padding_mask, results);
  }
  return {results.output, results.logsumexp, results.logsumexp_low};
}

// What the backward pass knows of the queries: logsumexp, its rounding error and gradient, all (B, *S), contiguous.
struct QueryStatistics {
  Tensor logsumexp;
  std::optional<Tensor> logsumexp_low, grad_logsumexp;
  bool keys_complete, is_part;  // as in BackwardCall
};

// grad_output (B, C, *S), query (B, E, *S), key (B, E, *T), value (B, C, *T), key_padding_mask (B, *T). delta_of_call:
// the delta of a BackwardCall, (B, N). gradients: of query, key and value.
template <class Delta>
void differentiate(
    const LaunchContext& context, const PositionSizes& sizes, const Tensor& grad_output, const Tensor& query,
    const Tensor& key, const Tensor& value, double scale, const std::optional<Tensor>& key_padding_mask,
    const QueryStatistics& statistics, const Delta& delta_of_call, const std::vector<bool>& needs_input_grad,
    const Backward& gradients) {
  const bool needs_query = needs_input_grad[0], needs_key = needs_input_grad[1], needs_value = needs_input_grad[2];
  auto [grad_query, grad_key, grad_value] = gradients;
  if (sizes.batch == 0 || sizes.queries == 0) {  // no queries: the gradients of key and value are zero
    torch::stable::zero_(grad_key);
    torch::stable::zero_(grad_value);
    return;
  }
  if (sizes.keys == 0) {
    torch::stable::zero_(grad_query);
    return;
  }
  if (!needs_query && !needs_key && !needs_value) {
    return;
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
      statistics.logsumexp,
      statistics.logsumexp_low,
      statistics.grad_logsumexp,
      kept.has_value() ? kept->counts() : nullptr,
      statistics.keys_complete,
      statistics.is_part,
      grad_query,
      kept.has_value() ? allocate_like(grad_key) : grad_key,
      kept.has_value() ? allocate_like(grad_value) : grad_value,
      std::nullopt};
  if (uses_value) {
    call.delta = delta_of_call(call);
  }
  bool value_done = !needs_value, query_key_done = !uses_value;
  with_mma(context.arithmetic, [&]<class Mma>() {
    const auto ready = [&](const FeatureMap& features) { return ready_operand(context, sizes.key_channels, features); };
    const ReadyOperands operands{
        ready(call.grad_output), ready(call.query), ready(call.key), uses_value ? ready(call.value) : call.value};
    value_done = value_done || value_gradient_mma<Mma>(call, operands);
    query_key_done = query_key_done || query_key_gradient_mma<Mma>(call, operands);
  });
  if (!value_done || !query_key_done) {
    check_simt_may_serve(context, sizes.key_channels);
  }
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
}

// The rounding error of logsumexp (B, *S) as in BackwardCall: zeros where the kernels read one and none is given.
std::optional<Tensor> low_of(
    const LaunchContext& context, const Tensor& logsumexp, const std::optional<Tensor>& logsumexp_low) {
  if (is_16_bit(context.dtype) || logsumexp_low.has_value()) {
    return as_contiguous(logsumexp_low);
  }
  Tensor zeros = allocate_like(logsumexp);
  torch::stable::zero_(zeros);
  return zeros;
}

Backward position_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& logsumexp, double scale, const std::optional<Tensor>& output_low,
    const std::optional<Tensor>& logsumexp_low, const std::optional<Tensor>& grad_logsumexp,
    const std::vector<bool>& needs_input_grad, const std::optional<Tensor>& key_padding_mask, bool keys_complete) {
  const PositionSizes sizes = check_position_attention_backward(
      grad_output, query, key, value, output, logsumexp, scale, output_low, logsumexp_low, grad_logsumexp,
      needs_input_grad, key_padding_mask);
  LaunchContext context("position_attention_backward", query);
  prepare(context, sizes);
  const QueryStatistics statistics{
      as_contiguous(logsumexp), low_of(context, logsumexp, logsumexp_low), as_contiguous(grad_logsumexp), keys_complete,
      false};
  const auto delta = [&](const BackwardCall& call) {
    const std::optional<FeatureMap> low =
        output_low.has_value() ? std::optional(feature_map(*output_low)) : std::nullopt;
    return delta_of(
        context, call.grad_output, feature_map(output), low, call.grad_logsumexp, {sizes.batch, sizes.queries},
        rounds_weight_gradients_to_tf32(context, sizes));
  };
  const Backward gradients{
      allocate_gradient(query, needs_input_grad[0]), allocate_gradient(key, needs_input_grad[1]),
      allocate_gradient(value, needs_input_grad[2])};
  differentiate(
      context, sizes, grad_output, query, key, value, scale, key_padding_mask, statistics, delta, needs_input_grad,
      gradients);
  return gradients;
}

Backward position_attention_partial_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& logsumexp,
    const Tensor& logsumexp_low, const Tensor& delta, double scale, const std::vector<bool>& needs_input_grad,
    const std::optional<Tensor>& key_padding_mask) {
  const PositionSizes sizes = check_position_attention_partial_backward(
      grad_output, query, key, value, logsumexp, logsumexp_low, delta, scale, needs_input_grad, key_padding_mask);
  LaunchContext context("position_attention_partial_backward", query);
  prepare(context, sizes);
  const Backward gradients{
      allocate_accumulated_gradient(query, needs_input_grad[0]),
      allocate_accumulated_gradient(key, needs_input_grad[1]),
      allocate_accumulated_gradient(value, needs_input_grad[2])};
  const QueryStatistics statistics{
      weight_shift(context, as_contiguous(logsumexp)), as_contiguous(logsumexp_low), std::nullopt, false, true};
  differentiate(
      context, sizes, grad_output, query, key, value, scale, key_padding_mask, statistics,
      [&](const BackwardCall&) { return as_contiguous(delta); }, needs_input_grad, gradients);
  return gradients;
}

}  // namespace
}  // namespace segattn::cuda

SEGATTN_REGISTER_CUDA(m) {
  m.impl("position_attention", TORCH_BOX(&segattn::cuda::position_attention));
  m.impl("position_attention_backward", TORCH_BOX(&segattn::cuda::position_attention_backward));
  m.impl("position_attention_partial", TORCH_BOX(&segattn::cuda::position_attention_partial));
  m.impl("position_attention_partial_backward", TORCH_BOX(&segattn::cuda::position_attention_partial_backward));
}
