// Channel attention on CUDA, host side: checks the arguments, allocates and launches.
//
// torch.bmm (cuBLAS) computes the products of 32-bit and 64-bit matrices and applies the weights to value. The kernels
// here compute the 16-bit products in float32, only half of a symmetric one (gram.cuh), the softmax and its gradient
// (softmax.cuh), and the input gradient of self-attention, two products in one accumulator (input_gradient.cuh).
// channel_energy and channel_apply are the two halves, and channel_attention their composition but for the sum of the
// splits, which its softmax adds.
#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "checks/channel.h"
#include "cuda/channel/launch.h"
#include "cuda/channel/softmax.cuh"
#include "cuda/common/aligned.h"
#include "cuda/common/launch_context.h"
#include "cuda/common/math.h"
#include "cuda/common/operands.h"
#include "registration.h"

namespace segattn::cuda {
namespace {

using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;

// out = left @ right, (B, M, K) @ (B, K, N). autocast does not intercept the out= variant.
void bmm(const Tensor& left, const Tensor& right, const Tensor& out) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(left), torch::stable::detail::from(right), torch::stable::detail::from(out)};
  SEGATTN_CHECK_TORCH(torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor transposed(const Tensor& matrix) {
  return torch::stable::transpose(matrix, 1, 2);
}

// (B, channels, *spatial) as (B, channels, positions); copied if not contiguous.
Tensor matrices(const Tensor& tensor) {
  return torch::stable::view(as_contiguous(tensor), {tensor.size(0), tensor.size(1), positions_of(tensor)});
}

constexpr const char* kCountRule = "must be fewer than 2^31";

// Whether the two operands of a product are one tensor, which makes the product symmetric.
enum class Symmetry { kGeneral, kSymmetric };

bool uses_tensor_cores(const LaunchContext& context) {
  return context.arithmetic == Arithmetic::kFloat16 || context.arithmetic == Arithmetic::kBfloat16;
}

// Whether the weights include the residual of residual_channel_attention (with_gamma in softmax.cuh).
bool residual_in_weights(const LaunchContext& context) {
  bool result = false;
  with_element(context.dtype, [&]<class T>() { result = kResidualInWeights<T>; });
  return result;
}

// Calls visit.operator()<T>() with T the 16-bit type `dtype`.
template <class Visit>
void with_half_type(ScalarType dtype, const Visit& visit) {
  if (dtype == ScalarType::Half) {
    visit.template operator()<__half>();
  } else {
    visit.template operator()<__nv_bfloat16>();
  }
}

// Where products go: `target` (B, C, K) for one split, if it is given.
Tensor allocate_products(
    const Tensor& like, int64_t splits, int64_t channels, int64_t keys, ScalarType dtype,
    const std::optional<Tensor>& target) {
  const std::vector<int64_t> sizes{splits, like.size(0), channels, keys};
  return target.has_value() && splits == 1 ? torch::stable::view(*target, sizes) : allocate(like, sizes, dtype);
}

// left (B, C, *S) times right (B, K, *S) transposed, on tensor cores: (splits, B, C, K), float32.
Tensor products_mma(
    const LaunchContext& context, const FeatureMap& left, const FeatureMap& right, Symmetry symmetry,
    const std::optional<Tensor>& target = std::nullopt) {
  const int64_t channels = left.tensor.size(1), keys = right.tensor.size(1);
  GramParams params{};
  params.left = left.operand;
  params.right = right.operand;
  params.batch = left.tensor.size(0);
  params.left_channels = context.count("channels", kCountRule, channels);
  params.right_channels = context.count("channels", kCountRule, keys);
  params.positions = context.count("positions", kCountRule, left.positions);
  params.left_tiles = ceil_div(params.left_channels, kGramTile);
  params.right_tiles = ceil_div(params.right_channels, kGramTile);
  params.symmetric = symmetry == Symmetry::kSymmetric;
  params.tile_pairs =
      params.symmetric ? params.left_tiles * (params.left_tiles + 1) / 2 : params.left_tiles * params.right_tiles;
  const int steps = ceil_div(params.positions, kGramDepth);
  const int64_t blocks = std::max<int64_t>(params.batch * params.tile_pairs, 1);
  const int wanted = static_cast<int>(std::clamp<int64_t>(context.limits.multiprocessors / blocks, 1, kMaxGramSplits));
  params.positions_per_split = ceil_div(steps, std::min(wanted, steps)) * kGramDepth;
  params.splits = ceil_div(params.positions, params.positions_per_split);
  const Tensor products = allocate_products(left.tensor, params.splits, channels, keys, ScalarType::Float, target);
  params.products = static_cast<float*>(products.mutable_data_ptr());
  with_half_type(context.dtype, [&]<class T>() { launch_gram<T>(params, context.stream); });
  return products;
}

// left (B, C, *S) times right (B, K, *S) transposed, by cuBLAS: (1, B, C, K) in the dtype of accumulation.
Tensor products_cublas(
    const LaunchContext& context, const Tensor& left, const Tensor& right, Symmetry symmetry,
    const std::optional<Tensor>& target = std::nullopt) {
  const ScalarType accumulator = accumulation_dtype(context.dtype);
  const int64_t batch = left.size(0), channels = left.size(1), keys = right.size(1);
  const auto operand = [&](const Tensor& tensor) {
    const Tensor matrix = matrices(tensor);
    // 16-bit types come here on devices before sm_80.
    return accumulator == context.dtype ? matrix : torch::stable::to(matrix, accumulator);
  };
  const Tensor a = operand(left), b = symmetry == Symmetry::kSymmetric ? a : operand(right);
  const Tensor products = allocate_products(left, 1, channels, keys, accumulator, target);
  bmm(a, transposed(b), torch::stable::view(products, {batch, channels, keys}));
  return products;
}

// left (B, C, *S) times right (B, K, *S) transposed: (splits, B, C, K) in the dtype of accumulation. One split of zeros
// without positions.
Tensor products(
    const LaunchContext& context, const Tensor& left, const Tensor& right, Symmetry symmetry,
    const std::optional<Tensor>& target = std::nullopt) {
  if (positions_of(left) == 0) {
    Tensor zeros = allocate_products(left, 1, left.size(1), right.size(1), accumulation_dtype(context.dtype), target);
    torch::stable::zero_(zeros);
    return zeros;
  }
  if (!uses_tensor_cores(context)) {
    return products_cublas(context, left, right, symmetry, target);
  }
  const FeatureMap a = aligned_feature_map(left, context.stream);
  const FeatureMap b = symmetry == Symmetry::kSymmetric ? a : aligned_feature_map(right, context.stream);
  return products_mma(context, a, b, symmetry, target);
}

// left (B, C, *S) times right (B, K, *S) transposed: (B, C, K) in the dtype of accumulation, splits added in order. Not
// a view: it may be a result, which is reduced over ranks in place.
Tensor sum_of_products(const LaunchContext& context, const Tensor& left, const Tensor& right, Symmetry symmetry) {
  const Tensor sum = allocate(left, {left.size(0), left.size(1), right.size(1)}, accumulation_dtype(context.dtype));
  if (sum.size(0) == 0) {
    return sum;
  }
  const Tensor splits = products(context, left, right, symmetry, sum);
  if (splits.size(0) > 1) {
    const SumSplitsParams params{
        static_cast<const float*>(splits.const_data_ptr()), static_cast<float*>(sum.mutable_data_ptr()), sum.numel(),
        static_cast<int>(splits.size(0))};
    const int64_t blocks = ceil_div(params.elements, kChannelThreads);
    SEGATTN_LAUNCH(
        (sum_splits_kernel<float>), dim3(grid_blocks(blocks)), dim3(kChannelThreads), 0, context.stream, params);
  }
  return sum;
}

// matrix (B, C, K) as products of one split.
Tensor as_products(const Tensor& matrix) {
  return torch::stable::view(as_contiguous(matrix), {1, matrix.size(0), matrix.size(1), matrix.size(2)});
}

// products (splits, B, C, K) -> weights (B, C, K), times gamma (B, C) if given. Writes logsumexp (B, C).
Tensor softmax(
    const LaunchContext& context, const Tensor& products, double scale, const std::optional<Tensor>& gamma,
    const Tensor& logsumexp) {
  const int64_t batch = products.size(1), channels = products.size(2), keys = products.size(3);
  const Tensor weights = allocate(products, {batch, channels, keys}, context.dtype);
  ChannelSoftmaxParams params;
  params.products = products.mutable_data_ptr();
  params.weights = weights.mutable_data_ptr();
  params.logsumexp = logsumexp.mutable_data_ptr();
  params.gamma = gamma.has_value() ? gamma->const_data_ptr() : nullptr;
  params.split_stride = batch * channels * keys;
  params.splits = static_cast<int>(products.size(0));
  params.keys = static_cast<int>(keys);
  params.scale = scale;
  with_element(context.dtype, [&]<class T>() {
    SEGATTN_LAUNCH(
        (channel_softmax_kernel<T>), dim3(grid_blocks(batch * channels)), dim3(kChannelThreads), 0, context.stream,
        params);
  });
  return weights;
}

// The same where the logsumexp is not needed.
Tensor softmax(const LaunchContext& context, const Tensor& products, double scale, const std::optional<Tensor>& gamma) {
  const Tensor logsumexp = allocate(products, {products.size(1), products.size(2)}, accumulation_dtype(context.dtype));
  return softmax(context, products, scale, gamma, logsumexp);
}

struct SoftmaxGradients {
  Tensor weights;                       // (B, C, pitch), written; times gamma if given
  std::optional<Tensor> grad_products;  // (B, C, pitch), written; if not given, split 0 of grad_weights receives it
  std::optional<Tensor> gamma;          // (B, C), dtype of accumulation
  std::optional<Tensor> grad_gamma;     // (B, C), dtype of accumulation, written
};

// products and grad_weights: (splits, B, C, K), dtype of accumulation.
void softmax_backward(
    const LaunchContext& context, const Tensor& products, const Tensor& grad_weights, double scale,
    const SoftmaxGradients& results) {
  const int64_t batch = products.size(1), channels = products.size(2), keys = products.size(3);
  const auto data = [](const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? tensor->mutable_data_ptr() : nullptr;
  };
  ChannelSoftmaxBackwardParams params;
  params.products = products.mutable_data_ptr();
  params.grad_weights = grad_weights.mutable_data_ptr();
  params.weights = results.weights.mutable_data_ptr();
  params.grad_products = data(results.grad_products);
  params.gamma = data(results.gamma);
  params.grad_gamma = data(results.grad_gamma);
  params.split_stride = batch * channels * keys;
  params.product_splits = static_cast<int>(products.size(0));
  params.grad_splits = static_cast<int>(grad_weights.size(0));
  params.keys = static_cast<int>(keys);
  params.pitch = static_cast<int>(results.weights.size(2));
  params.scale = scale;
  with_element(context.dtype, [&]<class T>() {
    SEGATTN_LAUNCH(
        (channel_softmax_backward_kernel<T>), dim3(grid_blocks(batch * channels)), dim3(kChannelThreads), 0,
        context.stream, params);
  });
}

// matrix + matrix^T, matrix (1, B, C, C) in the dtype of accumulation: (B, C, pitch) in `dtype`, that of the inputs or
// of accumulation.
Tensor symmetrised(const LaunchContext& context, const Tensor& matrix, int64_t pitch, ScalarType dtype) {
  const int64_t batch = matrix.size(1), channels = matrix.size(2);
  const Tensor result = allocate(matrix, {batch, channels, pitch}, dtype);
  SymmetriseParams params;
  params.matrix = matrix.const_data_ptr();
  params.result = result.mutable_data_ptr();
  params.channels = static_cast<int>(channels);
  params.pitch = static_cast<int>(pitch);
  params.tiles = ceil_div(params.channels, kSymmetriseTile);
  const int64_t blocks = batch * params.tiles * params.tiles;
  with_element(dtype, [&]<class T>() {
    SEGATTN_LAUNCH(
        (symmetrise_kernel<T>), dim3(grid_blocks(blocks)), dim3(kSymmetriseTile * kSymmetriseRows), 0, context.stream,
        params);
  });
  return result;
}

// target += first + second, all contiguous.
void add(
    const LaunchContext& context, const Tensor& target, const Tensor& first,
    const std::optional<Tensor>& second = std::nullopt) {
  const AddParams params{
      target.mutable_data_ptr(), first.const_data_ptr(), second.has_value() ? second->const_data_ptr() : nullptr,
      target.numel()};
  const int64_t blocks = ceil_div(params.elements, kChannelThreads);
  with_element(context.dtype, [&]<class T>() {
    SEGATTN_LAUNCH((add_kernel<T>), dim3(grid_blocks(blocks)), dim3(kChannelThreads), 0, context.stream, params);
  });
}

// result (B, M, *S) = left (B, M, K) times right (B, K, *S)
void multiply_into(const Tensor& result, const Tensor& left, const Tensor& right) {
  bmm(left, matrices(right), torch::stable::view(result, {result.size(0), result.size(1), positions_of(result)}));
}

// The second half of channel attention: energies() are the products (splits, B, C, K). With gamma, the residual is
// added.
template <class Energies>
Pair apply(
    const LaunchContext& context, const Energies& energies, const Tensor& value, const ChannelSizes& sizes,
    double scale, const std::optional<Tensor>& gamma = std::nullopt) {
  const Tensor logsumexp = allocate(value, {sizes.batch, sizes.query_channels}, accumulation_dtype(context.dtype));
  if (sizes.batch == 0) {
    return {allocate_feature_map(value, sizes.query_channels), logsumexp};
  }
  const Tensor weights = softmax(context, energies(), scale, gamma, logsumexp);
  // Allocated last, so that it can reuse the memory of the products.
  const Tensor output = allocate_feature_map(value, sizes.query_channels);
  if (sizes.value_positions > 0) {
    multiply_into(output, weights, value);
    if (gamma.has_value() && !residual_in_weights(context)) {
      add(context, output, as_contiguous(value));
    }
  }
  return {output, logsumexp};
}

Pair channel_attention(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  const ChannelSizes sizes = check_channel_attention(query, key, value, scale);
  const LaunchContext context("channel_attention", query);
  return apply(context, [&] { return products(context, query, key, Symmetry::kGeneral); }, value, sizes, scale);
}

Pair channel_self_attention(const Tensor& input, double scale, const std::optional<Tensor>& gamma) {
  const ChannelSizes sizes = check_channel_self_attention(input, scale, gamma);
  const LaunchContext context("channel_self_attention", input);
  const auto energies = [&] { return products(context, input, input, Symmetry::kSymmetric); };
  return apply(context, energies, input, sizes, scale, as_contiguous(gamma));
}

Tensor channel_energy(const Tensor& query, const std::optional<Tensor>& key) {
  check_channel_energy(query, key);
  const LaunchContext context("channel_energy", query);
  return key.has_value() ? sum_of_products(context, query, *key, Symmetry::kGeneral)
                         : sum_of_products(context, query, query, Symmetry::kSymmetric);
}

Pair channel_apply(const Tensor& energy, const Tensor& value, double scale, const std::optional<Tensor>& gamma) {
  const ChannelSizes sizes = check_channel_apply(energy, value, scale, gamma);
  const LaunchContext context("channel_apply", value);
  context.count("channels", kCountRule, std::max(sizes.query_channels, sizes.key_channels));
  return apply(context, [&] { return as_products(energy); }, value, sizes, scale, as_contiguous(gamma));
}

Triple channel_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, double scale,
    const std::vector<bool>& needs_input_grad) {
  const ChannelSizes sizes = check_channel_attention_backward(grad_output, query, key, value, scale, needs_input_grad);
  const LaunchContext context("channel_attention_backward", query);
  const bool needs_query = needs_input_grad[0], needs_key = needs_input_grad[1], needs_value = needs_input_grad[2];
  const Tensor grad_query = allocate_gradient(query, needs_query), grad_key = allocate_gradient(key, needs_key);
  const Tensor grad_value = allocate_gradient(value, needs_value);
  const int64_t batch = sizes.batch, channels = sizes.query_channels, keys = sizes.key_channels;
  if (batch == 0 || !(needs_query || needs_key || needs_value)) {
    return {grad_query, grad_key, grad_value};
  }
  const bool has_values = sizes.value_positions > 0;
  const Tensor query_key = products(context, query, key, Symmetry::kGeneral);
  if (!needs_query && !needs_key) {  // the weights without their gradient
    const Tensor weights = softmax(context, query_key, scale, std::nullopt);
    if (has_values) {
      multiply_into(grad_value, transposed(weights), grad_output);
    }
    return {grad_query, grad_key, grad_value};
  }
  const Tensor grad_weights = products(context, grad_output, value, Symmetry::kGeneral);
  const Tensor weights = allocate(query, {batch, channels, keys}, context.dtype);
  const Tensor grad_products = allocate(query, {batch, channels, keys}, context.dtype);
  softmax_backward(context, query_key, grad_weights, scale, {weights, grad_products, std::nullopt, std::nullopt});
  if (needs_query) {
    multiply_into(grad_query, grad_products, key);
  }
  if (needs_key) {
    multiply_into(grad_key, transposed(grad_products), query);
  }
  if (needs_value && has_values) {
    multiply_into(grad_value, transposed(weights), grad_output);
  }
  return {grad_query, grad_key, grad_value};
}

// result (B, M, *S) = matrix (B, M, K), in the dtype of accumulation, times map (B, K, *S). The operands have 16 bits
// for 16-bit maps, as in channel_attention_backward. The matrix may exceed float16, so its rows are divided by powers
// of two above the sums of their magnitudes. The product is then at most as large as the map, and multiplying it by the
// factors overflows only where the result does.
void multiply_map(const LaunchContext& context, const Tensor& matrix, const Tensor& map, const Tensor& result) {
  if (context.dtype != ScalarType::Half) {
    const bool rounds = context.dtype != matrix.scalar_type();
    multiply_into(result, rounds ? torch::stable::to(matrix, context.dtype) : matrix, map);
    return;
  }
  const int64_t batch = matrix.size(0), rows = matrix.size(1);
  const Tensor source = as_contiguous(matrix);
  const Tensor normalised = allocate(source, {batch, rows, source.size(2)}, context.dtype);
  const Tensor factors = allocate(source, {batch, rows}, ScalarType::Float);
  const NormaliseRowsParams params{
      static_cast<const float*>(source.const_data_ptr()), normalised.mutable_data_ptr(),
      static_cast<float*>(factors.mutable_data_ptr()), context.count("channels", kCountRule, source.size(2))};
  SEGATTN_LAUNCH(
      (normalise_rows_kernel<__half>), dim3(grid_blocks(batch * rows)), dim3(kChannelThreads), 0, context.stream,
      params);
  multiply_into(result, normalised, map);
  ScaleRowsParams scaling;
  scaling.target = result.mutable_data_ptr();
  scaling.factors = params.factors;
  scaling.positions = context.count("positions", kCountRule, positions_of(map));
  scaling.row_blocks = ceil_div(scaling.positions, kChannelThreads);
  SEGATTN_LAUNCH(
      (scale_rows_kernel<__half>), dim3(grid_blocks(batch * rows * scaling.row_blocks)), dim3(kChannelThreads), 0,
      context.stream, scaling);
}

Pair channel_energy_backward(
    const Tensor& grad_energy, const Tensor& query, const std::optional<Tensor>& key,
    const std::vector<bool>& needs_input_grad) {
  const ChannelSizes sizes = check_channel_energy_backward(grad_energy, query, key, needs_input_grad);
  const LaunchContext context("channel_energy_backward", query);
  const bool needs_query = needs_input_grad[0], needs_key = key.has_value() && needs_input_grad[1];
  const Tensor grad_query = allocate_gradient(query, needs_query);
  const Tensor grad_key = allocate_gradient(key.has_value() ? *key : query, needs_key);
  if (sizes.batch == 0 || sizes.query_positions == 0) {
    return {grad_query, grad_key};
  }
  if (needs_query && key.has_value()) {
    multiply_map(context, grad_energy, *key, grad_query);
  } else if (needs_query) {
    const int64_t channels = sizes.query_channels;
    const Tensor both = symmetrised(context, as_products(grad_energy), channels, grad_energy.scalar_type());
    multiply_map(context, both, query, grad_query);
  }
  if (needs_key) {
    multiply_map(context, transposed(grad_energy), query, grad_key);
  }
  return {grad_query, grad_key};
}

Triple channel_apply_backward(
    const Tensor& grad_output, const Tensor& energy, const Tensor& value, double scale,
    const std::optional<Tensor>& gamma, const std::vector<bool>& needs_input_grad) {
  const ChannelSizes sizes = check_channel_apply_backward(grad_output, energy, value, scale, gamma, needs_input_grad);
  const LaunchContext context("channel_apply_backward", value);
  const bool needs_energy = needs_input_grad[0], needs_value = needs_input_grad[1], needs_gamma = needs_input_grad[2];
  const int64_t batch = sizes.batch, channels = sizes.query_channels, keys = sizes.key_channels;
  context.count("channels", kCountRule, std::max(channels, keys));
  const std::vector<int64_t> gamma_sizes{batch, channels};
  const Tensor grad_value = allocate_gradient(value, needs_value);
  const Tensor grad_gamma = allocate(energy, needs_gamma ? gamma_sizes : std::vector<int64_t>{0}, energy.scalar_type());
  if (batch == 0 || !(needs_energy || needs_value || needs_gamma)) {
    return {allocate_gradient(energy, needs_energy), grad_value, grad_gamma};
  }
  const Tensor energies = as_products(energy);
  const std::optional<Tensor> factors = as_contiguous(gamma);
  Tensor weights, grad_energy;
  if (needs_energy || needs_gamma) {
    grad_energy = sum_of_products(context, grad_output, value, Symmetry::kGeneral);  // of the weights so far
    weights = allocate(value, {batch, channels, keys}, context.dtype);
    softmax_backward(
        context, energies, as_products(grad_energy), scale,
        {weights, std::nullopt, factors, needs_gamma ? std::optional(grad_gamma) : std::nullopt});
  } else {
    weights = softmax(context, energies, scale, factors);
  }
  if (!needs_energy) {
    grad_energy = allocate_gradient(energy, false);
  }
  if (needs_value && sizes.value_positions > 0) {
    multiply_into(grad_value, transposed(weights), grad_output);
    if (gamma.has_value() && !residual_in_weights(context)) {
      add(context, grad_value, as_contiguous(grad_output));
    }
  }
  return {grad_energy, grad_value, grad_gamma};
}

struct SelfBackwardCall {
  const LaunchContext& context;
  const Tensor& grad_output;  // (B, C, *S)
  const Tensor& input;        // (B, C, *S)
  double scale;
  std::optional<Tensor> gamma;  // (B, C), contiguous, dtype of accumulation
  bool needs_input;
  Tensor grad_input;                 // like input, or (0) if not needed
  std::optional<Tensor> grad_gamma;  // (B, C), dtype of accumulation; not given if not needed
};

// grad_input = weights^T grad_output + (grad_products + grad_products^T) input, by cuBLAS.
void self_backward_cublas(const SelfBackwardCall& call) {
  const LaunchContext& context = call.context;
  const Tensor& input = call.input;
  const int64_t batch = input.size(0), channels = input.size(1), positions = positions_of(input);
  const Tensor gram = products_cublas(context, input, input, Symmetry::kSymmetric);
  const Tensor grad_weights = products_cublas(context, call.grad_output, input, Symmetry::kGeneral);
  const Tensor weights = allocate(input, {batch, channels, channels}, context.dtype);
  softmax_backward(context, gram, grad_weights, call.scale, {weights, std::nullopt, call.gamma, call.grad_gamma});
  if (!call.needs_input) {
    return;
  }
  const Tensor symmetric = symmetrised(context, grad_weights, channels, context.dtype);
  const Tensor through_values = allocate(input, {batch, channels, positions}, context.dtype);
  bmm(transposed(weights), matrices(call.grad_output), through_values);
  bmm(symmetric, matrices(input), torch::stable::view(call.grad_input, {batch, channels, positions}));
  if (call.gamma.has_value() && !residual_in_weights(context)) {
    add(context, call.grad_input, through_values, as_contiguous(call.grad_output));
  } else {
    add(context, call.grad_input, through_values);
  }
}

// The same in one kernel that adds both products in one accumulator.
void self_backward_mma(const SelfBackwardCall& call) {
  const LaunchContext& context = call.context;
  const int64_t batch = call.input.size(0), channels = call.input.size(1);
  const FeatureMap input = aligned_feature_map(call.input, context.stream);
  const FeatureMap grad_output = aligned_feature_map(call.grad_output, context.stream);
  const Tensor gram = products_mma(context, input, input, Symmetry::kSymmetric);
  const Tensor grad_weights = products_mma(context, grad_output, input, Symmetry::kGeneral);
  const int64_t pitch = round_up(channels, 8);  // rows on 16 bytes
  const Tensor weights = allocate(call.input, {batch, channels, pitch}, context.dtype);
  softmax_backward(context, gram, grad_weights, call.scale, {weights, std::nullopt, call.gamma, call.grad_gamma});
  if (!call.needs_input) {
    return;
  }
  const Tensor symmetric = symmetrised(context, grad_weights, pitch, context.dtype);
  InputGradientParams params;
  params.weights = operand_of(weights);
  params.symmetric = operand_of(symmetric);
  params.grad_output = grad_output.operand;
  params.input = input.operand;
  params.grad_input = call.grad_input.mutable_data_ptr();
  params.channels = static_cast<int>(channels);
  params.positions = context.count("positions", kCountRule, input.positions);
  params.channel_tiles = ceil_div(params.channels, kGramTile);
  params.position_tiles = ceil_div(params.positions, kGramTile);
  with_half_type(context.dtype, [&]<class T>() { launch_input_gradient<T>(params, batch, context.stream); });
}

Pair channel_self_attention_backward(
    const Tensor& grad_output, const Tensor& input, double scale, const std::optional<Tensor>& gamma,
    const std::vector<bool>& needs_input_grad) {
  const ChannelSizes sizes = check_channel_self_attention_backward(grad_output, input, scale, gamma, needs_input_grad);
  const LaunchContext context("channel_self_attention_backward", input);
  const bool needs_input = needs_input_grad[0], needs_gamma = needs_input_grad[1];
  const std::vector<int64_t> gamma_sizes{sizes.batch, sizes.query_channels};
  const Tensor grad_input = allocate_gradient(input, needs_input);
  const Tensor grad_gamma =
      allocate(input, needs_gamma ? gamma_sizes : std::vector<int64_t>{0}, accumulation_dtype(context.dtype));
  if (sizes.batch > 0 && (needs_input || needs_gamma)) {
    const SelfBackwardCall call{
        context,
        grad_output,
        input,
        scale,
        as_contiguous(gamma),
        needs_input,
        grad_input,
        needs_gamma ? std::optional(grad_gamma) : std::nullopt};
    uses_tensor_cores(context) ? self_backward_mma(call) : self_backward_cublas(call);
  }
  return {grad_input, grad_gamma};
}

}  // namespace
}  // namespace segattn::cuda

SEGATTN_REGISTER_CUDA(m) {
  m.impl("channel_attention", TORCH_BOX(&segattn::cuda::channel_attention));
  m.impl("channel_attention_backward", TORCH_BOX(&segattn::cuda::channel_attention_backward));
  m.impl("channel_self_attention", TORCH_BOX(&segattn::cuda::channel_self_attention));
  m.impl("channel_self_attention_backward", TORCH_BOX(&segattn::cuda::channel_self_attention_backward));
  m.impl("channel_energy", TORCH_BOX(&segattn::cuda::channel_energy));
  m.impl("channel_energy_backward", TORCH_BOX(&segattn::cuda::channel_energy_backward));
  m.impl("channel_apply", TORCH_BOX(&segattn::cuda::channel_apply));
  m.impl("channel_apply_backward", TORCH_BOX(&segattn::cuda::channel_apply_backward));
}
