// Criss-cross attention on CUDA, host side: checks the arguments, allocates and launches.
//
// Every operator runs the same kernels over the columns of the image and then over its rows, with different strides
// (params.h). The second direction also reads the results of the first. That is cheaper for rows: the sectors of a
// strip of 8 columns are two to three times the bytes it needs, those of a row hardly more. An image of one row has no
// columns: each would hold only the query itself. The operators for one of the two directions run its kernels alone.
#include <cmath>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "checks/criss_cross.h"
#include "cuda/common/delta.h"
#include "cuda/common/launch_context.h"
#include "cuda/common/math.h"
#include "cuda/common/operands.h"
#include "cuda/criss_cross/correction.cuh"
#include "cuda/criss_cross/launch.h"
#include "cuda/criss_cross/line_mma.cuh"
#include "cuda/criss_cross/without_keys.cuh"
#include "registration.h"

namespace segattn::cuda {
namespace {

using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;

// `tensor` (B, channels, H, W), copied where a stride within a sample is longer than the kernels allow.
Tensor with_short_strides(const LaunchContext& context, const char* name, const Tensor& tensor) {
  if (tensor.stride(1) <= kMaxLineStride && tensor.stride(2) <= kMaxLineStride && tensor.stride(3) <= kMaxLineStride) {
    return tensor;
  }
  const int64_t positions = tensor.size(2) * tensor.size(3);
  if (positions > kMaxLineStride) {
    fail(context.op, name, " must have fewer than 2^29 positions (got ", positions, ")");
  }
  return as_contiguous(tensor);
}

// tensor (B, channels, H, W) as rows or as columns, with short strides
LineFeatures features(const Tensor& tensor, Direction direction) {
  const auto stride = [&](int64_t dim) { return static_cast<int>(tensor.stride(dim)); };
  LineFeatures f{
      const_cast<void*>(tensor.const_data_ptr()),
      tensor.stride(0),
      stride(1),
      stride(direction == Direction::kColumns ? 3 : 2),
      stride(direction == Direction::kColumns ? 2 : 3),
      static_cast<int>(tensor.size(1)),
      false};
  f.paired = f.line_stride == 1 && tensor.size(direction == Direction::kColumns ? 3 : 2) % 2 == 0 &&
      f.position_stride % 2 == 0 && f.channel_stride % 2 == 0 && f.batch_stride % 2 == 0 &&
      reinterpret_cast<uintptr_t>(f.data) % 4 == 0;
  return f;
}

// tensor (B, H + W - 1, H, W)
LineAffinity line_affinity(const Tensor& tensor, Direction direction) {
  const bool columns = direction == Direction::kColumns;
  return {
      const_cast<void*>(tensor.const_data_ptr()),
      tensor.stride(0),
      tensor.stride(1),
      tensor.stride(columns ? 3 : 2),
      tensor.stride(columns ? 2 : 3),
      columns ? static_cast<int>(tensor.size(3)) : 0};
}

// tensor (B, H, W)
LineScalars scalars(const Tensor& tensor, Direction direction) {
  return {
      const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0),
      tensor.stride(direction == Direction::kColumns ? 2 : 1), tensor.stride(direction == Direction::kColumns ? 1 : 2)};
}

// logsumexp and its rounding error, both (B, H, W)
LineLogsumexp split_scalars(const Tensor& logsumexp, const std::optional<Tensor>& low, Direction direction) {
  return {scalars(logsumexp, direction), low.has_value() ? const_cast<void*>(low->const_data_ptr()) : nullptr};
}

Lines lines_of(const CrissCrossSizes& sizes, Direction direction) {
  Lines lines{};
  lines.batch = sizes.batch;
  lines.count = static_cast<int>(direction == Direction::kColumns ? sizes.width : sizes.height);
  lines.length = static_cast<int>(direction == Direction::kColumns ? sizes.height : sizes.width);
  lines.skips_self = direction == Direction::kColumns;
  return lines;
}

struct Call {
  const LaunchContext& context;
  CrissCrossSizes sizes;
  std::optional<Direction> only = std::nullopt;  // of the two directions

  bool has_columns() const { return sizes.height > 1 && only != Direction::kRows; }
  bool has_rows() const { return only != Direction::kColumns; }
  // Whether `direction` adds to the results of the other direction.
  bool accumulates(Direction direction) const { return direction == Direction::kRows && has_columns(); }

  // visit(Direction), columns first.
  template <class Visit>
  void for_each_direction(const Visit& visit) const {
    if (sizes.batch == 0) {
      return;
    }
    if (has_columns()) {
      visit(Direction::kColumns);
    }
    if (has_rows()) {
      visit(Direction::kRows);
    }
  }

  // visit.operator()<Arithmetic>()
  template <class Visit>
  void with_arithmetic(const Visit& visit) const {
    switch (context.arithmetic) {
      case Arithmetic::kFloat16:
        return visit.template operator()<LineMma16<__half>>();
      case Arithmetic::kBfloat16:
        return visit.template operator()<LineMma16<__nv_bfloat16>>();
      case Arithmetic::kTf32:
        return visit.template operator()<LineTf32<1>>();
      case Arithmetic::k3xTf32:
        return visit.template operator()<LineTf32<3>>();
      case Arithmetic::kSimt:
        return with_element(context.dtype, [&]<class T>() { visit.template operator()<LineSimt<T>>(); });
    }
  }
};

// affinity (B, H + W - 1, H, W) = products of query_side and key_side, both (B, any number of channels, H, W).
void products(const Call& call, const Tensor& query_side, const Tensor& key_side, const Tensor& affinity) {
  call.for_each_direction([&](Direction direction) {
    LineProductParams params{};
    params.lines = lines_of(call.sizes, direction);
    params.query_side = features(query_side, direction);
    params.key_side = features(key_side, direction);
    params.affinity = line_affinity(affinity, direction);
    call.with_arithmetic(
        [&]<class Arithmetic>() { launch_line_product<Arithmetic>(params, call.context.limits, call.context.stream); });
  });
}

// output (B, C, H, W) = values (B, C, H, W) summed over one direction by the weights that `params` describes.
template <LineWeight kWeight, LineOwner kOwner>
void sum(const Call& call, LineSumParams params, const Tensor& values, const Tensor& output, Direction direction) {
  params.lines = lines_of(call.sizes, direction);
  params.values = features(values, direction);
  params.output = features(output, direction);
  params.accumulate = call.accumulates(direction);
  call.with_arithmetic([&]<class Arithmetic>() {
    launch_line_sum<Arithmetic, kWeight, kOwner>(params, call.context.limits, call.context.stream);
  });
}

// output (B, C, H, W) = values (B, C, H, W) summed over both directions by given weights (B, H + W - 1, H, W).
template <LineOwner kOwner>
void sum_with_given_weights(const Call& call, const Tensor& weights, const Tensor& values, const Tensor& output) {
  call.for_each_direction([&](Direction direction) {
    LineSumParams params{};
    params.given_weights = line_affinity(weights, direction);
    sum<LineWeight::kGiven, kOwner>(call, params, values, output, direction);
  });
}

Tensor criss_cross_affinity(const Tensor& given_query, const Tensor& given_key) {
  const CrissCrossSizes sizes = check_criss_cross_affinity(given_query, given_key);
  const LaunchContext context("criss_cross_affinity", given_query);
  const Tensor query = with_short_strides(context, "query", given_query);
  const Tensor key = with_short_strides(context, "key", given_key);
  const Call call{context, sizes};
  const Tensor affinity = allocate(query, {sizes.batch, sizes.reach(), sizes.height, sizes.width}, query.scalar_type());
  products(call, query, key, affinity);
  return affinity;
}

Pair criss_cross_affinity_backward(
    const Tensor& grad_affinity, const Tensor& given_query, const Tensor& given_key,
    const std::vector<bool>& needs_input_grad) {
  const CrissCrossSizes sizes =
      check_criss_cross_affinity_backward(grad_affinity, given_query, given_key, needs_input_grad);
  const LaunchContext context("criss_cross_affinity_backward", given_query);
  const Tensor query = with_short_strides(context, "query", given_query);
  const Tensor key = with_short_strides(context, "key", given_key);
  const Call call{context, sizes};
  const Tensor grad_query = allocate_gradient(query, needs_input_grad[0]);
  const Tensor grad_key = allocate_gradient(key, needs_input_grad[1]);
  if (needs_input_grad[0]) {
    sum_with_given_weights<LineOwner::kQueries>(call, grad_affinity, key, grad_query);
  }
  if (needs_input_grad[1]) {
    sum_with_given_weights<LineOwner::kKeys>(call, grad_affinity, query, grad_key);
  }
  return {grad_query, grad_key};
}

Tensor criss_cross_aggregation(const Tensor& attention, const Tensor& given_value) {
  const CrissCrossSizes sizes = check_criss_cross_aggregation(attention, given_value);
  const LaunchContext context("criss_cross_aggregation", given_value);
  const Tensor value = with_short_strides(context, "value", given_value);
  const Call call{context, sizes};
  const Tensor output = allocate_like(value);
  sum_with_given_weights<LineOwner::kQueries>(call, attention, value, output);
  return output;
}

Pair criss_cross_aggregation_backward(
    const Tensor& given_grad_output, const Tensor& attention, const Tensor& given_value,
    const std::vector<bool>& needs_input_grad) {
  const CrissCrossSizes sizes =
      check_criss_cross_aggregation_backward(given_grad_output, attention, given_value, needs_input_grad);
  const LaunchContext context("criss_cross_aggregation_backward", given_value);
  const Tensor grad_output = with_short_strides(context, "grad_output", given_grad_output);
  const Tensor value = with_short_strides(context, "value", given_value);
  const Call call{context, sizes};
  const Tensor grad_attention = allocate_gradient(attention, needs_input_grad[0]);
  const Tensor grad_value = allocate_gradient(value, needs_input_grad[1]);
  if (needs_input_grad[0]) {
    products(call, grad_output, value, grad_attention);
  }
  if (needs_input_grad[1]) {
    sum_with_given_weights<LineOwner::kKeys>(call, attention, grad_output, grad_value);
  }
  return {grad_attention, grad_value};
}

// Whether shared memory holds the weights of whole columns and of whole rows.
bool fits_in_one_kernel(const Call& call, const Tensor& output) {
  bool fits = true;
  call.for_each_direction([&](Direction direction) {
    call.with_arithmetic([&]<class Arithmetic>() {
      fits &= line_attention_fits<Arithmetic>(
          lines_of(call.sizes, direction), features(output, direction), call.context.limits);
    });
  });
  return fits;
}

// One kernel per direction. The blocks of all channel groups read the logsumexp of the columns while one of them writes
// the final logsumexp of the same queries, so the two are separate tensors.
void attend_in_one_kernel(
    const Call& call, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& logsumexp, const Tensor& logsumexp_low, double scale) {
  const bool has_both = call.has_columns() && call.has_rows();
  const Tensor column_logsumexp = has_both ? allocate_like(logsumexp) : logsumexp;
  const Tensor column_logsumexp_low = has_both ? allocate_like(logsumexp) : logsumexp_low;
  call.for_each_direction([&](Direction direction) {
    LineAttentionParams params{};
    params.lines = lines_of(call.sizes, direction);
    params.query = features(query, direction);
    params.key = features(key, direction);
    params.values = features(value, direction);
    params.output = features(output, direction);
    params.other_logsumexp = split_scalars(column_logsumexp, column_logsumexp_low, direction);
    params.logsumexp =
        direction == Direction::kColumns ? params.other_logsumexp : split_scalars(logsumexp, logsumexp_low, direction);
    params.scale = scale;
    params.accumulate = call.accumulates(direction);
    call.with_arithmetic([&]<class Arithmetic>() {
      launch_line_attention<Arithmetic>(params, call.context.limits, call.context.stream);
    });
  });
}

// Long lines: first logsumexp over both directions, then sums by the final weights.
void attend_in_passes(
    const Call& call, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& logsumexp, const Tensor& logsumexp_low, double scale) {
  call.for_each_direction([&](Direction direction) {
    LineStatisticsParams params{};
    params.lines = lines_of(call.sizes, direction);
    params.query = features(query, direction);
    params.key = features(key, direction);
    params.logsumexp = split_scalars(logsumexp, logsumexp_low, direction);
    params.scale = scale;
    params.accumulate = call.accumulates(direction);
    call.with_arithmetic([&]<class Arithmetic>() {
      launch_line_statistics<Arithmetic>(params, call.context.limits, call.context.stream);
    });
  });
  call.for_each_direction([&](Direction direction) {
    LineSumParams params{};
    params.query = features(query, direction);
    params.key = features(key, direction);
    params.logsumexp = split_scalars(logsumexp, logsumexp_low, direction);
    params.scale = scale;
    sum<LineWeight::kSoftmax, LineOwner::kQueries>(call, params, value, output, direction);
  });
}

// -> output (B, C, H, W), in the dtype of value, logsumexp (B, H, W), logsumexp_low (B, H, W)
Triple attend(const Call& call, const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  const CrissCrossSizes& sizes = call.sizes;
  const Tensor output = allocate_like(value);
  const Tensor logsumexp =
      allocate(query, {sizes.batch, sizes.height, sizes.width}, accumulation_dtype(query.scalar_type()));
  const Tensor logsumexp_low = allocate_like(logsumexp);
  if (fits_in_one_kernel(call, output)) {
    attend_in_one_kernel(call, query, key, value, output, logsumexp, logsumexp_low, scale);
  } else {
    attend_in_passes(call, query, key, value, output, logsumexp, logsumexp_low, scale);
  }
  return {output, logsumexp, logsumexp_low};
}

Triple criss_cross_attention(
    const Tensor& given_query, const Tensor& given_key, const Tensor& given_value, double scale) {
  const CrissCrossSizes sizes = check_criss_cross_attention(given_query, given_key, given_value, scale);
  const LaunchContext context("criss_cross_attention", given_query);
  const Tensor query = with_short_strides(context, "query", given_query);
  const Tensor key = with_short_strides(context, "key", given_key);
  const Tensor value = with_short_strides(context, "value", given_value);
  return attend({context, sizes}, query, key, value, scale);
}

// grad_query -= (grad_sum - scale * grad_logsumexp) * mean_key (correction.cuh)
void correct_query_gradient(
    const Call& call, const Tensor& grad_query, const Tensor& mean_key, const Tensor& grad_sum,
    const std::optional<Tensor>& grad_logsumexp, double scale) {
  const CrissCrossSizes& sizes = call.sizes;
  QueryCorrectionParams params{};
  params.grad_query = grad_query.mutable_data_ptr();
  params.mean_key = mean_key.const_data_ptr();
  params.grad_sum = grad_sum.const_data_ptr();
  params.grad_logsumexp = data_of(grad_logsumexp);
  params.scale = scale;
  params.positions = sizes.height * sizes.width;
  params.channels = static_cast<int>(sizes.key_channels);
  params.position_blocks = static_cast<int>(ceil_div(params.positions, kCorrectionThreads));
  params.channel_blocks = ceil_div(params.channels, kCorrectionChannels);
  const int64_t blocks = sizes.batch * params.position_blocks * params.channel_blocks;
  with_element(call.context.dtype, [&]<class T>() {
    SEGATTN_LAUNCH(
        (correct_query_gradient_kernel<T>), dim3(grid_blocks(blocks)), dim3(kCorrectionThreads), 0, call.context.stream,
        params);
  });
}

struct Gradients {
  const Tensor& grad_output;                   // (B, C, H, W)
  const Tensor& query;                         // (B, E, H, W)
  const Tensor& key;                           // (B, E, H, W)
  const Tensor& value;                         // (B, C, H, W)
  const Tensor& logsumexp;                     // (B, H, W)
  const std::optional<Tensor>& logsumexp_low;  // (B, H, W), with the strides of logsumexp
  const std::optional<Tensor>& delta;          // (B, H, W); for grad_query and grad_key
  const std::optional<Tensor>& grad_sum;       // (B, H, W), written; for grad_query
  const std::optional<Tensor>& mean_key;       // (B, E, H, W), written if given
  const Tensor& grad_query;                    // (B, E, H, W), written, as the next two, if needed
  const Tensor& grad_key;                      // (B, E, H, W)
  const Tensor& grad_value;                    // (B, C, H, W)
  bool needs_query, needs_key, needs_value;
  double scale;
};

void differentiate(const Call& call, const Gradients& g) {
  call.for_each_direction([&](Direction direction) {
    LineBackwardParams params{};
    params.lines = lines_of(call.sizes, direction);
    params.query = features(g.query, direction);
    params.key = features(g.key, direction);
    params.grad_output = features(g.grad_output, direction);
    params.value = features(g.value, direction);
    params.logsumexp = split_scalars(g.logsumexp, g.logsumexp_low, direction);
    params.scale = g.scale;
    params.accumulate = call.accumulates(direction);
    if (g.delta.has_value()) {
      params.delta = scalars(*g.delta, direction);
    }
    if (g.grad_sum.has_value()) {
      params.grad_sum = scalars(*g.grad_sum, direction);
    }
    if (g.mean_key.has_value()) {  // a separate launch: another sum in line_backward_kernel spills registers
      sum<LineWeight::kSoftmax, LineOwner::kQueries>(call, params, g.key, *g.mean_key, direction);
    }
    // A single gradient has a kernel that does no more than it needs; two share the weights and energy gradients.
    if (g.needs_query + g.needs_key + g.needs_value > 1) {
      params.grad_query = g.needs_query ? features(g.grad_query, direction) : LineFeatures{};
      params.grad_key = g.needs_key ? features(g.grad_key, direction) : LineFeatures{};
      params.grad_value = g.needs_value ? features(g.grad_value, direction) : LineFeatures{};
      bool launched = false;
      call.with_arithmetic([&]<class Arithmetic>() {
        launched = try_launch_line_backward<Arithmetic>(params, call.context.limits, call.context.stream);
      });
      if (launched) {
        return;
      }
    }
    if (g.needs_value) {
      sum<LineWeight::kSoftmax, LineOwner::kKeys>(call, params, g.grad_output, g.grad_value, direction);
    }
    if (g.needs_query) {
      sum<LineWeight::kGradient, LineOwner::kQueries>(call, params, g.key, g.grad_query, direction);
    }
    if (g.needs_key) {
      sum<LineWeight::kGradient, LineOwner::kKeys>(call, params, g.query, g.grad_key, direction);
    }
  });
}

Triple criss_cross_attention_backward(
    const Tensor& given_grad_output, const Tensor& given_query, const Tensor& given_key, const Tensor& given_value,
    const Tensor& output, const Tensor& logsumexp, double scale, const std::optional<Tensor>& logsumexp_low,
    const std::optional<Tensor>& grad_logsumexp, const std::vector<bool>& needs_input_grad, bool keys_complete) {
  const CrissCrossSizes sizes = check_criss_cross_attention_backward(
      given_grad_output, given_query, given_key, given_value, output, logsumexp, scale, logsumexp_low, grad_logsumexp,
      needs_input_grad);
  const LaunchContext context("criss_cross_attention_backward", given_query);
  const Tensor grad_output = with_short_strides(context, "grad_output", given_grad_output);
  const Tensor query = with_short_strides(context, "query", given_query);
  const Tensor key = with_short_strides(context, "key", given_key);
  const Tensor value = with_short_strides(context, "value", given_value);
  const Call call{context, sizes};
  const bool needs_query = needs_input_grad[0], needs_key = needs_input_grad[1], needs_value = needs_input_grad[2];
  const Tensor grad_query = allocate_gradient(query, needs_query), grad_key = allocate_gradient(key, needs_key);
  const Tensor grad_value = allocate_gradient(value, needs_value);
  if (sizes.batch == 0 || !(needs_query || needs_key || needs_value)) {
    return {grad_query, grad_key, grad_value};
  }
  // All are read with the same strides.
  const Tensor logsumexp_value = as_contiguous(logsumexp);
  const std::optional<Tensor> logsumexp_error = as_contiguous(logsumexp_low),
                              grad_of_logsumexp = as_contiguous(grad_logsumexp);
  std::optional<Tensor> delta, grad_sum, mean_key;
  if (needs_query || needs_key) {
    delta = delta_of(
        context, feature_map(grad_output), feature_map(output), std::nullopt, grad_of_logsumexp,
        {sizes.batch, sizes.height, sizes.width});
  }
  if (needs_query) {
    grad_sum = allocate_like(*delta);
  }
  if (needs_query && keys_complete) {
    mean_key = allocate_like(key);
  }
  differentiate(
      call,
      {grad_output, query, key, value, logsumexp_value, logsumexp_error, delta, grad_sum, mean_key, grad_query,
       grad_key, grad_value, needs_query, needs_key, needs_value, scale});
  if (mean_key.has_value()) {
    correct_query_gradient(call, grad_query, *mean_key, *grad_sum, grad_of_logsumexp, scale);
  }
  return {grad_query, grad_key, grad_value};
}

// The kernels store results in the dtype of their inputs, and the results of a part have the dtype of accumulation. So
// 16-bit inputs are converted, and multiplied as TF32, in which they are exact. Kernels with 16-bit inputs and float32
// results would add 0.7 (sums alone) to 1.8 MB to the 9 MB of an architecture.
Tensor in_accumulation_dtype(const Tensor& tensor) {
  return is_16_bit(tensor.scalar_type()) ? torch::stable::to(tensor, ScalarType::Float) : tensor;
}

// `given`: an input before in_accumulation_dtype, `context` of one after it
Arithmetic arithmetic_of_part(const LaunchContext& context, const Tensor& given) {
  const bool is_exact = is_16_bit(given.scalar_type()) && context.arithmetic == Arithmetic::k3xTf32;
  return is_exact ? Arithmetic::kTf32 : context.arithmetic;
}

// A column of one position, which is left out, has no keys.
bool has_no_keys(const CrissCrossSizes& sizes, Direction direction) {
  return direction == Direction::kColumns && sizes.height == 1;
}

// visit.operator()<Real>() with the type of accumulation
template <class Visit>
void with_real(const LaunchContext& context, const Visit& visit) {
  if (context.dtype == ScalarType::Double) {
    visit.template operator()<double>();
  } else {
    visit.template operator()<float>();
  }
}

// output (B, C, H, W) = 0 for the queries whose logsumexp (B, H, W) is -inf
void clear_without_keys(const Call& call, const Tensor& output, const Tensor& logsumexp) {
  with_real(call.context, [&]<class Real>() {
    ClearParams<Real> params{};
    params.output = static_cast<Real*>(output.mutable_data_ptr());
    params.logsumexp = static_cast<const Real*>(logsumexp.const_data_ptr());
    params.positions = call.sizes.height * call.sizes.width;
    params.channels = static_cast<int>(call.sizes.value_channels);
    params.position_blocks = static_cast<int>(ceil_div(params.positions, kWithoutKeysThreads));
    SEGATTN_LAUNCH(
        (clear_without_keys_kernel<Real>), dim3(grid_blocks(call.sizes.batch * params.position_blocks)),
        dim3(kWithoutKeysThreads), 0, call.context.stream, params);
  });
}

// logsumexp (B, H, W) as the backward kernels take it, contiguous
Tensor logsumexp_of_weights(const Call& call, const Tensor& given) {
  const Tensor logsumexp = allocate_like(given), contiguous = as_contiguous(given);
  with_real(call.context, [&]<class Real>() {
    const LogsumexpParams<Real> params{
        static_cast<const Real*>(contiguous.const_data_ptr()), static_cast<Real*>(logsumexp.mutable_data_ptr()),
        given.numel()};
    SEGATTN_LAUNCH(
        (logsumexp_of_weights_kernel<Real>), dim3(grid_blocks(ceil_div(params.count, kWithoutKeysThreads))),
        dim3(kWithoutKeysThreads), 0, call.context.stream, params);
  });
  return logsumexp;
}

Triple attend_to_part(
    const char* op, Direction direction, const Tensor& given_query, const Tensor& given_key, const Tensor& given_value,
    double scale) {
  const CrissCrossSizes sizes = check_criss_cross_attention(given_query, given_key, given_value, scale, op);
  const Tensor converted = in_accumulation_dtype(given_query);
  LaunchContext context(op, converted);
  context.arithmetic = arithmetic_of_part(context, given_query);
  const Tensor query = with_short_strides(context, "query", converted);
  const Tensor key = with_short_strides(context, "key", in_accumulation_dtype(given_key));
  const Tensor value = with_short_strides(context, "value", in_accumulation_dtype(given_value));
  const Call call{context, sizes, direction};
  if (has_no_keys(sizes, direction)) {
    Tensor output = allocate_like(value);
    Tensor logsumexp = allocate(query, {sizes.batch, sizes.height, sizes.width}, query.scalar_type());
    Tensor logsumexp_low = allocate_like(logsumexp);
    torch::stable::zero_(output);
    torch::stable::fill_(logsumexp, -INFINITY);
    torch::stable::zero_(logsumexp_low);
    return {output, logsumexp, logsumexp_low};
  }
  const Triple results = attend(call, query, key, value, scale);
  if (sizes.batch > 0) {
    clear_without_keys(call, std::get<0>(results), std::get<1>(results));
  }
  return results;
}

Triple differentiate_part(
    const char* op, Direction direction, const Tensor& given_grad_output, const Tensor& given_query,
    const Tensor& given_key, const Tensor& given_value, const Tensor& logsumexp, const Tensor& logsumexp_low,
    const Tensor& delta, double scale, const std::vector<bool>& needs_input_grad) {
  const CrissCrossSizes sizes = check_criss_cross_part_backward(
      given_grad_output, given_query, given_key, given_value, logsumexp, logsumexp_low, delta, scale, needs_input_grad,
      op);
  const Tensor converted = in_accumulation_dtype(given_query);
  LaunchContext context(op, converted);
  context.arithmetic = arithmetic_of_part(context, given_query);
  const Tensor grad_output = with_short_strides(context, "grad_output", in_accumulation_dtype(given_grad_output));
  const Tensor query = with_short_strides(context, "query", converted);
  const Tensor key = with_short_strides(context, "key", in_accumulation_dtype(given_key));
  const Tensor value = with_short_strides(context, "value", in_accumulation_dtype(given_value));
  const Call call{context, sizes, direction};
  const bool needs_query = needs_input_grad[0], needs_key = needs_input_grad[1], needs_value = needs_input_grad[2];
  Tensor grad_query = allocate_gradient(query, needs_query), grad_key = allocate_gradient(key, needs_key);
  Tensor grad_value = allocate_gradient(value, needs_value);
  if (sizes.batch == 0 || !(needs_query || needs_key || needs_value)) {
    return {grad_query, grad_key, grad_value};
  }
  if (has_no_keys(sizes, direction)) {
    torch::stable::zero_(grad_query);
    torch::stable::zero_(grad_key);
    torch::stable::zero_(grad_value);
    return {grad_query, grad_key, grad_value};
  }
  const Tensor logsumexp_value = logsumexp_of_weights(call, logsumexp);
  const std::optional<Tensor> logsumexp_error = as_contiguous(logsumexp_low), given_delta = delta;
  std::optional<Tensor> grad_sum;
  if (needs_query) {
    grad_sum = allocate_like(logsumexp_value);  // which only the correction by mean keys reads
  }
  differentiate(
      call,
      {grad_output, query, key, value, logsumexp_value, logsumexp_error, given_delta, grad_sum, std::nullopt,
       grad_query, grad_key, grad_value, needs_query, needs_key, needs_value, scale});
  return {grad_query, grad_key, grad_value};
}

Triple criss_cross_rows(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  return attend_to_part("criss_cross_rows", Direction::kRows, query, key, value, scale);
}
Triple criss_cross_columns(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  return attend_to_part("criss_cross_columns", Direction::kColumns, query, key, value, scale);
}

Triple criss_cross_rows_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& logsumexp,
    const Tensor& logsumexp_low, const Tensor& delta, double scale, const std::vector<bool>& needs_input_grad) {
  return differentiate_part(
      "criss_cross_rows_backward", Direction::kRows, grad_output, query, key, value, logsumexp, logsumexp_low, delta,
      scale, needs_input_grad);
}
Triple criss_cross_columns_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& logsumexp,
    const Tensor& logsumexp_low, const Tensor& delta, double scale, const std::vector<bool>& needs_input_grad) {
  return differentiate_part(
      "criss_cross_columns_backward", Direction::kColumns, grad_output, query, key, value, logsumexp, logsumexp_low,
      delta, scale, needs_input_grad);
}

}  // namespace
}  // namespace segattn::cuda

SEGATTN_REGISTER_CUDA(m) {
  m.impl("criss_cross_affinity", TORCH_BOX(&segattn::cuda::criss_cross_affinity));
  m.impl("criss_cross_affinity_backward", TORCH_BOX(&segattn::cuda::criss_cross_affinity_backward));
  m.impl("criss_cross_aggregation", TORCH_BOX(&segattn::cuda::criss_cross_aggregation));
  m.impl("criss_cross_aggregation_backward", TORCH_BOX(&segattn::cuda::criss_cross_aggregation_backward));
  m.impl("criss_cross_attention", TORCH_BOX(&segattn::cuda::criss_cross_attention));
  m.impl("criss_cross_attention_backward", TORCH_BOX(&segattn::cuda::criss_cross_attention_backward));
  m.impl("criss_cross_rows", TORCH_BOX(&segattn::cuda::criss_cross_rows));
  m.impl("criss_cross_rows_backward", TORCH_BOX(&segattn::cuda::criss_cross_rows_backward));
  m.impl("criss_cross_columns", TORCH_BOX(&segattn::cuda::criss_cross_columns));
  m.impl("criss_cross_columns_backward", TORCH_BOX(&segattn::cuda::criss_cross_columns_backward));
}
