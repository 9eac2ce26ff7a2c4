// Position attention on CUDA, host side: checks the arguments, plans the blocks, allocates and launches.
//
//   forward    weighted_sum.cuh, then merge_splits.cuh if the keys are split
//   backward   delta (common/row_kernels.cuh), weighted_sum.cuh for grad_value, query_key_gradient.cuh for the others
//   padding    kept_keys.cuh before both, and after the backward for grad_key and grad_value
// plan.cuh chooses the tiles. float64, and shapes that no tensor-core tile fits, run on simt.cuh.
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "checks/position.h"
#include "cuda/common/aligned.h"
#include "cuda/common/delta.h"
#include "cuda/common/launch_context.h"
#include "cuda/common/math.h"
#include "cuda/common/operands.h"
#include "cuda/position/kept_keys.h"
#include "cuda/position/launch.h"
#include "cuda/position/merge_splits.cuh"
#include "cuda/position/plan.cuh"
#include "registration.h"

namespace segattn::cuda {
namespace {

using Forward = std::tuple<Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor>;

struct ForwardCall {
  const LaunchContext& context;
  PositionSizes sizes;
  double scale;
  FeatureMap query;       // (B, E, *S)
  FeatureMap key;         // (B, E, *T)
  FeatureMap value;       // (B, C, *T)
  Tensor output;          // (B, C, *S)
  Tensor output_low;      // (B, C, *S), rounding error of the output; (B, 0, *S) if not wanted
  Tensor logsumexp;       // (B, *S), dtype of accumulation
  const int* key_counts;  // (B): only the first of the keys take part; null: all

  void* output_low_data() const { return output_low.size(1) > 0 ? output_low.mutable_data_ptr() : nullptr; }
};

struct BackwardCall {
  const LaunchContext& context;
  PositionSizes sizes;
  double scale;
  FeatureMap grad_output;                // (B, C, *S)
  FeatureMap query;                      // (B, E, *S)
  FeatureMap key;                        // (B, E, *T)
  FeatureMap value;                      // (B, C, *T)
  Tensor logsumexp;                      // (B, *S), contiguous, dtype of accumulation
  std::optional<Tensor> grad_logsumexp;  // (B, *S), contiguous, dtype of accumulation
  const int* key_counts;                 // as in ForwardCall
  bool keys_complete;                    // logsumexp and output are over the keys of this call
  // Each (0) if not needed. Those of key and value are (B, channels, *T).
  Tensor grad_query, grad_key, grad_value;
  std::optional<Tensor> delta;  // (B, N), dtype of accumulation; for the gradients of query and key

  bool needs_query() const { return is_needed(grad_query); }
  bool needs_key() const { return is_needed(grad_key); }
  bool needs_value() const { return is_needed(grad_value); }

 private:
  static bool is_needed(const Tensor& gradient) { return gradient.dim() > 1; }
};

// The operands of the backward pass with rows that start on 16 bytes, for the tensor-core kernels.
struct AlignedOperands {
  FeatureMap grad_output;
  FeatureMap query;
  FeatureMap key;
  FeatureMap value;
};

// (B, *S)
std::vector<int64_t> logsumexp_sizes(const Tensor& query) {
  const auto sizes = query.sizes();
  std::vector<int64_t> result(sizes.begin(), sizes.end());
  result.erase(result.begin() + 1);
  return result;
}

// visit.operator()<Keys>()
template <class Visit>
void with_keys(const int* key_counts, const Visit& visit) {
  if (key_counts != nullptr) {
    visit.template operator()<Keys::kKept>();
  } else {
    visit.template operator()<Keys::kAll>();
  }
}

float* float_data(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

// ---- SIMT -----------------------------------------------------------------------------------------------------------

enum class Owned { kQueries, kKeys };

SimtParams simt_params(const PositionSizes& sizes, double scale, Owned owned) {
  SimtParams params{};
  params.batch = sizes.batch;
  params.owned_positions = static_cast<int>(owned == Owned::kQueries ? sizes.queries : sizes.keys);
  params.streamed_positions = static_cast<int>(owned == Owned::kQueries ? sizes.keys : sizes.queries);
  params.key_channels = static_cast<int>(sizes.key_channels);
  params.value_channels = static_cast<int>(sizes.value_channels);
  params.scale = scale;
  return params;
}

void forward_simt(const ForwardCall& call) {
  SimtParams params = simt_params(call.sizes, call.scale, Owned::kQueries);
  params.owned = call.query.operand;
  params.streamed = call.key.operand;
  params.values = call.value.operand;
  params.output = call.output.mutable_data_ptr();
  params.output_low = call.output_low_data();
  params.logsumexp = call.logsumexp.mutable_data_ptr();
  params.out_channels = params.value_channels;
  params.key_counts = call.key_counts;
  with_element(call.context.dtype, [&]<class T>() {
    with_keys(call.key_counts, [&]<Keys kKeys>() {
      launch_simt_sum<T, PositionSum::kForward, kKeys>(params, call.context.stream);
    });
  });
}

SimtParams simt_gradient_params(const BackwardCall& call, Owned owned, const Tensor& gradient) {
  SimtParams params = simt_params(call.sizes, call.scale, owned);
  params.output = gradient.mutable_data_ptr();
  params.out_channels = static_cast<int>(gradient.size(1));
  params.logsumexp = call.logsumexp.mutable_data_ptr();
  params.delta = data_of(call.delta);
  params.key_counts = call.key_counts;
  return params;
}

void value_gradient_simt(const BackwardCall& call) {
  SimtParams params = simt_gradient_params(call, Owned::kKeys, call.grad_value);
  params.owned = call.key.operand;
  params.streamed = call.query.operand;
  params.values = call.grad_output.operand;
  with_element(call.context.dtype, [&]<class T>() {
    launch_simt_sum<T, PositionSum::kValueGradient, Keys::kAll>(params, call.context.stream);
  });
}

// (B, E, N) in float32: every query's mean key, computed as attention with the keys as values.
Tensor mean_key_simt(const BackwardCall& call) {
  const int64_t batch = call.sizes.batch, queries = call.sizes.queries;
  const Tensor& like = call.query.tensor;
  PositionSizes sizes = call.sizes;
  sizes.value_channels = sizes.key_channels;
  const Tensor mean_key = allocate(like, {batch, sizes.key_channels, queries}, ScalarType::Float);
  const Tensor no_output_low = allocate(like, {batch, 0, queries}, ScalarType::Float);
  forward_simt(
      {call.context, sizes, call.scale, call.query, call.key, call.key, mean_key, no_output_low,
       allocate_like(call.logsumexp), call.key_counts});
  return mean_key;
}

void query_gradient_simt(const BackwardCall& call) {
  SimtParams params = simt_gradient_params(call, Owned::kQueries, call.grad_query);
  params.owned = call.query.operand;
  params.streamed = params.values = call.key.operand;
  params.left = call.grad_output.operand;
  params.right = call.value.operand;
  with_keys(call.key_counts, [&]<Keys kKeys>() {
    if (call.context.dtype == ScalarType::Float && call.keys_complete) {
      const Tensor mean_key = mean_key_simt(call);
      params.mean_key = mean_key.const_data_ptr();
      params.grad_logsumexp = data_of(call.grad_logsumexp);
      launch_simt_sum<float, PositionSum::kCorrectedQueryGradient, kKeys>(params, call.context.stream);
    } else {
      with_element(call.context.dtype, [&]<class T>() {
        launch_simt_sum<T, PositionSum::kQueryGradient, kKeys>(params, call.context.stream);
      });
    }
  });
}

void key_gradient_simt(const BackwardCall& call) {
  SimtParams params = simt_gradient_params(call, Owned::kKeys, call.grad_key);
  params.owned = call.key.operand;
  params.streamed = params.values = call.query.operand;
  params.left = call.value.operand;
  params.right = call.grad_output.operand;
  with_element(call.context.dtype, [&]<class T>() {
    launch_simt_sum<T, PositionSum::kKeyGradient, Keys::kAll>(params, call.context.stream);
  });
}

// ---- tensor cores ---------------------------------------------------------------------------------------------------

// visit.operator()<Mma>(); does nothing for kSimt.
template <class Visit>
void with_mma(Arithmetic arithmetic, const Visit& visit) {
  switch (arithmetic) {
    case Arithmetic::kFloat16:
      return visit.template operator()<Mma16<__half>>();
    case Arithmetic::kBfloat16:
      return visit.template operator()<Mma16<__nv_bfloat16>>();
    case Arithmetic::kTf32:
      return visit.template operator()<MmaTf32<1>>();
    case Arithmetic::k3xTf32:
      return visit.template operator()<MmaTf32<3>>();
    case Arithmetic::kSimt:
      return;
  }
}

template <class Mma>
WeightedSumPlan weighted_sum_plan(const PositionSizes& sizes, const DeviceLimits& limits, Owned owned) {
  return plan_weighted_sum<Mma>(
      sizes.batch, static_cast<int>(owned == Owned::kQueries ? sizes.queries : sizes.keys),
      static_cast<int>(owned == Owned::kQueries ? sizes.keys : sizes.queries), static_cast<int>(sizes.key_channels),
      static_cast<int>(sizes.value_channels), limits);
}

WeightedSumParams weighted_sum_params(
    const WeightedSumPlan& plan, const PositionSizes& sizes, double scale, Owned owned) {
  WeightedSumParams params{};
  params.batch = sizes.batch;
  params.owned_positions = static_cast<int>(owned == Owned::kQueries ? sizes.queries : sizes.keys);
  params.streamed_positions = static_cast<int>(owned == Owned::kQueries ? sizes.keys : sizes.queries);
  params.key_channels = static_cast<int>(sizes.key_channels);
  params.value_channels = static_cast<int>(sizes.value_channels);
  params.scale = static_cast<float>(scale);
  params.owned_blocks = plan.owned_blocks;
  params.channel_blocks = plan.channel_blocks;
  params.splits = plan.splits;
  params.steps_per_split = plan.steps_per_split;
  return params;
}

void merge_splits(const ForwardCall& call, const WeightedSumParams& split) {
  MergeSplitsParams params;
  params.partials = static_cast<const float*>(split.output);
  params.partial_logsumexp = split.logsumexp;
  params.output = call.output.mutable_data_ptr();
  params.output_low = call.output_low_data();
  params.logsumexp = float_data(call.logsumexp);
  params.batch = split.batch;
  params.splits = split.splits;
  params.channels = split.value_channels;
  params.positions = split.owned_positions;
  params.position_blocks = ceil_div(params.positions, kRowThreads);
  params.channel_blocks = ceil_div(params.channels, kMergeChannels);
  params.key_counts = call.key_counts;
  const int64_t blocks = params.batch * params.position_blocks * params.channel_blocks;
  with_element(call.context.dtype, [&]<class T>() {
    if constexpr (sizeof(T) < 8) {
      with_keys(call.key_counts, [&]<Keys kKeys>() {
        SEGATTN_LAUNCH(
            (merge_splits_kernel<T, kKeys>), dim3(grid_blocks(blocks)), dim3(kRowThreads), 0, call.context.stream,
            params);
      });
    }
  });
}

// Returns false if no tile fits.
template <class Mma>
bool forward_mma(const ForwardCall& call) {
  const PositionSizes& sizes = call.sizes;
  const DeviceLimits& limits = call.context.limits;
  const cudaStream_t stream = call.context.stream;
  const WeightedSumPlan plan = weighted_sum_plan<Mma>(sizes, limits, Owned::kQueries);
  if (!plan.found) {
    return false;
  }
  const FeatureMap query = aligned(call.query, stream), key = aligned(call.key, stream);
  const FeatureMap value = aligned(call.value, stream);
  WeightedSumParams params = weighted_sum_params(plan, sizes, call.scale, Owned::kQueries);
  params.owned = query.operand;
  params.streamed = key.operand;
  params.values = value.operand;
  params.key_counts = call.key_counts;
  const auto launch = [&] {
    with_keys(call.key_counts, [&]<Keys kKeys>() {
      launch_weighted_sum<Mma, PositionSum::kForward, kKeys>(params, limits, stream);
    });
  };
  if (plan.splits == 1) {
    params.output = call.output.mutable_data_ptr();
    params.output_low = call.output_low_data();
    params.logsumexp = float_data(call.logsumexp);
    launch();
    return true;
  }
  const Tensor partials =
      allocate(call.output, {plan.splits, sizes.batch, sizes.value_channels, sizes.queries}, ScalarType::Float);
  const Tensor partial_logsumexp = allocate(call.output, {plan.splits, sizes.batch, sizes.queries}, ScalarType::Float);
  params.output = partials.mutable_data_ptr();
  params.logsumexp = float_data(partial_logsumexp);
  launch();
  merge_splits(call, params);
  return true;
}

// float32: grad_query -= (grad_sum - grad_logsumexp) * mean_key removes delta's rounding error (docs/decisions.md).
struct QueryCorrection {
  Tensor mean_key;                       // (groups, B, E, padded_queries): partials of sum_j P_ij key_j
  Tensor grad_sum;                       // (groups, B, padded_queries): partials of sum_j dS_ij
  std::optional<Tensor> grad_logsumexp;  // (B, *S)
};

// gradient (B, rows, *S) = factor * the sum of partials (count, B, rows, padded), with the correction if given.
void sum_partials(
    const LaunchContext& context, const Tensor& partials, int count, int padded, float factor, const Tensor& gradient,
    const std::optional<QueryCorrection>& correction = std::nullopt) {
  SumPartialsParams params{};
  params.partials = static_cast<const float*>(partials.const_data_ptr());
  if (correction.has_value()) {
    params.mean_key = static_cast<const float*>(correction->mean_key.const_data_ptr());
    params.grad_sum = static_cast<const float*>(correction->grad_sum.const_data_ptr());
    params.grad_logsumexp = static_cast<const float*>(data_of(correction->grad_logsumexp));
  }
  params.output = gradient.mutable_data_ptr();
  params.rows = static_cast<int>(gradient.size(1));
  params.rows_total = gradient.size(0) * gradient.size(1);
  params.partial_stride = params.rows_total * padded;
  params.partial_count = count;
  params.columns = static_cast<int>(positions_of(gradient));
  params.padded = padded;
  params.row_blocks = ceil_div(params.columns, kRowThreads);
  params.factor = factor;
  with_element(context.dtype, [&]<class T>() {
    if constexpr (sizeof(T) < 8) {
      SEGATTN_LAUNCH(
          (sum_partials_kernel<T>), dim3(grid_blocks(params.rows_total * params.row_blocks)), dim3(kRowThreads), 0,
          context.stream, params);
    }
  });
}

// Returns false if no tile fits.
template <class Mma>
bool value_gradient_mma(const BackwardCall& call, const AlignedOperands& operands) {
  const PositionSizes& sizes = call.sizes;
  const LaunchContext& context = call.context;
  const WeightedSumPlan plan = weighted_sum_plan<Mma>(sizes, context.limits, Owned::kKeys);
  if (!plan.found) {
    return false;
  }
  WeightedSumParams params = weighted_sum_params(plan, sizes, call.scale, Owned::kKeys);
  params.owned = operands.key.operand;
  params.streamed = operands.query.operand;
  params.values = operands.grad_output.operand;
  params.logsumexp = float_data(call.logsumexp);
  if (plan.splits == 1) {
    params.output = call.grad_value.mutable_data_ptr();
    launch_weighted_sum<Mma, PositionSum::kValueGradient, Keys::kAll>(params, context.limits, context.stream);
    return true;
  }
  const Tensor partials =
      allocate(call.grad_value, {plan.splits, sizes.batch, sizes.value_channels, sizes.keys}, ScalarType::Float);
  params.output = partials.mutable_data_ptr();
  launch_weighted_sum<Mma, PositionSum::kValueGradient, Keys::kAll>(params, context.limits, context.stream);
  sum_partials(context, partials, plan.splits, params.owned_positions, 1.0f, call.grad_value);
  return true;
}

// Returns false if no tile fits. The kernel computes both gradients together; the one that is not needed remains in its
// partials.
template <class Mma>
bool query_key_gradient_mma(const BackwardCall& call, const AlignedOperands& operands) {
  const PositionSizes& sizes = call.sizes;
  const LaunchContext& context = call.context;
  QueryKeyGradientParams params{};
  params.batch = sizes.batch;
  params.queries = static_cast<int>(sizes.queries);
  params.keys = static_cast<int>(sizes.keys);
  params.key_channels = static_cast<int>(sizes.key_channels);
  params.value_channels = static_cast<int>(sizes.value_channels);
  const QueryKeyGradientPlan plan = plan_query_key_gradient<Mma>(
      params.batch, params.queries, params.keys, params.key_channels, params.value_channels, context.limits);
  if (!plan.found) {
    return false;
  }
  const std::vector<int64_t> query_sizes{plan.groups, sizes.batch, sizes.key_channels, plan.padded_queries};
  const Tensor query_partials = allocate(call.logsumexp, query_sizes, ScalarType::Float);
  const Tensor key_partials =
      allocate(call.logsumexp, {plan.ranges, sizes.batch, sizes.key_channels, plan.padded_keys}, ScalarType::Float);
  params.query = operands.query.operand;
  params.key = operands.key.operand;
  params.value = operands.value.operand;
  params.grad_output = operands.grad_output.operand;
  params.logsumexp = float_data(call.logsumexp);
  params.delta = float_data(*call.delta);
  params.grad_query_partials = float_data(query_partials);
  params.grad_key_partials = float_data(key_partials);
  params.padded_queries = plan.padded_queries;
  params.padded_keys = plan.padded_keys;
  params.scale = static_cast<float>(call.scale);
  params.query_blocks = plan.query_blocks;
  params.ranges = plan.ranges;
  params.blocks_per_range = plan.blocks_per_range;
  params.key_blocks = plan.key_blocks;
  params.groups = plan.groups;
  params.blocks_per_group = plan.blocks_per_group;
  std::optional<QueryCorrection> correction;
  if (sizeof(typename Mma::Element) == 4) {
    correction = QueryCorrection{
        allocate(call.logsumexp, query_sizes, ScalarType::Float),
        allocate(call.logsumexp, {plan.groups, sizes.batch, plan.padded_queries}, ScalarType::Float),
        call.grad_logsumexp};
    params.mean_key_partials = float_data(correction->mean_key);
    params.grad_sum_partials = float_data(correction->grad_sum);
  }
  params.key_counts = call.key_counts;
  with_keys(call.key_counts, [&]<Keys kKeys>() {
    launch_query_key_gradient<Mma, kKeys>(params, context.limits, context.stream);
  });
  if (call.needs_query()) {
    sum_partials(
        context, query_partials, plan.groups, plan.padded_queries, params.scale, call.grad_query,
        call.keys_complete ? correction : std::nullopt);
  }
  if (call.needs_key()) {
    sum_partials(context, key_partials, plan.ranges, plan.padded_keys, params.scale, call.grad_key);
  }
  return true;
}

// ---- operators ------------------------------------------------------------------------------------------------------

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
  const FeatureMap key_map = feature_map(key), value_map = feature_map(value);
  const bool uses_value = needs_query || needs_key;
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
        context, call.grad_output, feature_map(output), low, call.grad_logsumexp, {sizes.batch, sizes.queries});
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
