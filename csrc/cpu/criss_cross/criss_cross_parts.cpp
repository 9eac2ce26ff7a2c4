// The rows and the columns of criss-cross attention alone on the CPU: checks, outputs, dtype dispatch, registration.
#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/common/dispatch.h"
#include "cpu/common/parallel.h"
#include "cpu/common/tensors.h"
#include "cpu/criss_cross/backward.h"
#include "cpu/criss_cross/forward.h"
#include "registration.h"

namespace segattn::cpu {

namespace {

// query (B, E, H, W), key (B, E, H, W), value (B, C, H, W)
// -> output (B, C, H, W), logsumexp (B, H, W), logsumexp_low (B, H, W) in the dtype of accumulation
template <Keys kKeys>
std::tuple<Tensor, Tensor, Tensor> attend_to_part(
    const char* op, Tensor query, Tensor key, Tensor value, double scale) {
  const CrissCrossSizes sizes = check_criss_cross_attention(query, key, value, scale, op);
  make_contiguous(query, key, value);
  Tensor output = new_tensor(value.sizes(), accumulation_dtype(value.scalar_type()));
  Tensor logsumexp = new_position_statistics(query);
  Tensor logsumexp_low = new_position_statistics(query);
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    if (kKeys == Keys::kColumn && sizes.height == 1) {  // no keys
      std::fill_n(mutable_data<A>(output), output.numel(), A(0));
      std::fill_n(mutable_data<A>(logsumexp), logsumexp.numel(), -std::numeric_limits<A>::infinity());
      std::fill_n(mutable_data<A>(logsumexp_low), logsumexp_low.numel(), A(0));
      return;
    }
    const CrissCrossForwardArguments<T, A> arguments{
        .query = data<T>(query),
        .key = data<T>(key),
        .value = data<T>(value),
        .output = mutable_data<A>(output),
        .logsumexp = mutable_data<A>(logsumexp),
        .logsumexp_low = mutable_data<A>(logsumexp_low),
        .sizes = sizes,
        .scale = static_cast<A>(scale)};
    CrissCrossForward<T, A, kKeys>(arguments).run();
  });
  return {output, logsumexp, logsumexp_low};
}

// The gradient of an input in the dtype of accumulation, (0,) if it is not wanted.
Tensor new_part_gradient(const Tensor& input, bool wanted) {
  const ScalarType dtype = accumulation_dtype(input.scalar_type());
  return wanted ? new_tensor(input.sizes(), dtype) : new_tensor({0}, dtype);
}

// grad_output (B, C, H, W), query (B, E, H, W), key (B, E, H, W), value (B, C, H, W), logsumexp (B, H, W),
// logsumexp_low (B, H, W), delta (B, H, W) -> grad_query, grad_key, grad_value in the dtype of accumulation
template <Keys kKeys>
std::tuple<Tensor, Tensor, Tensor> differentiate_part(
    const char* op, Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor logsumexp, Tensor logsumexp_low,
    Tensor delta, double scale, const std::vector<bool>& needs_input_grad) {
  const CrissCrossSizes sizes = check_criss_cross_part_backward(
      grad_output, query, key, value, logsumexp, logsumexp_low, delta, scale, needs_input_grad, op);
  Tensor grad_query = new_part_gradient(query, needs_input_grad[0]);
  Tensor grad_key = new_part_gradient(key, needs_input_grad[1]);
  Tensor grad_value = new_part_gradient(value, needs_input_grad[2]);
  if (!is_any_wanted(needs_input_grad)) {
    return {grad_query, grad_key, grad_value};
  }
  make_contiguous(grad_output, query, key, value, logsumexp, logsumexp_low, delta);
  const SerialIfSmall serial(multiply_adds(sizes));
  dispatch_dtype(query.scalar_type(), [&]<class T>() {
    using A = AccumulatorOf<T>;
    if (kKeys == Keys::kColumn && sizes.height == 1) {  // no keys
      for (const Tensor* gradient : {&grad_query, &grad_key, &grad_value}) {
        std::fill_n(mutable_data<A>(*gradient), gradient->numel(), A(0));
      }
      return;
    }
    // Of queries without keys, or with energies of -inf alone: exp(-inf - inf) is 0, exp(-inf - -inf) is NaN.
    const Buffer<A> logsumexp_of_weights(logsumexp.numel());
    const A infinity = std::numeric_limits<A>::infinity();
    std::replace_copy(
        data<A>(logsumexp), data<A>(logsumexp) + logsumexp.numel(), logsumexp_of_weights.data(), -infinity, infinity);
    const CrissCrossBackwardArguments<T, A> arguments{
        .grad_output = data<T>(grad_output),
        .query = data<T>(query),
        .key = data<T>(key),
        .value = data<T>(value),
        .output = nullptr,
        .logsumexp = logsumexp_of_weights.data(),
        .logsumexp_low = data<A>(logsumexp_low),
        .grad_logsumexp = nullptr,
        .delta = data<A>(delta),
        .grad_query = gradient_data<A>(grad_query, needs_input_grad[0]),
        .grad_key = gradient_data<A>(grad_key, needs_input_grad[1]),
        .grad_value = gradient_data<A>(grad_value, needs_input_grad[2]),
        .sizes = sizes,
        .scale = static_cast<A>(scale),
        .keys_complete = false};
    CrissCrossBackward<T, A, kKeys>(arguments).run();
  });
  return {grad_query, grad_key, grad_value};
}

// query (B, E, H, W), key (B, E, H, W), value (B, C, H, W)
std::tuple<Tensor, Tensor, Tensor> criss_cross_rows(Tensor query, Tensor key, Tensor value, double scale) {
  return attend_to_part<Keys::kRow>("criss_cross_rows", query, key, value, scale);
}
std::tuple<Tensor, Tensor, Tensor> criss_cross_columns(Tensor query, Tensor key, Tensor value, double scale) {
  return attend_to_part<Keys::kColumn>("criss_cross_columns", query, key, value, scale);
}

// As of differentiate_part.
std::tuple<Tensor, Tensor, Tensor> criss_cross_rows_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor logsumexp, Tensor logsumexp_low, Tensor delta,
    double scale, std::vector<bool> needs_input_grad) {
  return differentiate_part<Keys::kRow>(
      "criss_cross_rows_backward", grad_output, query, key, value, logsumexp, logsumexp_low, delta, scale,
      needs_input_grad);
}
std::tuple<Tensor, Tensor, Tensor> criss_cross_columns_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor logsumexp, Tensor logsumexp_low, Tensor delta,
    double scale, std::vector<bool> needs_input_grad) {
  return differentiate_part<Keys::kColumn>(
      "criss_cross_columns_backward", grad_output, query, key, value, logsumexp, logsumexp_low, delta, scale,
      needs_input_grad);
}

}  // namespace

SEGATTN_REGISTER_CPU(m) {
  m.impl("criss_cross_rows", TORCH_BOX(&criss_cross_rows));
  m.impl("criss_cross_rows_backward", TORCH_BOX(&criss_cross_rows_backward));
  m.impl("criss_cross_columns", TORCH_BOX(&criss_cross_columns));
  m.impl("criss_cross_columns_backward", TORCH_BOX(&criss_cross_columns_backward));
}

}  // namespace segattn::cpu
