// Host side of the forward pass of position attention: weighted_sum.cuh, on Hopper wgmma/weighted_sum.cuh, then
// merge_splits.cuh for split tiles. float64, and shapes that no tensor-core tile fits, run on simt.cuh.
#pragma once

#include <cmath>
#include <limits>
#include <numbers>

#include "checks/position.h"
#include "cuda/common/aligned.h"
#include "cuda/common/launch_context.h"
#include "cuda/common/math.h"
#include "cuda/common/operands.h"
#include "cuda/common/tensor_map.h"
#include "cuda/position/engine.h"
#include "cuda/position/launch.h"
#include "cuda/position/merge_splits.cuh"
#include "cuda/position/plan.cuh"
#include "cuda/position/wgmma/launch.h"
#include "cuda/position/wgmma/weighted_sum_plan.h"

namespace segattn::cuda {

struct ForwardCall {
  const LaunchContext& context;
  PositionSizes sizes;
  double scale;
  FeatureMap query;       // (B, E, *S)
  FeatureMap key;         // (B, E, *T)
  FeatureMap value;       // (B, C, *T)
  Tensor output;          // (B, C, *S); with is_part in the dtype of accumulation
  Tensor output_low;      // (B, C, *S), rounding error of the output; (B, 0, *S) if not wanted
  Tensor logsumexp;       // (B, *S), dtype of accumulation
  Tensor logsumexp_low;   // (B, *S), rounding error of the logsumexp; (B, 0) if not wanted
  const int* key_counts;  // (B): only the first of the keys take part; null: all
  bool is_part;           // of the keys: a query whose energies are all -inf has the output 0, not NaN

  void* output_low_data() const { return output_low.size(1) > 0 ? output_low.mutable_data_ptr() : nullptr; }
  void* logsumexp_low_data() const { return logsumexp_low.size(1) > 0 ? logsumexp_low.mutable_data_ptr() : nullptr; }
};

// visit.operator()<Keys>()
template <class Visit>
void with_keys(const int* key_counts, const Visit& visit) {
  if (key_counts != nullptr) {
    visit.template operator()<Keys::kKept>();
  } else {
    visit.template operator()<Keys::kAll>();
  }
}

inline float* float_data(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

enum class Owned { kQueries, kKeys };

inline SimtParams simt_params(const PositionSizes& sizes, double scale, Owned owned) {
  SimtParams params{};
  params.batch = sizes.batch;
  params.owned_positions = static_cast<int>(owned == Owned::kQueries ? sizes.queries : sizes.keys);
  params.streamed_positions = static_cast<int>(owned == Owned::kQueries ? sizes.keys : sizes.queries);
  params.key_channels = static_cast<int>(sizes.key_channels);
  params.value_channels = static_cast<int>(sizes.value_channels);
  params.scale = scale;
  return params;
}

inline void forward_simt(const ForwardCall& call) {
  SimtParams params = simt_params(call.sizes, call.scale, Owned::kQueries);
  params.owned = call.query.operand;
  params.streamed = call.key.operand;
  params.values = call.value.operand;
  params.output = call.output.mutable_data_ptr();
  params.output_low = call.output_low_data();
  params.logsumexp = call.logsumexp.mutable_data_ptr();
  params.logsumexp_low = call.logsumexp_low_data();
  params.out_channels = params.value_channels;
  params.key_counts = call.key_counts;
  params.is_part = call.is_part;
  with_element(call.context.dtype, [&]<class T>() {
    with_keys(call.key_counts, [&]<Keys kKeys>() {
      launch_simt_sum<T, PositionSum::kForward, kKeys>(params, call.context.stream);
    });
  });
}

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

// Of a weighted sum (WeightedSumParams), as ready_operand returns them.
struct WeightedSumOperands {
  FeatureMap owned;
  FeatureMap streamed;
  FeatureMap values;
};

// An operand as the tensor-core kernels of E = key_channels take it.
inline FeatureMap ready_operand(const LaunchContext& context, int64_t key_channels, const FeatureMap& features) {
  return choose_position_engine(context, key_channels) == PositionEngine::kWgmma ? mappable(features, context.stream)
                                                                                 : aligned(features, context.stream);
}

// The kernels of a weighted sum on mma.sync. WgmmaKernels has the same members.
template <class Mma>
struct MmaKernels {
  using Element = typename Mma::Element;

  template <class... Arguments>
  static WeightedSumPlan plan(const Arguments&... arguments) {
    return plan_weighted_sum<Mma>(arguments...);
  }

  template <PositionSum kSum, Keys kKeys>
  static void launch(const LaunchContext& context, WeightedSumParams params, const WeightedSumOperands& operands) {
    params.owned = operands.owned.operand;
    params.streamed = operands.streamed.operand;
    params.values = operands.values.operand;
    launch_weighted_sum<Mma, kSum, kKeys>(params, context.limits, context.stream);
  }
};

// On wgmma.
template <class Element_>
struct WgmmaKernels {
  using Element = Element_;

  template <class... Arguments>
  static WeightedSumPlan plan(const Arguments&... arguments) {
    return plan_wgmma_weighted_sum<Element>(arguments...);
  }

  template <PositionSum kSum, Keys kKeys>
  static void launch(
      const LaunchContext& context, const WeightedSumParams& params, const WeightedSumOperands& operands) {
    WgmmaWeightedSumParams all{params, {}, {}, {}};
    with_wgmma_weighted_sum_tile<Element>(
        params.key_channels, params.value_channels, params.owned_positions, [&]<class Traits>() {
          all.owned = tensor_map(operands.owned, Traits::kKeyChannels);
          all.streamed = tensor_map(operands.streamed, Traits::kStreamedBox);
          all.values = tensor_map(operands.values, Traits::kValueBox);
        });
    launch_wgmma_weighted_sum<Element, kSum, kKeys>(all, context.stream);
  }
};

// visit.operator()<Kernels>() with the kernels that compute the weighted sums of E = key_channels in the arithmetic of
// Mma.
template <class Mma, class Visit>
auto with_weighted_sum_kernels(const LaunchContext& context, int64_t key_channels, const Visit& visit) {
  using Element = typename Mma::Element;
  if constexpr (kHasSm90aFiles && sizeof(Element) == 2) {
    if (choose_position_engine(context, key_channels) == PositionEngine::kWgmma) {
      return visit.template operator()<WgmmaKernels<Element>>();
    }
  }
  return visit.template operator()<MmaKernels<Mma>>();
}

template <class Kernels>
WeightedSumPlan weighted_sum_plan(const PositionSizes& sizes, const DeviceLimits& limits, Owned owned) {
  return Kernels::plan(
      sizes.batch, static_cast<int>(owned == Owned::kQueries ? sizes.queries : sizes.keys),
      static_cast<int>(owned == Owned::kQueries ? sizes.keys : sizes.queries), static_cast<int>(sizes.key_channels),
      static_cast<int>(sizes.value_channels), limits);
}

inline void set_base2(WeightedSumParams& params) {
  const double scale = std::abs(static_cast<double>(params.scale));
  const float rounded = static_cast<float>(scale / std::numbers::ln2);
  params.scale_log2 = rounded == 0.0f ? std::numeric_limits<float>::denorm_min() : rounded;
  const double ln2 = rounded == 0.0f ? std::numbers::ln2 : scale / params.scale_log2;
  params.ln2 = static_cast<float>(ln2);
  params.ln2_low = static_cast<float>(ln2 - params.ln2);
}

inline WeightedSumParams weighted_sum_params(
    const WeightedSumPlan& plan, const PositionSizes& sizes, double scale, Owned owned) {
  WeightedSumParams params{};
  params.owned_positions = static_cast<int>(owned == Owned::kQueries ? sizes.queries : sizes.keys);
  params.streamed_positions = static_cast<int>(owned == Owned::kQueries ? sizes.keys : sizes.queries);
  params.key_channels = static_cast<int>(sizes.key_channels);
  params.value_channels = static_cast<int>(sizes.value_channels);
  params.scale = static_cast<float>(scale);
  set_base2(params);
  params.owned_blocks = plan.owned_blocks;
  params.channel_blocks = plan.channel_blocks;
  return params;
}

// Where a weighted sum goes. The forward pass writes the others than output.
struct WeightedSumResult {
  const Tensor& output;  // (B, C, *S)
  bool is_part;          // as in ForwardCall; grad_value is in the dtype of accumulation too
  void* output_low;      // 16-bit types, null: not written
  float* logsumexp;      // (B, *S)
  float* logsumexp_low;  // (B, *S); float32: not null
};

template <PositionSum kSum, Keys kKeys>
void merge_splits(
    const LaunchContext& context, const WeightedSumPlan& plan, const WeightedSumParams& split,
    const WeightedSumResult& result) {
  MergeSplitsParams params{};
  params.partials = static_cast<const float*>(split.output);
  params.output = result.output.mutable_data_ptr();
  if constexpr (kSum == PositionSum::kForward) {
    params.partial_logsumexp = split.logsumexp;
    params.partial_logsumexp_low = split.logsumexp_low;
    params.output_low = result.output_low;
    params.logsumexp = result.logsumexp;
    params.logsumexp_low = result.logsumexp_low;
    params.key_counts = split.key_counts;
    params.is_part = result.is_part;
  }
  params.first_tile = split.first_tile;
  params.tiles = split.tiles;
  params.tile_channels = plan.tile_channels;
  params.splits = split.splits;
  params.channels = split.value_channels;
  params.positions = split.owned_positions;
  params.owned_blocks = split.owned_blocks;
  params.channel_blocks = split.channel_blocks;
  with_element(result.output.scalar_type(), [&]<class T>() {
    if constexpr (sizeof(T) < 8) {
      const auto launch = [&]<int kPositions>() {
        params.blocks_per_tile = plan.tile_channels / kMergeBlockChannels<kPositions>;
        const int64_t blocks = static_cast<int64_t>(params.tiles) * params.blocks_per_tile;
        SEGATTN_LAUNCH(
            (merge_splits_kernel<T, kSum, kKeys, kPositions>), dim3(grid_blocks(blocks)), dim3(kRowThreads), 0,
            context.stream, params);
      };
      if (plan.tile_positions == 64) {
        launch.template operator()<64>();
      } else {
        launch.template operator()<128>();
      }
    }
  });
}

// Launches the whole tiles, then the split tiles and their merge. Of params, the sizes are set; for the value gradient
// also logsumexp and logsumexp_low. The whole tiles of a part of the keys are merged as one split:
// the kernel for 16-bit types stores no float32 result, and the merge knows queries without weights.
template <class Kernels, PositionSum kSum, Keys kKeys>
void weighted_sum(
    const LaunchContext& context, const WeightedSumPlan& plan, const WeightedSumOperands& operands,
    WeightedSumParams params, const WeightedSumResult& result) {
  constexpr bool kForward = kSum == PositionSum::kForward;
  constexpr bool kHasLow = kForward && sizeof(typename Kernels::Element) == 4;
  grid_blocks(plan.whole_tiles + plan.split_tiles);  // tiles are counted in int
  const auto launch = [&](int64_t first_tile, int64_t tiles, int splits, int steps_per_split) {
    params.first_tile = static_cast<int>(first_tile);
    params.tiles = static_cast<int>(tiles);
    params.splits = splits;
    params.steps_per_split = steps_per_split;
    Kernels::template launch<kSum, kKeys>(context, params, operands);
  };
  const auto launch_and_merge = [&](int64_t first_tile, int64_t tiles, int splits, int steps_per_split) {
    const Tensor partials =
        allocate(result.output, {splits, tiles, plan.tile_channels, plan.tile_positions}, ScalarType::Float);
    const Tensor logsumexp =
        allocate(result.output, {kForward ? splits : 0, tiles, plan.tile_positions}, ScalarType::Float);
    const Tensor logsumexp_low =
        allocate(result.output, {kHasLow ? splits : 0, tiles, plan.tile_positions}, ScalarType::Float);
    params.output = partials.mutable_data_ptr();
    params.to_partials = true;
    if constexpr (kForward) {
      params.output_low = nullptr;
      params.logsumexp = float_data(logsumexp);
      params.logsumexp_low = kHasLow ? float_data(logsumexp_low) : nullptr;
    }
    launch(first_tile, tiles, splits, steps_per_split);
    merge_splits<kSum, kKeys>(context, plan, params, result);
  };
  if (plan.whole_tiles > 0) {
    if (result.is_part) {
      launch_and_merge(0, plan.whole_tiles, 1, plan.steps);
    } else {
      params.output = result.output.mutable_data_ptr();
      params.to_partials = false;
      if constexpr (kForward) {
        params.output_low = result.output_low;
        params.logsumexp = result.logsumexp;
        params.logsumexp_low = result.logsumexp_low;
      }
      launch(0, plan.whole_tiles, 1, plan.steps);
    }
  }
  if (plan.split_tiles > 0) {
    launch_and_merge(plan.whole_tiles, plan.split_tiles, plan.splits, plan.steps_per_split);
  }
}

// Returns false if no tile fits.
template <class Kernels>
bool forward_on(const ForwardCall& call) {
  const PositionSizes& sizes = call.sizes;
  const WeightedSumPlan plan = weighted_sum_plan<Kernels>(sizes, call.context.limits, Owned::kQueries);
  if (!plan.found) {
    return false;
  }
  const auto ready = [&](const FeatureMap& features) {
    return ready_operand(call.context, sizes.key_channels, features);
  };
  const WeightedSumOperands operands{ready(call.query), ready(call.key), ready(call.value)};
  WeightedSumParams params = weighted_sum_params(plan, sizes, call.scale, Owned::kQueries);
  params.key_counts = call.key_counts;
  with_keys(call.key_counts, [&]<Keys kKeys>() {
    weighted_sum<Kernels, PositionSum::kForward, kKeys>(
        call.context, plan, operands, params,
        {call.output, call.is_part, call.output_low_data(), float_data(call.logsumexp),
         static_cast<float*>(call.logsumexp_low_data())});
  });
  return true;
}

template <class Mma>
bool forward_mma(const ForwardCall& call) {
  return with_weighted_sum_kernels<Mma>(
      call.context, call.sizes.key_channels, [&]<class Kernels>() { return forward_on<Kernels>(call); });
}

}  // namespace segattn::cuda
