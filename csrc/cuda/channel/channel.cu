// Channel attention on CUDA, host side. What cuBLAS does best it does (torch's bmm): the products of 32-bit and 64-bit
// matrices, and the application of the map. Ours are the 16-bit Gram matrix in float32 and by halves, the softmax passes,
// and the self-attention's gradient, two products in one accumulator.
#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "checks/channel.h"
#include "cuda/channel/launch.h"
#include "cuda/channel/softmax.cuh"
#include "cuda/position/operands.h"
#include "registration.h"

namespace segattn::cuda {
namespace {

using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;

// out = left @ right, (B, M, K) @ (B, K, N). The variant with `out` is none of autocast's business.
void bmm(const Tensor& left, const Tensor& right, const Tensor& out) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(left), torch::stable::detail::from(right), torch::stable::detail::from(out)};
  SEGATTN_CHECK_TORCH(torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor transposed(const Tensor& matrix) {
  return torch::stable::transpose(matrix, 1, 2);
}

// (B, channels, *spatial) as a matrix for each sample; copied where its positions are not in order
Tensor matrices(const Tensor& tensor) {
  return torch::stable::view(torch::stable::contiguous(tensor), {tensor.size(0), tensor.size(1), positions_of(tensor)});
}

int count(const char* op, const char* what, int64_t value) {
  if (value > INT32_MAX) {
    fail(op, what, " must be fewer than 2^31 (got ", value, ")");
  }
  return static_cast<int>(value);
}

// visit.operator()<T>() with the 16-bit type
template <class Visit>
void with_half_type(ScalarType dtype, const Visit& visit) {
  if (dtype == ScalarType::Half) {
    visit.template operator()<__half>();
  } else {
    visit.template operator()<__nv_bfloat16>();
  }
}

// What a call needs wherever it launches.
struct ChannelCall {
  const char* op;
  ScalarType dtype;
  DeviceGuard guard;
  DeviceLimits limits;
  cudaStream_t stream;
  bool tensor_cores;  // 16-bit ones

  ChannelCall(const char* op_, const Tensor& like)
      : op(op_), dtype(like.scalar_type()), guard(like), limits(device_limits()), stream(current_stream(like)) {
    const Arithmetic arithmetic = choose_arithmetic(dtype, limits);
    tensor_cores = arithmetic == Arithmetic::kFloat16 || arithmetic == Arithmetic::kBfloat16;
  }

  bool residual_in_map() const {
    bool result = false;
    with_element(dtype, [&]<class T>() { result = kResidualInMap<T>; });
    return result;
  }

  // A channels-first matrix for the tensor-core kernels: its rows start on 16 bytes
  FeatureMap rows(const Tensor& tensor) const { return aligned_feature_map(tensor, stream); }

  // (splits, B, C, K) in the accumulator's type: left (B, C, *S), right (B, K, *S), the same tensor where symmetric
  Tensor products(const Tensor& left, const Tensor& right) const {
    const ScalarType accumulator = accumulation_dtype(dtype);
    const int64_t batch = left.size(0), c = left.size(1), k = right.size(1);
    const bool symmetric = &left == &right;
    if (!tensor_cores) {
      const Tensor energies = allocate(left, {1, batch, c, k}, accumulator);
      Tensor a = matrices(left), b = symmetric ? a : matrices(right);
      if (accumulator != dtype) {  // 16-bit types before sm_80
        a = torch::stable::to(a, accumulator);
        b = symmetric ? a : torch::stable::to(b, accumulator);
      }
      bmm(a, transposed(b), torch::stable::view(energies, {batch, c, k}));
      return energies;
    }
    const FeatureMap a = rows(left), b = symmetric ? a : rows(right);
    return gram(a, b, left, c, k, symmetric);
  }

  Tensor gram(
      const FeatureMap& left, const FeatureMap& right, const Tensor& like, int64_t c, int64_t k, bool symmetric) const {
    GramParams params{};
    params.left = left.operand;
    params.right = right.operand;
    params.batch = like.size(0);
    params.left_channels = count(op, "channels", c);
    params.right_channels = count(op, "channels", k);
    params.positions = count(op, "positions", positions_of(like));
    params.left_tiles = divide_up(c, kGramTile);
    params.right_tiles = divide_up(k, kGramTile);
    params.symmetric = symmetric;
    params.tile_pairs =
        symmetric ? params.left_tiles * (params.left_tiles + 1) / 2 : params.left_tiles * params.right_tiles;
    const int steps = divide_up(params.positions, kGramDepth);
    const int64_t blocks = std::max<int64_t>(params.batch * params.tile_pairs, 1);
    const int wanted = static_cast<int>(std::clamp<int64_t>(limits.multiprocessors / blocks, 1, kMaxGramSplits));
    params.positions_per_split = divide_up(steps, std::min(wanted, steps)) * kGramDepth;
    params.splits = divide_up(params.positions, params.positions_per_split);
    const Tensor energies = allocate(like, {params.splits, params.batch, c, k}, ScalarType::Float);
    params.energies = static_cast<float*>(energies.mutable_data_ptr());
    with_half_type(dtype, [&]<class T>() { launch_gram<T>(params, stream); });
    return energies;
  }

  // energies (splits, B, C, K) -> attention (B, C, K), times gamma (B, C) where there is one; fills logsumexp (B, C)
  Tensor softmax(
      const Tensor& energies, double scale, const std::optional<Tensor>& gamma, const Tensor& logsumexp) const {
    const int64_t batch = energies.size(1), c = energies.size(2), k = energies.size(3);
    const Tensor attention = allocate(energies, {batch, c, k}, dtype);
    ChannelSoftmaxParams params;
    params.energies = energies.mutable_data_ptr();
    params.attention = attention.mutable_data_ptr();
    params.logsumexp = logsumexp.mutable_data_ptr();
    params.gamma = gamma.has_value() ? gamma->const_data_ptr() : nullptr;
    params.split_stride = batch * c * k;
    params.splits = static_cast<int>(energies.size(0));
    params.keys = static_cast<int>(k);
    params.scale = scale;
    with_element(dtype, [&]<class T>() {
      SEGATTN_LAUNCH(
          (channel_softmax_kernel<T>), dim3(grid_blocks(batch * c)), dim3(kChannelThreads), 0, stream, params);
    });
    return attention;
  }

  // Fills attention (B, C, pitch) and, unless it is null, grad_energies (B, C, pitch); grad_attention's split 0
  // otherwise; and grad_gamma (B, C) unless it is null. gamma (B, C) as in the forward pass.
  void softmax_backward(
      const Tensor& energies, const Tensor& grad_attention, double scale, const Tensor& attention,
      const Tensor* grad_energies, const std::optional<Tensor>& gamma, const Tensor* grad_gamma) const {
    const int64_t batch = energies.size(1), c = energies.size(2), k = energies.size(3);
    ChannelSoftmaxBackwardParams params;
    params.energies = energies.mutable_data_ptr();
    params.grad_attention = grad_attention.mutable_data_ptr();
    params.attention = attention.mutable_data_ptr();
    params.grad_energies = grad_energies == nullptr ? nullptr : grad_energies->mutable_data_ptr();
    params.gamma = gamma.has_value() ? gamma->const_data_ptr() : nullptr;
    params.grad_gamma = grad_gamma == nullptr ? nullptr : grad_gamma->mutable_data_ptr();
    params.split_stride = batch * c * k;
    params.energy_splits = static_cast<int>(energies.size(0));
    params.grad_splits = static_cast<int>(grad_attention.size(0));
    params.keys = static_cast<int>(k);
    params.pitch = static_cast<int>(attention.size(2));
    params.scale = scale;
    with_element(dtype, [&]<class T>() {
      SEGATTN_LAUNCH(
          (channel_softmax_backward_kernel<T>), dim3(grid_blocks(batch * c)), dim3(kChannelThreads), 0, stream, params);
    });
  }

  // (B, C, pitch) of the elements' type: matrix + matrix^T, matrix (1, B, C, C) of the accumulator's
  Tensor symmetrised(const Tensor& matrix, int64_t pitch) const {
    const int64_t batch = matrix.size(1), c = matrix.size(2);
    const Tensor result = allocate(matrix, {batch, c, pitch}, dtype);
    SymmetriseParams params;
    params.matrix = matrix.const_data_ptr();
    params.result = result.mutable_data_ptr();
    params.channels = static_cast<int>(c);
    params.pitch = static_cast<int>(pitch);
    params.tiles = divide_up(c, kSymmetriseTile);
    const int64_t blocks = batch * params.tiles * params.tiles;
    with_element(dtype, [&]<class T>() {
      SEGATTN_LAUNCH(
          (symmetrise_kernel<T>), dim3(grid_blocks(blocks)), dim3(kSymmetriseTile * kSymmetriseRows), 0, stream,
          params);
    });
    return result;
  }

  // target += other + another, all contiguous
  void add(const Tensor& target, const Tensor& other, const Tensor* another = nullptr) const {
    const AddParams params{
        target.mutable_data_ptr(), other.const_data_ptr(), another == nullptr ? nullptr : another->const_data_ptr(),
        target.numel()};
    const int64_t blocks = (params.elements + kChannelThreads - 1) / kChannelThreads;
    with_element(dtype, [&]<class T>() {
      SEGATTN_LAUNCH((add_kernel<T>), dim3(grid_blocks(blocks)), dim3(kChannelThreads), 0, stream, params);
    });
  }
};

// output (B, C, *T) = attention (B, C, K) @ value (B, K, *T)
Tensor apply(const Tensor& attention, const Tensor& value, std::vector<int64_t> sizes) {
  const Tensor output = allocate(value, sizes, value.scalar_type());
  bmm(attention, matrices(value), torch::stable::view(output, {sizes[0], sizes[1], positions_of(value)}));
  return output;
}

std::vector<int64_t> with_channels(const Tensor& like, int64_t channels) {
  const auto sizes = like.sizes();
  std::vector<int64_t> result(sizes.begin(), sizes.end());
  result[1] = channels;
  return result;
}

Pair forward(
    const ChannelCall& call, const Tensor& query, const Tensor& key, const Tensor& value, const ChannelSizes& sizes,
    double scale, const std::optional<Tensor>& gamma) {
  const std::vector<int64_t> output_sizes = with_channels(value, sizes.query_channels);
  const Tensor logsumexp =
      allocate(query, {sizes.batch, sizes.query_channels}, accumulation_dtype(query.scalar_type()));
  if (sizes.batch == 0) {
    return {allocate(query, output_sizes, query.scalar_type()), logsumexp};
  }
  const Tensor attention = call.softmax(call.products(query, key), scale, gamma, logsumexp);
  if (sizes.value_positions == 0) {
    return {allocate(query, output_sizes, query.scalar_type()), logsumexp};
  }
  return {apply(attention, value, output_sizes), logsumexp};
}

Pair channel_attention(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  const ChannelSizes sizes = check_channel_attention(query, key, value, scale);
  return forward(ChannelCall("channel_attention", query), query, key, value, sizes, scale, std::nullopt);
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

Pair channel_self_attention(const Tensor& input, double scale, const std::optional<Tensor>& gamma) {
  const ChannelSizes sizes = check_channel_self_attention(input, scale, gamma);
  const ChannelCall call("channel_self_attention", input);
  const Pair result = forward(call, input, input, input, sizes, scale, contiguous(gamma));
  if (gamma.has_value() && !call.residual_in_map() && sizes.batch > 0) {
    call.add(std::get<0>(result), torch::stable::contiguous(input));
  }
  return result;
}

Triple channel_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  const ChannelSizes sizes = check_channel_attention_backward(grad_output, query, key, value, scale);
  const ChannelCall call("channel_attention_backward", query);
  const Tensor grad_query = allocate_like(query), grad_key = allocate_like(key), grad_value = allocate_like(value);
  const int64_t batch = sizes.batch, c = sizes.query_channels, k = sizes.key_channels;
  if (batch == 0) {
    return {grad_query, grad_key, grad_value};
  }
  const Tensor energies = call.products(query, key);
  const bool no_value = sizes.value_positions == 0;  // then the gradient of the map is zero
  Tensor grad_attention =
      no_value ? allocate(energies, {1, batch, c, k}, energies.scalar_type()) : call.products(grad_output, value);
  if (no_value) {
    torch::stable::zero_(grad_attention);
  }
  const Tensor attention = allocate(query, {batch, c, k}, call.dtype);
  const Tensor grad_energies = allocate(query, {batch, c, k}, call.dtype);
  call.softmax_backward(energies, grad_attention, scale, attention, &grad_energies, std::nullopt, nullptr);
  const auto into = [&](const Tensor& left, const Tensor& right, const Tensor& result) {
    bmm(left, matrices(right), torch::stable::view(result, {batch, result.size(1), positions_of(result)}));
  };
  into(grad_energies, key, grad_query);
  into(transposed(grad_energies), query, grad_key);
  if (!no_value) {
    into(transposed(attention), grad_output, grad_value);
  }
  return {grad_query, grad_key, grad_value};
}

Pair channel_self_attention_backward(
    const Tensor& grad_output, const Tensor& input, double scale, const std::optional<Tensor>& given_gamma) {
  const ChannelSizes sizes = check_channel_self_attention_backward(grad_output, input, scale, given_gamma);
  const ChannelCall call("channel_self_attention_backward", input);
  const std::optional<Tensor> gamma = contiguous(given_gamma);
  const int64_t batch = sizes.batch, c = sizes.query_channels, n = sizes.query_positions;
  const Tensor grad_input = allocate_like(input);
  const Tensor grad_gamma = allocate(input, {batch, c}, accumulation_dtype(call.dtype));
  if (batch == 0) {
    return {grad_input, grad_gamma};
  }
  if (!call.tensor_cores) {
    const Tensor energies = call.products(input, input), grad_attention = call.products(grad_output, input);
    const Tensor attention = allocate(input, {batch, c, c}, call.dtype);
    call.softmax_backward(energies, grad_attention, scale, attention, nullptr, gamma, &grad_gamma);
    const Tensor symmetric = call.symmetrised(grad_attention, c);
    const Tensor through_values = allocate(input, {batch, c, n}, call.dtype);
    bmm(transposed(attention), matrices(grad_output), through_values);
    bmm(symmetric, matrices(input), torch::stable::view(grad_input, {batch, c, n}));
    if (gamma.has_value() && !call.residual_in_map()) {
      const Tensor residual = torch::stable::contiguous(grad_output);
      call.add(grad_input, through_values, &residual);
    } else {
      call.add(grad_input, through_values);
    }
    return {grad_input, grad_gamma};
  }
  const FeatureMap x = call.rows(input), g = call.rows(grad_output);
  const Tensor energies = call.gram(x, x, input, c, c, true), grad_attention = call.gram(g, x, input, c, c, false);
  const int64_t pitch = (c + 7) / 8 * 8;  // rows on 16 bytes
  const Tensor attention = allocate(input, {batch, c, pitch}, call.dtype);
  call.softmax_backward(energies, grad_attention, scale, attention, nullptr, gamma, &grad_gamma);
  const Tensor symmetric = call.symmetrised(grad_attention, pitch);
  ChannelCombineParams params;
  params.attention = operand_of(attention);
  params.symmetric = operand_of(symmetric);
  params.grad_output = g.operand;
  params.input = x.operand;
  params.output = grad_input.mutable_data_ptr();
  params.channels = static_cast<int>(c);
  params.positions = count(call.op, "positions", n);
  params.channel_tiles = divide_up(c, kGramTile);
  params.position_tiles = divide_up(n, kGramTile);
  with_half_type(call.dtype, [&]<class T>() { launch_channel_combine<T>(params, batch, call.stream); });
  return {grad_input, grad_gamma};
}

}  // namespace
}  // namespace segattn::cuda

SEGATTN_REGISTER_CUDA(m) {
  m.impl("channel_attention", TORCH_BOX(&segattn::cuda::channel_attention));
  m.impl("channel_attention_backward", TORCH_BOX(&segattn::cuda::channel_attention_backward));
  m.impl("channel_self_attention", TORCH_BOX(&segattn::cuda::channel_self_attention));
  m.impl("channel_self_attention_backward", TORCH_BOX(&segattn::cuda::channel_self_attention_backward));
}
