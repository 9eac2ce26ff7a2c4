// The division of the gradients of query and key on Hopper into blocks, and the maps of its operands.
#pragma once

#include <cstdint>

#include "cuda/common/device_limits.h"
#include "cuda/common/math.h"
#include "cuda/common/operands.h"
#include "cuda/common/tensor_map.h"
#include "cuda/position/plan.cuh"
#include "cuda/position/wgmma/params.h"
#include "cuda/position/wgmma/query_key_gradient_tiles.h"

namespace segattn::cuda {

template <class Element>
QueryKeyGradientPlan plan_wgmma_query_key_gradient(
    int64_t batch, int queries, int keys, int key_channels, int value_channels, const DeviceLimits& limits) {
  QueryKeyGradientPlan plan;
  plan.found = with_wgmma_query_key_gradient_tile<Element>(
      key_channels, value_channels, limits.shared_bytes, [&]<class Traits>() {
        plan.query_blocks = ceil_div(queries, Traits::kQueries);
        plan.key_blocks = ceil_div(keys, Traits::kKeys);
        plan.padded_queries = plan.query_blocks * Traits::kQueries;
        plan.padded_keys = plan.key_blocks * Traits::kKeys;
        // The tensor cores' cycles: 2,048 16-bit multiply-adds each. 5,632 for E = 64, C = 512.
        const int channels = Traits::chunks(value_channels) * Traits::kChunk + 3 * Traits::kKeyChannels;
        const double cycles = 1.0 * Traits::kQueries * Traits::kKeys * channels / 2048;
        choose_groups(plan, batch, key_channels, cycles, limits.multiprocessors);
      });
  return plan;
}

// query (B, E, N), key (B, E, M), value (B, C, M), grad_output (B, C, N), with rows that start on 16 bytes.
template <class Element>
WgmmaQueryKeyGradientParams wgmma_query_key_gradient_params(
    const QueryKeyGradientParams& problem, const FeatureMap& query, const FeatureMap& key, const FeatureMap& value,
    const FeatureMap& grad_output, const DeviceLimits& limits) {
  WgmmaQueryKeyGradientParams params{problem, {}, {}, {}, {}};
  with_wgmma_query_key_gradient_tile<Element>(
      problem.key_channels, problem.value_channels, limits.shared_bytes, [&]<class Traits>() {
        params.query = tensor_map(query, Traits::kKeyChannels);
        params.key = tensor_map(key, Traits::kKeyChannels);
        params.value = tensor_map(value, Traits::kChunk);
        params.grad_output = tensor_map(grad_output, Traits::kChunk);
      });
  return params;
}

}  // namespace segattn::cuda
