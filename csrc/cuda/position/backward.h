// Host side of the backward pass of position attention: weighted_sum.cuh (on Hopper wgmma/weighted_sum.cuh) for
// grad_value, query_key_gradient.cuh for the others, simt.cuh for all where no tensor-core tile fits. Launches and
// allocates only what the needed gradients take.
#pragma once

#include <optional>
#include <vector>

#include "checks/position.h"
#include "cuda/common/launch_context.h"
#include "cuda/common/math.h"
#include "cuda/common/operands.h"
#include "cuda/position/engine.h"
#include "cuda/position/forward.h"
#include "cuda/position/launch.h"
#include "cuda/position/plan.cuh"
#include "cuda/position/wgmma/launch.h"
#include "cuda/position/wgmma/query_key_gradient_plan.h"

namespace segattn::cuda {

struct BackwardCall {
  const LaunchContext& context;
  PositionSizes sizes;
  double scale;
  FeatureMap grad_output;                // (B, C, *S)
  FeatureMap query;                      // (B, E, *S)
  FeatureMap key;                        // (B, E, *T)
  FeatureMap value;                      // (B, C, *T)
  Tensor logsumexp;                      // (B, *S), contiguous, dtype of accumulation
  std::optional<Tensor> logsumexp_low;   // like logsumexp, its rounding error; float32 and float64: given
  std::optional<Tensor> grad_logsumexp;  // (B, *S), contiguous, dtype of accumulation
  const int* key_counts;                 // as in ForwardCall
  bool keys_complete;                    // logsumexp and output are over the keys of this call
  bool is_part;                          // the gradients are in the dtype of accumulation
  // Each (0) if not needed. Those of key and value are (B, channels, *T).
  Tensor grad_query, grad_key, grad_value;
  std::optional<Tensor> delta;  // (B, N), dtype of accumulation; for the gradients of query and key

  bool needs_query() const { return is_needed(grad_query); }
  bool needs_key() const { return is_needed(grad_key); }
  bool needs_value() const { return is_needed(grad_value); }
  float* logsumexp_low_data() const { return static_cast<float*>(const_cast<void*>(data_of(logsumexp_low))); }

 private:
  static bool is_needed(const Tensor& gradient) { return gradient.dim() > 1; }
};

// The operands of the backward pass as ready_operand returns them.
struct ReadyOperands {
  FeatureMap grad_output;
  FeatureMap query;
  FeatureMap key;
  FeatureMap value;
};

inline SimtParams simt_gradient_params(const BackwardCall& call, Owned owned, const Tensor& gradient) {
  SimtParams params = simt_params(call.sizes, call.scale, owned);
  params.output = gradient.mutable_data_ptr();
  params.out_channels = static_cast<int>(gradient.size(1));
  params.logsumexp = call.logsumexp.mutable_data_ptr();
  params.logsumexp_low = const_cast<void*>(data_of(call.logsumexp_low));
  params.delta = data_of(call.delta);
  params.key_counts = call.key_counts;
  params.is_part = call.is_part;
  return params;
}

inline void value_gradient_simt(const BackwardCall& call) {
  SimtParams params = simt_gradient_params(call, Owned::kKeys, call.grad_value);
  params.owned = call.key.operand;
  params.streamed = call.query.operand;
  params.values = call.grad_output.operand;
  with_element(call.context.dtype, [&]<class T>() {
    launch_simt_sum<T, PositionSum::kValueGradient, Keys::kAll>(params, call.context.stream);
  });
}

// (B, E, N) in float32: every query's mean key, computed as attention with the keys as values.
inline Tensor mean_key_simt(const BackwardCall& call) {
  const int64_t batch = call.sizes.batch, queries = call.sizes.queries;
  const Tensor& like = call.query.tensor;
  PositionSizes sizes = call.sizes;
  sizes.value_channels = sizes.key_channels;
  const Tensor mean_key = allocate(like, {batch, sizes.key_channels, queries}, ScalarType::Float);
  const Tensor no_output_low = allocate(like, {batch, 0, queries}, ScalarType::Float);
  const Tensor no_logsumexp_low = allocate(like, {batch, 0}, ScalarType::Float);
  forward_simt(
      {call.context, sizes, call.scale, call.query, call.key, call.key, mean_key, no_output_low,
       allocate_like(call.logsumexp), no_logsumexp_low, call.key_counts, false});
  return mean_key;
}

inline void query_gradient_simt(const BackwardCall& call) {
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

inline void key_gradient_simt(const BackwardCall& call) {
  SimtParams params = simt_gradient_params(call, Owned::kKeys, call.grad_key);
  params.owned = call.key.operand;
  params.streamed = params.values = call.query.operand;
  params.left = call.value.operand;
  params.right = call.grad_output.operand;
  with_element(call.context.dtype, [&]<class T>() {
    launch_simt_sum<T, PositionSum::kKeyGradient, Keys::kAll>(params, call.context.stream);
  });
}

// float32: grad_query -= (grad_sum - grad_logsumexp) * mean_key removes delta's rounding error (docs/decisions.md).
struct QueryCorrection {
  Tensor mean_key;                       // (groups, B, E, padded_queries): partials of sum_j P_ij key_j
  Tensor grad_sum;                       // (groups, B, padded_queries): partials of sum_j dS_ij
  std::optional<Tensor> grad_logsumexp;  // (B, *S)
};

// gradient (B, rows, *S) = factor * the sum of partials (count, B, rows, padded), with the correction if given.
inline void sum_partials(
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
  with_element(gradient.scalar_type(), [&]<class T>() {
    if constexpr (sizeof(T) < 8) {
      SEGATTN_LAUNCH(
          (sum_partials_kernel<T>), dim3(grid_blocks(params.rows_total * params.row_blocks)), dim3(kRowThreads), 0,
          context.stream, params);
    }
  });
}

// Returns false if no tile fits.
template <class Kernels>
bool value_gradient_on(const BackwardCall& call, const ReadyOperands& operands) {
  const PositionSizes& sizes = call.sizes;
  const LaunchContext& context = call.context;
  const WeightedSumPlan plan = weighted_sum_plan<Kernels>(sizes, context.limits, Owned::kKeys);
  if (!plan.found) {
    return false;
  }
  WeightedSumParams params = weighted_sum_params(plan, sizes, call.scale, Owned::kKeys);
  params.logsumexp = float_data(call.logsumexp);
  params.logsumexp_low = call.logsumexp_low_data();
  weighted_sum<Kernels, PositionSum::kValueGradient, Keys::kAll>(
      context, plan, {operands.key, operands.query, operands.grad_output}, params,
      {call.grad_value, call.is_part, nullptr, nullptr, nullptr});
  return true;
}

template <class Mma>
bool value_gradient_mma(const BackwardCall& call, const ReadyOperands& operands) {
  return with_weighted_sum_kernels<Mma>(call.context, call.sizes.key_channels, [&]<class Kernels>() {
    return value_gradient_on<Kernels>(call, operands);
  });
}

// Whether query_key_gradient_mma computes dP from operands rounded to TF32.
inline bool rounds_weight_gradients_to_tf32(const LaunchContext& context, const PositionSizes& sizes) {
  return context.arithmetic == Arithmetic::kTf32 &&
      with_query_key_gradient_tile<MmaTf32<1>>(
             static_cast<int>(sizes.key_channels), static_cast<int>(sizes.value_channels), context.limits.shared_bytes,
             []<class Traits>() {});
}

// The kernel that `launch` launches, a function template of Keys, computes both gradients together; the one that is not
// needed remains in its partials.
template <class Launch>
void query_key_gradient(
    const BackwardCall& call, const ReadyOperands& operands, const QueryKeyGradientPlan& plan, const Launch& launch) {
  const PositionSizes& sizes = call.sizes;
  const LaunchContext& context = call.context;
  QueryKeyGradientParams params{};
  params.batch = sizes.batch;
  params.queries = static_cast<int>(sizes.queries);
  params.keys = static_cast<int>(sizes.keys);
  params.key_channels = static_cast<int>(sizes.key_channels);
  params.value_channels = static_cast<int>(sizes.value_channels);
  const std::vector<int64_t> query_sizes{plan.groups, sizes.batch, sizes.key_channels, plan.padded_queries};
  const Tensor query_partials = allocate(call.logsumexp, query_sizes, ScalarType::Float);
  const Tensor key_partials =
      allocate(call.logsumexp, {plan.ranges, sizes.batch, sizes.key_channels, plan.padded_keys}, ScalarType::Float);
  params.query = operands.query.operand;
  params.key = operands.key.operand;
  params.value = operands.value.operand;
  params.grad_output = operands.grad_output.operand;
  params.logsumexp = float_data(call.logsumexp);
  params.logsumexp_low = call.logsumexp_low_data();
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
  if (context.dtype == ScalarType::Float) {
    correction = QueryCorrection{
        allocate(call.logsumexp, query_sizes, ScalarType::Float),
        allocate(call.logsumexp, {plan.groups, sizes.batch, plan.padded_queries}, ScalarType::Float),
        call.grad_logsumexp};
    params.mean_key_partials = float_data(correction->mean_key);
    params.grad_sum_partials = float_data(correction->grad_sum);
  }
  params.key_counts = call.key_counts;
  with_keys(call.key_counts, [&]<Keys kKeys>() { launch.template operator()<kKeys>(params); });
  if (call.needs_query()) {
    sum_partials(
        context, query_partials, plan.groups, plan.padded_queries, params.scale, call.grad_query,
        call.keys_complete ? correction : std::nullopt);
  }
  if (call.needs_key()) {
    sum_partials(context, key_partials, plan.ranges, plan.padded_keys, params.scale, call.grad_key);
  }
}

// Returns false if no tile fits.
template <class Mma>
bool query_key_gradient_mma(const BackwardCall& call, const ReadyOperands& operands) {
  using Element = typename Mma::Element;
  const PositionSizes& sizes = call.sizes;
  const DeviceLimits& limits = call.context.limits;
  const cudaStream_t stream = call.context.stream;
  const int queries = static_cast<int>(sizes.queries), keys = static_cast<int>(sizes.keys);
  const int key_channels = static_cast<int>(sizes.key_channels), channels = static_cast<int>(sizes.value_channels);
  if constexpr (kHasSm90aFiles && sizeof(Element) == 2) {
    if (choose_position_engine(call.context, key_channels) == PositionEngine::kWgmma) {
      const QueryKeyGradientPlan plan =
          plan_wgmma_query_key_gradient<Element>(sizes.batch, queries, keys, key_channels, channels, limits);
      if (plan.found) {
        query_key_gradient(call, operands, plan, [&]<Keys kKeys>(const QueryKeyGradientParams& params) {
          const WgmmaQueryKeyGradientParams with_maps = wgmma_query_key_gradient_params<Element>(
              params, operands.query, operands.key, operands.value, operands.grad_output, limits);
          launch_wgmma_query_key_gradient<Element, kKeys>(with_maps, limits, stream);
        });
        return true;
      }
    }
  }
  const QueryKeyGradientPlan plan =
      plan_query_key_gradient<Mma>(sizes.batch, queries, keys, key_channels, channels, limits);
  if (plan.found) {
    query_key_gradient(call, operands, plan, [&]<Keys kKeys>(const QueryKeyGradientParams& params) {
      launch_query_key_gradient<Mma, kKeys>(params, limits, stream);
    });
  }
  return plan.found;
}

}  // namespace segattn::cuda
