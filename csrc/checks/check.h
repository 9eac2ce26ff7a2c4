// The rules by which the ops check their arguments. A violation throws std::runtime_error (RuntimeError in Python) that
// names op, argument, rule and actual value. segattn_ops/ops/_check.py has the same rules and messages.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace segattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Argument {
  std::string_view name;
  const Tensor& tensor;
};

// Not STD_TORCH_CHECK, which puts this source location before the message.
template <typename... Parts>
[[noreturn]] void fail(std::string_view op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The name in Python. PyTorch does not hand tensors of the other dtypes, of quantized ones for example, to extensions.
inline std::string_view name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::UInt16:
      return "uint16";
    case ScalarType::UInt32:
      return "uint32";
    case ScalarType::UInt64:
      return "uint64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2fnuz:
      return "float8_e5m2fnuz";
    case ScalarType::Float8_e4m3fnuz:
      return "float8_e4m3fnuz";
    default:
      return "another dtype";
  }
}

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float ||
      dtype == ScalarType::Double;
}

inline bool is_16_bit(ScalarType dtype) {
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

// The dtype of accumulation and of logsumexp: float64 for float64 inputs, else float32.
inline ScalarType accumulation_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::string name_of(const torch::stable::Device& device) {
  std::string name = device.is_cpu() ? "cpu" : device.is_cuda() ? "cuda" : "another device";
  return device.is_cpu() || !device.has_index() ? name : name + ":" + std::to_string(device.index());
}

// The sizes from dimension `first` on, as "[97, 97]"
inline std::string shape_of(const Tensor& tensor, int64_t first = 0) {
  std::string text = "[";
  for (int64_t d = first; d < tensor.dim(); ++d) {
    text += (d > first ? ", " : "") + std::to_string(tensor.size(d));
  }
  return text + "]";
}

inline bool same_shape(const Tensor& one, const Tensor& other, int64_t first = 0) {
  const auto sizes = one.sizes(), others = other.sizes();
  return sizes.size() == others.size() && std::equal(sizes.begin() + first, sizes.end(), others.begin() + first);
}

// The product of the sizes from dimension `first` on: by default the number of positions of a feature map
inline int64_t positions_of(const Tensor& tensor, int64_t first = 2) {
  int64_t positions = 1;
  for (int64_t d = first; d < tensor.dim(); ++d) {
    positions *= tensor.size(d);
  }
  return positions;
}

inline void check_dtype(std::string_view op, const Argument& argument) {
  if (!is_supported(argument.tensor.scalar_type())) {
    fail(
        op, argument.name, " must be float16, bfloat16, float32 or float64 (got ",
        name_of(argument.tensor.scalar_type()), ")");
  }
}

inline void check_same_device(std::string_view op, const Argument& argument, const Argument& like) {
  if (argument.tensor.device() != like.tensor.device()) {
    fail(
        op, argument.name, " must be on device ", name_of(like.tensor.device()), " like ", like.name, " (got ",
        name_of(argument.tensor.device()), ")");
  }
}

inline void check_dtype_is(
    std::string_view op, const Argument& argument, ScalarType expected, std::string_view reason) {
  if (argument.tensor.scalar_type() != expected) {
    fail(
        op, argument.name, " must be ", name_of(expected), " ", reason, " (got ",
        name_of(argument.tensor.scalar_type()), ")");
  }
}

inline void check_like(std::string_view op, const Argument& argument, const Argument& like) {
  check_same_device(op, argument, like);
  if (argument.tensor.scalar_type() != like.tensor.scalar_type()) {
    fail(
        op, argument.name, " must be ", name_of(like.tensor.scalar_type()), " like ", like.name, " (got ",
        name_of(argument.tensor.scalar_type()), ")");
  }
}

// (batch, channels, *spatial) with at least one spatial dimension
inline void check_feature_map(std::string_view op, const Argument& argument) {
  if (argument.tensor.dim() < 3) {
    fail(
        op, argument.name, " must have at least 3 dimensions, (batch, channels, *spatial) (got shape ",
        shape_of(argument.tensor), ")");
  }
}

// (batch, channels, height, width), height and width at least 1
inline void check_image(std::string_view op, const Argument& argument) {
  if (argument.tensor.dim() != 4) {
    fail(
        op, argument.name, " must have 4 dimensions, (batch, channels, height, width) (got shape ",
        shape_of(argument.tensor), ")");
  }
  if (argument.tensor.size(2) < 1 || argument.tensor.size(3) < 1) {
    fail(
        op, argument.name, " must have a height and a width of at least 1 (got shape ", shape_of(argument.tensor), ")");
  }
}

inline void check_has_channels(std::string_view op, const Argument& argument) {
  if (argument.tensor.size(1) < 1) {
    fail(op, argument.name, " must have at least 1 channel (got shape ", shape_of(argument.tensor), ")");
  }
}

inline void check_has_positions(std::string_view op, const Argument& argument) {
  if (positions_of(argument.tensor) < 1) {
    fail(op, argument.name, " must have at least 1 position (got shape ", shape_of(argument.tensor), ")");
  }
}

inline void check_batch(std::string_view op, const Argument& argument, const Argument& like) {
  if (argument.tensor.size(0) != like.tensor.size(0)) {
    fail(
        op, argument.name, " must have batch size ", like.tensor.size(0), " like ", like.name, " (got ",
        argument.tensor.size(0), ")");
  }
}

inline void check_channels(std::string_view op, const Argument& argument, const Argument& like) {
  if (argument.tensor.size(1) != like.tensor.size(1)) {
    fail(
        op, argument.name, " must have ", like.tensor.size(1), " channels like ", like.name, " (got ",
        argument.tensor.size(1), ")");
  }
}

inline void check_spatial(std::string_view op, const Argument& argument, const Argument& like) {
  if (!same_shape(argument.tensor, like.tensor, 2)) {
    fail(
        op, argument.name, " must have spatial size ", shape_of(like.tensor, 2), " like ", like.name, " (got ",
        shape_of(argument.tensor, 2), ")");
  }
}

// All sizes, as opposed to those of check_batch, check_channels, check_spatial.
inline void check_shape(std::string_view op, const Argument& argument, const Argument& like) {
  if (!same_shape(argument.tensor, like.tensor)) {
    fail(
        op, argument.name, " must have shape ", shape_of(like.tensor), " like ", like.name, " (got ",
        shape_of(argument.tensor), ")");
  }
}

inline void check_shape_is(std::string_view op, const Argument& argument, const std::string& expected) {
  if (shape_of(argument.tensor) != expected) {
    fail(op, argument.name, " must have shape ", expected, " (got ", shape_of(argument.tensor), ")");
  }
}

// One entry for each gradient of the backward `op`
inline void check_needs_input_grad(
    std::string_view op, const std::vector<bool>& needs_input_grad, std::size_t gradients) {
  if (needs_input_grad.size() != gradients) {
    fail(op, "needs_input_grad must have ", gradients, " entries (got ", needs_input_grad.size(), ")");
  }
}

inline void check_scale(std::string_view op, double scale) {
  if (!std::isfinite(scale)) {
    fail(op, "scale must be finite (got ", scale, ")");
  }
}

}  // namespace segattn
