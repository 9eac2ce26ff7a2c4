// Criss-cross attention on CUDA, host side: checks, allocates, launches.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "checks/criss_cross.h"
#include "cuda/common/operands.h"
#include "cuda/criss_cross/correction.cuh"
#include "cuda/criss_cross/launch.h"
#include "cuda/criss_cross/line_mma.cuh"
#include "cuda/position/rows.cuh"
#include "registration.h"

namespace segattn::cuda {
namespace {

using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;

// tensor (B, channels, H, W) as rows or as columns
LineFeatures features(const Tensor& tensor, bool columns) {
  LineFeatures f{
      const_cast<void*>(tensor.const_data_ptr()),
      tensor.stride(0),
      tensor.stride(1),
      tensor.stride(columns ? 3 : 2),
      tensor.stride(columns ? 2 : 3),
      static_cast<int>(tensor.size(1)),
      0};
  f.paired = f.line_stride == 1 && tensor.size(columns ? 3 : 2) % 2 == 0 && f.position_stride % 2 == 0 &&
      f.channel_stride % 2 == 0 && f.batch_stride % 2 == 0 && reinterpret_cast<uintptr_t>(f.data) % 4 == 0;
  return f;
}

// tensor (B, H + W - 1, H, W)
LineMap map_of(const Tensor& tensor, bool columns) {
  const LineFeatures f = features(tensor, columns);
  return {f.data,        f.batch_stride,    f.channel_stride,
          f.line_stride, f.position_stride, columns ? static_cast<int>(tensor.size(3)) : 0};
}

// tensor (B, H, W)
LineScalars scalars(const Tensor& tensor, bool columns) {
  return {
      const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(columns ? 2 : 1),
      tensor.stride(columns ? 1 : 2)};
}

Lines lines_of(const CrissCrossSizes& sizes, bool columns) {
  Lines lines{};
  lines.batch = sizes.batch;
  lines.count = static_cast<int>(columns ? sizes.width : sizes.height);
  lines.length = static_cast<int>(columns ? sizes.height : sizes.width);
  lines.skips_self = columns;
  return lines;
}

// visit.operator()<Arithmetic>()
template <class Visit>
void with_line_arithmetic(ScalarType dtype, const DeviceLimits& limits, const Visit& visit) {
  switch (choose_arithmetic(dtype, limits)) {
    case Arithmetic::kFloat16:
      return visit.template operator()<LineMma16<__half>>();
    case Arithmetic::kBfloat16:
      return visit.template operator()<LineMma16<__nv_bfloat16>>();
    case Arithmetic::kTf32:
      return visit.template operator()<LineTf32<1>>();
    case Arithmetic::k3xTf32:
      return visit.template operator()<LineTf32<3>>();
    case Arithmetic::kSimt:
      return with_element(dtype, [&]<class T>() { visit.template operator()<LineSimt<T>>(); });
  }
}

// What a call needs wherever it launches. Columns come first, rows add to them: a strip of 8 columns touches up to twice
// and three times the bytes it needs in sectors, a row hardly any more, and the second direction reads and writes the
// result again. An image of one row has no columns, which would hold but the query itself.
struct Call {
  const CrissCrossSizes& sizes;
  ScalarType dtype;
  DeviceGuard guard;
  DeviceLimits limits;
  cudaStream_t stream;

  Call(const CrissCrossSizes& sizes_, const Tensor& like)
      : sizes(sizes_), dtype(like.scalar_type()), guard(like), limits(device_limits()), stream(current_stream(like)) {}

  template <class Visit>
  void columns_then_rows(const Visit& visit) const {
    if (sizes.batch == 0) {
      return;
    }
    if (has_columns()) {
      visit(true);
    }
    visit(false);
  }
  bool has_columns() const { return sizes.height > 1; }
  // whether a direction finds the other's result
  bool is_second(bool columns) const { return !columns && has_columns(); }

  void product(const Tensor& query_side, const Tensor& key_side, const Tensor& map) const {
    columns_then_rows([&](bool columns) {
      LineProductParams params{};
      params.lines = lines_of(sizes, columns);
      params.query_side = features(query_side, columns);
      params.key_side = features(key_side, columns);
      params.map = map_of(map, columns);
      with_line_arithmetic(
          dtype, limits, [&]<class Arithmetic>() { launch_line_product<Arithmetic>(params, limits, stream); });
    });
  }

  template <LineWeight kWeight, bool kOwnsKeys>
  void sum(LineSumParams params, const Tensor& values, const Tensor& output, bool columns) const {
    params.lines = lines_of(sizes, columns);
    params.values = features(values, columns);
    params.output = features(output, columns);
    params.accumulate = is_second(columns);
    with_line_arithmetic(dtype, limits, [&]<class Arithmetic>() {
      launch_line_sum<Arithmetic, kWeight, kOwnsKeys>(params, limits, stream);
    });
  }

  template <bool kOwnsKeys>
  void sum_given(const Tensor& map, const Tensor& values, const Tensor& output) const {
    columns_then_rows([&](bool columns) {
      LineSumParams params{};
      params.map = map_of(map, columns);
      sum<LineWeight::kGiven, kOwnsKeys>(params, values, output, columns);
    });
  }
};

Tensor criss_cross_affinity(const Tensor& query, const Tensor& key) {
  const CrissCrossSizes sizes = check_criss_cross_affinity(query, key);
  const Call call(sizes, query);
  const Tensor affinity = allocate(query, {sizes.batch, sizes.reach(), sizes.height, sizes.width}, query.scalar_type());
  call.product(query, key, affinity);
  return affinity;
}

Pair criss_cross_affinity_backward(const Tensor& grad_affinity, const Tensor& query, const Tensor& key) {
  const CrissCrossSizes sizes = check_criss_cross_affinity_backward(grad_affinity, query, key);
  const Call call(sizes, query);
  const Tensor grad_query = allocate_like(query), grad_key = allocate_like(key);
  call.sum_given<false>(grad_affinity, key, grad_query);
  call.sum_given<true>(grad_affinity, query, grad_key);
  return {grad_query, grad_key};
}

Tensor criss_cross_aggregation(const Tensor& attention, const Tensor& value) {
  const CrissCrossSizes sizes = check_criss_cross_aggregation(attention, value);
  const Call call(sizes, value);
  const Tensor output = allocate_like(value);
  call.sum_given<false>(attention, value, output);
  return output;
}

Pair criss_cross_aggregation_backward(const Tensor& grad_output, const Tensor& attention, const Tensor& value) {
  const CrissCrossSizes sizes = check_criss_cross_aggregation_backward(grad_output, attention, value);
  const Call call(sizes, value);
  const Tensor grad_attention = allocate_like(attention), grad_value = allocate_like(value);
  call.product(grad_output, value, grad_attention);
  call.sum_given<true>(attention, grad_output, grad_value);
  return {grad_attention, grad_value};
}

// Whether a query's weights for its whole column, and for its whole row, fit shared memory.
bool fits_in_one_kernel(const Call& call, const Tensor& output) {
  bool fits = true;
  call.columns_then_rows([&](bool columns) {
    with_line_arithmetic(call.dtype, call.limits, [&]<class Arithmetic>() {
      fits &= line_attention_fits<Arithmetic>(lines_of(call.sizes, columns), features(output, columns), call.limits);
    });
  });
  return fits;
}

// Each direction in one kernel. Blocks that share a line's queries all read the columns' log-sum-exp, hence the memory
// of its own.
void attend(
    const Call& call, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& logsumexp, double scale) {
  const Tensor of_columns = call.has_columns() ? allocate_like(logsumexp) : logsumexp;
  call.columns_then_rows([&](bool columns) {
    LineAttentionParams params{};
    params.lines = lines_of(call.sizes, columns);
    params.query = features(query, columns);
    params.key = features(key, columns);
    params.values = features(value, columns);
    params.output = features(output, columns);
    params.logsumexp = scalars(columns ? of_columns : logsumexp, columns);
    params.other = scalars(of_columns, columns);
    params.scale = scale;
    params.accumulate = call.is_second(columns);
    with_line_arithmetic(call.dtype, call.limits, [&]<class Arithmetic>() {
      launch_line_attention<Arithmetic>(params, call.limits, call.stream);
    });
  });
}

// Long lines: the log-sum-exp of both directions first, then sums by weights that are final.
void attend_in_parts(
    const Call& call, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& logsumexp, double scale) {
  call.columns_then_rows([&](bool columns) {
    LineStatisticsParams params{};
    params.lines = lines_of(call.sizes, columns);
    params.query = features(query, columns);
    params.key = features(key, columns);
    params.logsumexp = scalars(logsumexp, columns);
    params.scale = scale;
    params.merges = call.is_second(columns);
    with_line_arithmetic(call.dtype, call.limits, [&]<class Arithmetic>() {
      launch_line_statistics<Arithmetic>(params, call.limits, call.stream);
    });
  });
  call.columns_then_rows([&](bool columns) {
    LineSumParams params{};
    params.query = features(query, columns);
    params.key = features(key, columns);
    params.logsumexp = scalars(logsumexp, columns);
    params.scale = scale;
    call.sum<LineWeight::kSoftmax, false>(params, value, output, columns);
  });
}

Pair criss_cross_attention(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  const CrissCrossSizes sizes = check_criss_cross_attention(query, key, value, scale);
  const Call call(sizes, query);
  const Tensor output = allocate_like(value);
  const Tensor logsumexp =
      allocate(query, {sizes.batch, sizes.height, sizes.width}, accumulation_dtype(query.scalar_type()));
  if (fits_in_one_kernel(call, output)) {
    attend(call, query, key, value, output, logsumexp, scale);
  } else {
    attend_in_parts(call, query, key, value, output, logsumexp, scale);
  }
  return {output, logsumexp};
}

// (B, H, W): sum_c grad_output output
Tensor delta_of(const Tensor& grad_output, const Tensor& output, const CrissCrossSizes& sizes, cudaStream_t stream) {
  const FeatureMap grad = feature_map(grad_output), out = feature_map(output);
  const Tensor delta =
      allocate(output, {sizes.batch, sizes.height, sizes.width}, accumulation_dtype(output.scalar_type()));
  DeltaParams params{};
  params.grad_output = grad.operand;
  params.output = out.operand;
  params.delta = delta.mutable_data_ptr();
  params.channels = static_cast<int>(sizes.value_channels);
  params.positions = position_count("criss_cross_attention_backward", "output", sizes.height * sizes.width);
  params.position_blocks = (params.positions + 31) / 32;
  const int64_t blocks = sizes.batch * params.position_blocks;
  with_element(output.scalar_type(), [&]<class T>() {
    SEGATTN_LAUNCH((delta_kernel<T>), dim3(grid_blocks(blocks)), dim3(kRowThreads), 0, stream, params);
  });
  return delta;
}

// grad_query -= grad_sum mean_key
void correct_query_gradient(
    const Tensor& grad_query, const Tensor& mean_key, const Tensor& grad_sum, const CrissCrossSizes& sizes,
    cudaStream_t stream) {
  QueryCorrectionParams params;
  params.grad_query = grad_query.mutable_data_ptr();
  params.mean_key = mean_key.const_data_ptr();
  params.grad_sum = grad_sum.const_data_ptr();
  params.positions = sizes.height * sizes.width;
  params.channels = static_cast<int>(sizes.key_channels);
  params.position_blocks = static_cast<int>((params.positions + kCorrectionThreads - 1) / kCorrectionThreads);
  params.channel_blocks = (params.channels + kCorrectionChannels - 1) / kCorrectionChannels;
  const int64_t blocks = sizes.batch * params.position_blocks * params.channel_blocks;
  with_element(grad_query.scalar_type(), [&]<class T>() {
    SEGATTN_LAUNCH(
        (correct_query_gradient_kernel<T>), dim3(grid_blocks(blocks)), dim3(kCorrectionThreads), 0, stream, params);
  });
}

Triple criss_cross_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& logsumexp, double scale) {
  const CrissCrossSizes sizes =
      check_criss_cross_attention_backward(grad_output, query, key, value, output, logsumexp, scale);
  const Call call(sizes, query);
  const Tensor grad_query = allocate_like(query), grad_key = allocate_like(key), grad_value = allocate_like(value);
  if (sizes.batch == 0) {
    return {grad_query, grad_key, grad_value};
  }
  const Tensor delta = delta_of(grad_output, output, sizes, call.stream);
  const Tensor grad_sum = allocate_like(delta), mean_key = allocate_like(key);
  call.columns_then_rows([&](bool columns) {
    LineBackwardParams params{};
    params.lines = lines_of(sizes, columns);
    params.query = features(query, columns);
    params.key = features(key, columns);
    params.grad_output = features(grad_output, columns);
    params.value = features(value, columns);
    params.logsumexp = scalars(logsumexp, columns);
    params.delta = scalars(delta, columns);
    params.grad_sum = scalars(grad_sum, columns);
    params.scale = scale;
    params.accumulate = call.is_second(columns);
    params.grad_query = features(grad_query, columns);
    params.grad_key = features(grad_key, columns);
    params.grad_value = features(grad_value, columns);
    // in a launch of its own: another sum in line_backward_kernel spills registers
    call.sum<LineWeight::kSoftmax, false>(params, key, mean_key, columns);
    bool launched = false;
    with_line_arithmetic(call.dtype, call.limits, [&]<class Arithmetic>() {
      launched = launch_line_backward<Arithmetic>(params, call.limits, call.stream);
    });
    if (launched) {
      return;
    }
    call.sum<LineWeight::kSoftmax, true>(params, grad_output, grad_value, columns);
    call.sum<LineWeight::kGradient, false>(params, key, grad_query, columns);
    call.sum<LineWeight::kGradient, true>(params, query, grad_key, columns);
  });
  correct_query_gradient(grad_query, mean_key, grad_sum, sizes, call.stream);
  return {grad_query, grad_key, grad_value};
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
}
