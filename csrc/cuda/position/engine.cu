#include <atomic>
#include <optional>
#include <string>

#include <torch/csrc/stable/library.h>

#include "cuda/position/engine.h"
#include "registration.h"

namespace segattn::cuda {
namespace {

using Forced = std::optional<PositionEngine>;

std::atomic<Forced> forced_engine{Forced{}};

constexpr PositionEngine kEngines[] = {PositionEngine::kSimt, PositionEngine::kMma, PositionEngine::kWgmma};

const char* name_of(PositionEngine engine) {
  return engine == PositionEngine::kSimt ? "simt" : engine == PositionEngine::kMma ? "mma" : "wgmma";
}

void set_position_engine(const std::string& name) {
  Forced forced;
  for (const PositionEngine engine : kEngines) {
    if (name == name_of(engine)) {
      forced = engine;
    }
  }
  if (!forced.has_value() && name != "auto") {
    fail("_set_position_engine", "name must be one of auto, wgmma, mma, simt (got ", name, ")");
  }
  forced_engine.store(forced, std::memory_order_relaxed);
}

bool is_16_bit(const LaunchContext& context) {
  return context.dtype == ScalarType::Half || context.dtype == ScalarType::BFloat16;
}

bool has_mma(const LaunchContext& context) {
  return context.limits.architecture >= 80;
}

bool has_wgmma(const LaunchContext& context) {
  return context.limits.device_architecture == 90 && has_sm90a_code();
}

template <class... Parts>
[[noreturn]] void refuse(const LaunchContext& context, PositionEngine engine, const Parts&... why) {
  fail(
      context.op, "the engine \"", name_of(engine),
      "\", which SEGATTN_CUDA_POSITION or a caller forces, cannot serve: ", why...);
}

PositionEngine forced_mma(const LaunchContext& context) {
  if (!has_mma(context)) {
    refuse(
        context, PositionEngine::kMma, "it needs code for sm_80 or later, and the code for this device is for sm_",
        context.limits.architecture);
  }
  return PositionEngine::kMma;
}

PositionEngine forced_wgmma(const LaunchContext& context, int64_t key_channels) {
  constexpr PositionEngine kEngine = PositionEngine::kWgmma;
  if (context.limits.device_architecture != 90) {
    refuse(context, kEngine, "it needs sm_90, and this device is sm_", context.limits.device_architecture);
  }
  if (!has_sm90a_code()) {
    refuse(
        context, kEngine,
        "the library was built without code for sm_90a; build it with TORCH_CUDA_ARCH_LIST=\"9.0\" pip install "
        "--no-build-isolation . in the source tree");
  }
  if (key_channels > kWgmmaMostKeyChannels) {
    refuse(context, kEngine, "query must have at most ", kWgmmaMostKeyChannels, " channels (got ", key_channels, ")");
  }
  return kEngine;
}

std::string position_engine(const Tensor& query) {
  return name_of(choose_position_engine(LaunchContext("_position_engine", query), query.size(1)));
}

}  // namespace

PositionEngine choose_position_engine(const LaunchContext& context, int64_t key_channels) {
  if (context.dtype == ScalarType::Double) {
    return PositionEngine::kSimt;
  }
  if (const Forced forced = forced_engine.load(std::memory_order_relaxed)) {
    switch (*forced) {
      case PositionEngine::kSimt:
        return PositionEngine::kSimt;
      case PositionEngine::kMma:
        return forced_mma(context);
      case PositionEngine::kWgmma:
        return is_16_bit(context) ? forced_wgmma(context, key_channels) : forced_mma(context);
    }
  }
  if (is_16_bit(context) && has_wgmma(context) && key_channels <= kWgmmaMostKeyChannels) {
    return PositionEngine::kWgmma;
  }
  return has_mma(context) ? PositionEngine::kMma : PositionEngine::kSimt;
}

void check_simt_may_serve(const LaunchContext& context, int64_t key_channels) {
  const PositionEngine engine = choose_position_engine(context, key_channels);
  if (engine != PositionEngine::kSimt && forced_engine.load(std::memory_order_relaxed)) {
    refuse(context, engine, "no tile of it has room for ", key_channels, " channels of query and key");
  }
}

}  // namespace segattn::cuda

// SEGATTN_CUDA_POSITION is read in Python (segattn_ops/_position_engine.py), as all variables are.
STABLE_TORCH_LIBRARY_FRAGMENT(SEGATTN_NAMESPACE, m) {
  // name: of a PositionEngine, which all later calls of position attention use; "auto": choose_position_engine chooses.
  m.def("_set_position_engine(str name) -> ()");
  // The engine that serves position attention for a query (B, E, *S).
  m.def("_position_engine(Tensor query) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(SEGATTN_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("_set_position_engine", TORCH_BOX(&segattn::cuda::set_position_engine));
}

SEGATTN_REGISTER_CUDA(m) {
  m.impl("_position_engine", TORCH_BOX(&segattn::cuda::position_engine));
}
