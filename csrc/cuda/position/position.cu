// Position attention on CUDA, host side: checks, allocates, launches.
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "checks/position.h"
#include "cuda/position/operands.h"
#include "cuda/position/simt_launch.h"
#include "registration.h"

namespace segattn::cuda {
namespace {

using Forward = std::tuple<Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor>;

std::vector<int64_t> logsumexp_sizes(const Tensor& query) {
  std::vector<int64_t> sizes{query.size(0)};
  for (int64_t d = 2; d < query.dim(); ++d) {
    sizes.push_back(query.size(d));
  }
  return sizes;
}

std::vector<int64_t> output_sizes(const Tensor& query, int64_t channels) {
  std::vector<int64_t> sizes = logsumexp_sizes(query);
  sizes.insert(sizes.begin() + 1, channels);
  return sizes;
}

// The memory of output_low, null where it is not wanted.
void* low_data(const Tensor& output_low) {
  return output_low.size(1) > 0 ? output_low.mutable_data_ptr() : nullptr;
}

SimtParams simt_params(const PositionSizes& sizes, double scale, bool owns_queries) {
  SimtParams params{};
  params.batch = sizes.batch;
  params.owned_positions = static_cast<int>(owns_queries ? sizes.queries : sizes.keys);
  params.streamed_positions = static_cast<int>(owns_queries ? sizes.keys : sizes.queries);
  params.embedding = static_cast<int>(sizes.key_channels);
  params.channels = static_cast<int>(sizes.value_channels);
  params.scale = scale;
  return params;
}

void forward_simt(
    const PositionSizes& sizes, const Tensor& query, const Tensor& key, const Tensor& value, double scale,
    const Tensor& output, void* output_low, const Tensor& logsumexp, cudaStream_t stream) {
  const FeatureMap q = feature_map(query), k = feature_map(key), v = feature_map(value);
  SimtParams params = simt_params(sizes, scale, true);
  params.owned = q.operand;
  params.streamed = k.operand;
  params.values = v.operand;
  params.output = output.mutable_data_ptr();
  params.output_low = output_low;
  params.logsumexp = logsumexp.mutable_data_ptr();
  params.channels = params.out_channels = static_cast<int>(value.size(1));
  with_element(query.scalar_type(), [&]<class T>() { launch_simt_sum<T, PositionSum::kForward>(params, stream); });
}

void merge_splits(
    const WeightedSumParams& split, const Tensor& output, void* output_low, const Tensor& logsumexp,
    cudaStream_t stream) {
  MergeSplitsParams params;
  params.partials = static_cast<const float*>(split.output);
  params.partial_logsumexp = split.logsumexp;
  params.output = output.mutable_data_ptr();
  params.output_low = output_low;
  params.logsumexp = static_cast<float*>(logsumexp.mutable_data_ptr());
  params.batch = split.batch;
  params.splits = split.splits;
  params.channels = split.channels;
  params.positions = split.owned_positions;
  params.position_blocks = divide_up(params.positions, kRowThreads);
  params.channel_blocks = divide_up(params.channels, kMergeChannels);
  const int64_t blocks = params.batch * params.position_blocks * params.channel_blocks;
  with_element(output.scalar_type(), [&]<class T>() {
    if constexpr (sizeof(T) < 8) {
      SEGATTN_LAUNCH((merge_splits_kernel<T>), dim3(grid_blocks(blocks)), dim3(kRowThreads), 0, stream, params);
    }
  });
}

// What grad_query is centred with.
struct Centre {
  Tensor mean_key;  // (parts, B, E, padded)
  Tensor grad_sum;  // (parts, B, padded)
};

// factor * the sum of `parts` partial results (parts, B, rows, padded), centred where there is something to do it with
void sum_partials(
    const Tensor& partials, int parts, int padded, float factor, const Tensor& output, cudaStream_t stream,
    const std::optional<Centre>& centre = std::nullopt) {
  SumPartialsParams params{};
  params.partials = static_cast<const float*>(partials.const_data_ptr());
  if (centre.has_value()) {
    params.mean_key = static_cast<const float*>(centre->mean_key.const_data_ptr());
    params.grad_sum = static_cast<const float*>(centre->grad_sum.const_data_ptr());
  }
  params.output = output.mutable_data_ptr();
  params.rows = static_cast<int>(output.size(1));
  params.rows_total = output.size(0) * output.size(1);
  params.part_stride = params.rows_total * padded;
  params.parts = parts;
  params.columns = static_cast<int>(positions_of(output));
  params.padded = padded;
  params.row_blocks = divide_up(params.columns, kRowThreads);
  params.factor = factor;
  with_element(output.scalar_type(), [&]<class T>() {
    if constexpr (sizeof(T) < 8) {
      SEGATTN_LAUNCH(
          (sum_partials_kernel<T>), dim3(grid_blocks(params.rows_total * params.row_blocks)), dim3(kRowThreads), 0,
          stream, params);
    }
  });
}

WeightedSumParams weighted_sum_params(
    const WeightedSumPlan& plan, const PositionSizes& sizes, double scale, bool owns_queries) {
  WeightedSumParams params{};
  params.batch = sizes.batch;
  params.owned_positions = static_cast<int>(owns_queries ? sizes.queries : sizes.keys);
  params.streamed_positions = static_cast<int>(owns_queries ? sizes.keys : sizes.queries);
  params.embedding = static_cast<int>(sizes.key_channels);
  params.channels = static_cast<int>(sizes.value_channels);
  params.scale = static_cast<float>(scale);
  params.owned_blocks = plan.owned_blocks;
  params.channel_blocks = plan.channel_blocks;
  params.splits = plan.splits;
  params.steps_per_split = plan.steps_per_split;
  return params;
}

// False where no tile fits.
template <class Mma>
bool forward_mma(
    const PositionSizes& sizes, const Tensor& query, const Tensor& key, const Tensor& value, double scale,
    const Tensor& output, void* output_low, const Tensor& logsumexp, const DeviceLimits& limits, cudaStream_t stream) {
  const WeightedSumPlan plan = plan_weighted_sum<Mma>(
      sizes.batch, static_cast<int>(sizes.queries), static_cast<int>(sizes.keys), static_cast<int>(sizes.key_channels),
      static_cast<int>(sizes.value_channels), limits);
  if (!plan.found) {
    return false;
  }
  const FeatureMap q = aligned_feature_map(query, stream), k = aligned_feature_map(key, stream),
                   v = aligned_feature_map(value, stream);
  WeightedSumParams params = weighted_sum_params(plan, sizes, scale, true);
  params.owned = q.operand;
  params.streamed = k.operand;
  params.values = v.operand;
  if (plan.splits == 1) {
    params.output = output.mutable_data_ptr();
    params.output_low = output_low;
    params.logsumexp = static_cast<float*>(logsumexp.mutable_data_ptr());
    launch_weighted_sum<Mma, true>(params, limits, stream);
    return true;
  }
  const Tensor partials =
      allocate(query, {plan.splits, sizes.batch, sizes.value_channels, sizes.queries}, ScalarType::Float);
  const Tensor partial_logsumexp = allocate(query, {plan.splits, sizes.batch, sizes.queries}, ScalarType::Float);
  params.output = partials.mutable_data_ptr();
  params.logsumexp = static_cast<float*>(partial_logsumexp.mutable_data_ptr());
  launch_weighted_sum<Mma, true>(params, limits, stream);
  merge_splits(params, output, output_low, logsumexp, stream);
  return true;
}

Forward position_attention(const Tensor& query, const Tensor& key, const Tensor& value, double scale, bool with_low) {
  const PositionSizes sizes = check_position_attention(query, key, value, scale);
  position_count("position_attention", "query", sizes.queries);
  position_count("position_attention", "key", sizes.keys);
  const DeviceGuard guard(query);
  const ScalarType dtype = query.scalar_type();
  const Tensor output = allocate(query, output_sizes(query, value.size(1)), dtype);
  const Tensor output_low = allocate(query, output_sizes(query, low_channels(value, with_low)), dtype);
  const Tensor logsumexp = allocate(query, logsumexp_sizes(query), accumulation_dtype(dtype));
  if (sizes.batch == 0 || sizes.queries == 0) {
    return {output, logsumexp, output_low};
  }
  const DeviceLimits limits = device_limits();
  const cudaStream_t stream = current_stream(query);
  bool done = false;
  with_mma(choose_arithmetic(dtype, limits), [&]<class Mma>() {
    done = forward_mma<Mma>(sizes, query, key, value, scale, output, low_data(output_low), logsumexp, limits, stream);
  });
  if (!done) {
    forward_simt(sizes, query, key, value, scale, output, low_data(output_low), logsumexp, stream);
  }
  return {output, logsumexp, output_low};
}

Tensor make_delta(
    const PositionSizes& sizes, const FeatureMap& grad_output, const FeatureMap& output,
    const std::optional<FeatureMap>& output_low, cudaStream_t stream) {
  const ScalarType dtype = output.tensor.scalar_type();
  const Tensor delta = allocate(output.tensor, {sizes.batch, sizes.queries}, accumulation_dtype(dtype));
  DeltaParams params{};
  params.grad_output = grad_output.operand;
  params.output = output.operand;
  if (output_low.has_value()) {
    params.output_low = output_low->operand;
  }
  params.delta = delta.mutable_data_ptr();
  params.channels = static_cast<int>(sizes.value_channels);
  params.positions = static_cast<int>(sizes.queries);
  params.position_blocks = divide_up(sizes.queries, 32);
  with_element(dtype, [&]<class T>() {
    SEGATTN_LAUNCH(
        (delta_kernel<T>), dim3(grid_blocks(sizes.batch * params.position_blocks)), dim3(kRowThreads), 0, stream,
        params);
  });
  return delta;
}

// The gradients that are still to be made.
struct SimtGradients {
  const Tensor* query;
  const Tensor* key;
  const Tensor* value;
};

void backward_simt(
    const PositionSizes& sizes, const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& logsumexp, const Tensor& delta, double scale, const SimtGradients& gradients, cudaStream_t stream) {
  if (!gradients.query && !gradients.key && !gradients.value) {
    return;
  }
  const FeatureMap q = feature_map(query), k = feature_map(key), v = feature_map(value), g = feature_map(grad_output);
  const bool centres = gradients.query != nullptr && query.scalar_type() == ScalarType::Float;
  const Tensor mean_key =
      allocate(query, {sizes.batch, centres ? sizes.key_channels : 0, sizes.queries}, ScalarType::Float);
  if (centres) {  // attention with the keys as values; its logsumexp is known
    forward_simt(sizes, query, key, key, scale, mean_key, nullptr, allocate_like(logsumexp), stream);
  }
  const auto run = [&]<PositionSum kSum>(
                       const FeatureMap& owned, const FeatureMap& streamed, const FeatureMap& values,
                       const FeatureMap& left, const FeatureMap& right, const Tensor* result) {
    if (!result) {
      return;
    }
    SimtParams params = simt_params(sizes, scale, kSum == PositionSum::kQueryGradient);
    params.owned = owned.operand;
    params.streamed = streamed.operand;
    params.values = values.operand;
    params.left = left.operand;
    params.right = right.operand;
    params.output = result->mutable_data_ptr();
    params.mean_key = mean_key.const_data_ptr();
    params.out_channels = static_cast<int>(result->size(1));
    params.logsumexp = const_cast<void*>(logsumexp.const_data_ptr());
    params.delta = delta.const_data_ptr();
    with_element(query.scalar_type(), [&]<class T>() { launch_simt_sum<T, kSum>(params, stream); });
  };
  run.template operator()<PositionSum::kValueGradient>(k, q, g, v, g, gradients.value);
  run.template operator()<PositionSum::kQueryGradient>(q, k, k, g, v, gradients.query);
  run.template operator()<PositionSum::kKeyGradient>(k, q, q, v, g, gradients.key);
}

// False where no tile fits.
template <class Mma>
bool value_gradient_mma(
    const PositionSizes& sizes, const FeatureMap& query, const FeatureMap& key, const FeatureMap& grad_output,
    const Tensor& logsumexp, double scale, const Tensor& grad_value, const DeviceLimits& limits, cudaStream_t stream) {
  const WeightedSumPlan plan = plan_weighted_sum<Mma>(
      sizes.batch, static_cast<int>(sizes.keys), static_cast<int>(sizes.queries), static_cast<int>(sizes.key_channels),
      static_cast<int>(sizes.value_channels), limits);
  if (!plan.found) {
    return false;
  }
  WeightedSumParams params = weighted_sum_params(plan, sizes, scale, false);
  params.owned = key.operand;
  params.streamed = query.operand;
  params.values = grad_output.operand;
  params.logsumexp = static_cast<float*>(const_cast<void*>(logsumexp.const_data_ptr()));
  if (plan.splits == 1) {
    params.output = grad_value.mutable_data_ptr();
    launch_weighted_sum<Mma, false>(params, limits, stream);
    return true;
  }
  const Tensor partials =
      allocate(grad_value, {plan.splits, sizes.batch, sizes.value_channels, sizes.keys}, ScalarType::Float);
  params.output = partials.mutable_data_ptr();
  launch_weighted_sum<Mma, false>(params, limits, stream);
  sum_partials(partials, plan.splits, params.owned_positions, 1.0f, grad_value, stream);
  return true;
}

// False where no tile fits.
template <class Mma>
bool query_key_gradient_mma(
    const PositionSizes& sizes, const FeatureMap& grad_output, const FeatureMap& query, const FeatureMap& key,
    const FeatureMap& value, const Tensor& logsumexp, const Tensor& delta, double scale, const Tensor& grad_query,
    const Tensor& grad_key, const DeviceLimits& limits, cudaStream_t stream) {
  QueryKeyGradientParams params{};
  params.batch = sizes.batch;
  params.queries = static_cast<int>(sizes.queries);
  params.keys = static_cast<int>(sizes.keys);
  params.embedding = static_cast<int>(sizes.key_channels);
  params.channels = static_cast<int>(sizes.value_channels);
  const QueryKeyGradientPlan plan = plan_query_key_gradient<Mma>(
      params.batch, params.queries, params.keys, params.embedding, params.channels, limits);
  if (!plan.found) {
    return false;
  }
  const Tensor query_shares =
      allocate(grad_query, {plan.groups, sizes.batch, sizes.key_channels, plan.padded_queries}, ScalarType::Float);
  const Tensor key_shares =
      allocate(grad_key, {plan.ranges, sizes.batch, sizes.key_channels, plan.padded_keys}, ScalarType::Float);
  params.query = query.operand;
  params.key = key.operand;
  params.value = value.operand;
  params.grad_output = grad_output.operand;
  params.logsumexp = static_cast<const float*>(logsumexp.const_data_ptr());
  params.delta = static_cast<const float*>(delta.const_data_ptr());
  params.grad_query = static_cast<float*>(query_shares.mutable_data_ptr());
  params.grad_key = static_cast<float*>(key_shares.mutable_data_ptr());
  params.padded_queries = plan.padded_queries;
  params.padded_keys = plan.padded_keys;
  params.scale = static_cast<float>(scale);
  params.query_blocks = plan.query_blocks;
  params.ranges = plan.ranges;
  params.blocks_per_range = plan.blocks_per_range;
  params.key_blocks = plan.key_blocks;
  params.groups = plan.groups;
  params.blocks_per_group = plan.blocks_per_group;
  std::optional<Centre> centre;
  if (sizeof(typename Mma::Element) == 4) {
    centre = Centre{
        allocate(grad_query, {plan.groups, sizes.batch, sizes.key_channels, plan.padded_queries}, ScalarType::Float),
        allocate(grad_query, {plan.groups, sizes.batch, plan.padded_queries}, ScalarType::Float)};
    params.mean_key = static_cast<float*>(centre->mean_key.mutable_data_ptr());
    params.grad_sum = static_cast<float*>(centre->grad_sum.mutable_data_ptr());
  }
  launch_query_key_gradient<Mma>(params, limits, stream);
  sum_partials(query_shares, plan.groups, plan.padded_queries, params.scale, grad_query, stream, centre);
  sum_partials(key_shares, plan.ranges, plan.padded_keys, params.scale, grad_key, stream);
  return true;
}

Backward position_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& logsumexp, double scale, const std::optional<Tensor>& output_low) {
  const PositionSizes sizes =
      check_position_attention_backward(grad_output, query, key, value, output, logsumexp, scale, output_low);
  position_count("position_attention_backward", "query", sizes.queries);
  position_count("position_attention_backward", "key", sizes.keys);
  const DeviceGuard guard(query);
  Tensor grad_query = allocate_like(query), grad_key = allocate_like(key), grad_value = allocate_like(value);
  if (sizes.batch == 0 || sizes.queries == 0) {
    torch::stable::zero_(grad_key);  // nobody asked the keys anything
    torch::stable::zero_(grad_value);
    return {grad_query, grad_key, grad_value};
  }
  const DeviceLimits limits = device_limits();
  const cudaStream_t stream = current_stream(query);
  const Tensor statistics = torch::stable::contiguous(logsumexp);
  const std::optional<FeatureMap> low = output_low.has_value() ? std::optional(feature_map(*output_low)) : std::nullopt;
  const Tensor delta = make_delta(sizes, feature_map(grad_output), feature_map(output), low, stream);
  bool value_done = false, query_key_done = false;
  with_mma(choose_arithmetic(query.scalar_type(), limits), [&]<class Mma>() {
    const FeatureMap q = aligned_feature_map(query, stream), k = aligned_feature_map(key, stream),
                     v = aligned_feature_map(value, stream), g = aligned_feature_map(grad_output, stream);
    value_done = value_gradient_mma<Mma>(sizes, q, k, g, statistics, scale, grad_value, limits, stream);
    query_key_done =
        query_key_gradient_mma<Mma>(sizes, g, q, k, v, statistics, delta, scale, grad_query, grad_key, limits, stream);
  });
  const SimtGradients rest{
      query_key_done ? nullptr : &grad_query, query_key_done ? nullptr : &grad_key, value_done ? nullptr : &grad_value};
  backward_simt(sizes, grad_output, query, key, value, statistics, delta, scale, rest, stream);
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace segattn::cuda

SEGATTN_REGISTER_CUDA(m) {
  m.impl("position_attention", TORCH_BOX(&segattn::cuda::position_attention));
  m.impl("position_attention_backward", TORCH_BOX(&segattn::cuda::position_attention_backward));
}
