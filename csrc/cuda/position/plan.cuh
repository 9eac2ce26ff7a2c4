// Which tiles the tensor-core kernels of position attention exist in, and which one a problem gets.
//
// Shared memory of the weighted sum in bytes, E key channels (99 KB is what sm_86, sm_89 and sm_120 offer a block,
// 163 KB sm_80, 227 KB sm_90):
//   16 bits   Wide       128 positions x 256 channels, E <= 64   95,296, three stages
//             Narrow     128 positions x 128 channels, E <= 64   70,720, three stages
//             WideAny    128 positions x 256 channels, any E     384 E + 50,240: E <= 128 at 99 KB
//             NarrowAny   64 positions x 128 channels, any E     256 E + 25,120: E <= 288 at 99 KB, 800 on sm_90
//   TF32      WideAny    128 positions x 256 channels, any E     640 E + 50,240: E <= 72 at 99 KB; 3xTF32 has but 128
//                        channels: beside 96 accumulators its fragments and the sums of a step would spill
//             NarrowAny   64 positions x 128 channels, any E     384 E + 25,120: E <= 192 at 99 KB, 536 on sm_90
// and of the query and key gradient, E rounded up to 64:
//   16 bits   Deep       128 queries x 128 keys, E <= 64         132,096, four stages
//             Flat       128 queries x 128 keys, E <= 64          99,328, two stages
//             Any         64 queries x  64 keys, any E            256 E + 25,088: E <= 256 at 99 KB, 768 on sm_90
//   TF32      Kept        64 queries x  64 keys, E <= 64          99,328, of them P and the sums of dS 16,896
//             Any         64 queries x  64 keys, any E            512 E + 66,560: E <= 64 at 99 KB, 320 on sm_90
// A chunk of Deep and Flat takes 256 mma, about 410 cycles on an H200 and 1,024 on an sm_86: less than a read from L2
// takes on the former, more on the latter, so that the processors whose shared memory allows two stages need no more.
// What fits none goes to the SIMT kernel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/common/device_limits.h"
#include "cuda/common/math.h"
#include "cuda/common/mma.cuh"
#include "cuda/position/query_key_gradient.cuh"
#include "cuda/position/weighted_sum.cuh"

namespace segattn::cuda {

template <class Mma>
struct WeightedSumTiles {
  static constexpr int kResident = 64 / Mma::kStep;  // mma steps of the embeddings that stay in registers
  using Wide = WeightedSumTraits<Mma, 128, 256, 4, 3, kResident, 1>;
  using Narrow = WeightedSumTraits<Mma, 128, 128, 4, 3, kResident, 1>;
  using WideAny = WeightedSumTraits<Mma, 128, Mma::kProducts == 3 ? 128 : 256, 4, 2, 0, 1>;
  using NarrowAny = WeightedSumTraits<Mma, 64, 128, 4, 2, 0, 2>;
  // A TF32 fragment takes twice the registers and 3xTF32 as much again: no room for resident embeddings.
  static constexpr bool kHasResident = sizeof(typename Mma::Element) == 2;
};

template <class Traits>
constexpr bool weighted_sum_fits(int key_channels, int shared_limit) {
  return (Traits::kScoreSteps == 0 || key_channels <= Traits::kScoreSteps * Traits::Mma::kStep) &&
      Traits::shared_bytes(key_channels) <= shared_limit;
}

// Calls visit.operator()<Traits>() with the tile for E = key_channels and C = channels; false where none fits.
template <class Mma, class Visit>
bool with_weighted_sum_tile(int key_channels, int channels, int shared_limit, const Visit& visit) {
  using Tiles = WeightedSumTiles<Mma>;
  if constexpr (Tiles::kHasResident) {
    if (channels <= Tiles::Narrow::kChannels && weighted_sum_fits<typename Tiles::Narrow>(key_channels, shared_limit)) {
      visit.template operator()<typename Tiles::Narrow>();
      return true;
    }
    if (weighted_sum_fits<typename Tiles::Wide>(key_channels, shared_limit)) {
      visit.template operator()<typename Tiles::Wide>();
      return true;
    }
  }
  // Channel blocks each make the scores again: two narrow blocks for one wide one only where the wide one has no room.
  if (channels > Tiles::NarrowAny::kChannels &&
      weighted_sum_fits<typename Tiles::WideAny>(key_channels, shared_limit)) {
    visit.template operator()<typename Tiles::WideAny>();
    return true;
  }
  if (weighted_sum_fits<typename Tiles::NarrowAny>(key_channels, shared_limit)) {
    visit.template operator()<typename Tiles::NarrowAny>();
    return true;
  }
  return false;
}

// How a weighted sum is cut into blocks.
struct WeightedSumPlan {
  bool found = false;  // a tensor-core tile fits
  int owned_blocks, channel_blocks;
  int splits, steps_per_split;
};

// Splits of the streamed positions. One is enough where the other blocks fill the multiprocessors evenly; otherwise the
// last wave runs half empty, and splitting it costs float32 partial results, written and read. Cycles of both sides:
// a step of a Wide tile takes about 1,100 cycles at full rate, the device moves about 2,000 bytes of memory a cycle.
inline int choose_splits(int64_t blocks, int steps, int64_t output_elements, int multiprocessors) {
  constexpr double kCyclesPerStep = 1100, kBytesPerCycle = 2000;
  int best = 1;
  double least = 0;
  for (int splits = 1; splits <= std::min(kMaxSplits, std::max(steps / 4, 1)); ++splits) {
    const int per_split = ceil_div(steps, splits);
    if (ceil_div(steps, per_split) != splits) {
      continue;  // the last split would have nothing to do
    }
    const double waves = ceil_div(blocks * splits, multiprocessors);
    const double cycles = waves * per_split * kCyclesPerStep +
        (splits > 1 ? static_cast<double>(output_elements) * splits * 8 / kBytesPerCycle : 0);
    if (splits == 1 || cycles < least) {
      best = splits;
      least = cycles;
    }
  }
  return best;
}

template <class Mma>
WeightedSumPlan plan_weighted_sum(
    int64_t batch, int owned_positions, int streamed_positions, int key_channels, int channels,
    const DeviceLimits& limits) {
  WeightedSumPlan plan;
  plan.found = with_weighted_sum_tile<Mma>(key_channels, channels, limits.shared_bytes, [&]<class Traits>() {
    plan.owned_blocks = ceil_div(owned_positions, Traits::kOwned);
    plan.channel_blocks = ceil_div(channels, Traits::kChannels);
    const int steps = ceil_div(streamed_positions, Traits::kStreamed);
    const int64_t blocks = batch * plan.owned_blocks * plan.channel_blocks;
    plan.splits = choose_splits(blocks, steps, batch * channels * owned_positions, limits.multiprocessors);
    plan.steps_per_split = ceil_div(steps, plan.splits);
  });
  return plan;
}

template <class Mma>
struct QueryKeyGradientTiles {
  using Deep = QueryKeyGradientTraits<Mma, 128, 128, 2, 4, 4, true>;
  using Flat = QueryKeyGradientTraits<Mma, 128, 128, 2, 4, 2, true>;
  using Kept = QueryKeyGradientTraits<Mma, 64, 64, 2, 2, 2, true>;
  using Any = QueryKeyGradientTraits<Mma, 64, 64, 2, 2, 2, false>;
};

template <class Traits>
constexpr bool query_key_gradient_fits(int key_channels, int shared_limit) {
  return (!Traits::kKeepsQueryGradient || key_channels <= Traits::kGradientRows) &&
      Traits::shared_bytes(key_channels) <= shared_limit;
}

// As with_weighted_sum_tile, for the gradients of query and key.
template <class Mma, class Visit>
bool with_query_key_gradient_tile(int key_channels, int shared_limit, const Visit& visit) {
  using Tiles = QueryKeyGradientTiles<Mma>;
  if constexpr (sizeof(typename Mma::Element) == 2) {
    if (query_key_gradient_fits<typename Tiles::Deep>(key_channels, shared_limit)) {
      visit.template operator()<typename Tiles::Deep>();
      return true;
    }
    if (query_key_gradient_fits<typename Tiles::Flat>(key_channels, shared_limit)) {
      visit.template operator()<typename Tiles::Flat>();
      return true;
    }
  } else if (query_key_gradient_fits<typename Tiles::Kept>(key_channels, shared_limit)) {
    visit.template operator()<typename Tiles::Kept>();
    return true;
  }
  if (query_key_gradient_fits<typename Tiles::Any>(key_channels, shared_limit)) {
    visit.template operator()<typename Tiles::Any>();
    return true;
  }
  return false;
}

struct QueryKeyGradientPlan {
  bool found = false;
  int query_blocks, ranges, blocks_per_range;
  int key_blocks, groups, blocks_per_group;
  int padded_queries, padded_keys;
};

// Groups of key blocks and ranges of query blocks: as many as fill the multiprocessors evenly, as few as that allows,
// since each group holds a float32 share of grad_query and each range one of grad_key, written and read.
inline void choose_groups(
    QueryKeyGradientPlan& plan, int64_t batch, int key_channels, double cycles_per_tile, int multiprocessors) {
  constexpr int kMost = 16;
  constexpr double kBytesPerCycle = 2000;
  double least = 0;
  for (int groups = 1; groups <= std::min(kMost, plan.key_blocks); ++groups) {
    const int per_group = ceil_div(plan.key_blocks, groups);
    if (ceil_div(plan.key_blocks, per_group) != groups) {
      continue;  // the last group would be empty
    }
    for (int ranges = 1; ranges <= std::min(kMost, plan.query_blocks); ++ranges) {
      const int per_range = ceil_div(plan.query_blocks, ranges);
      if (ceil_div(plan.query_blocks, per_range) != ranges) {
        continue;
      }
      const double waves = ceil_div(batch * groups * ranges, multiprocessors);
      const double partial_bytes = 8.0 * batch * key_channels *
          (static_cast<double>(groups) * plan.padded_queries + static_cast<double>(ranges) * plan.padded_keys);
      const double cycles = waves * per_group * per_range * cycles_per_tile + partial_bytes / kBytesPerCycle;
      if (least == 0 || cycles < least) {
        least = cycles;
        plan.groups = groups;
        plan.blocks_per_group = per_group;
        plan.ranges = ranges;
        plan.blocks_per_range = per_range;
      }
    }
  }
}

template <class Mma>
QueryKeyGradientPlan plan_query_key_gradient(
    int64_t batch, int queries, int keys, int key_channels, int channels, const DeviceLimits& limits) {
  QueryKeyGradientPlan plan;
  plan.found = with_query_key_gradient_tile<Mma>(key_channels, limits.shared_bytes, [&]<class Traits>() {
    plan.query_blocks = ceil_div(queries, Traits::kQueries);
    plan.key_blocks = ceil_div(keys, Traits::kKeys);
    plan.padded_queries = plan.query_blocks * Traits::kQueries;
    plan.padded_keys = plan.key_blocks * Traits::kKeys;
    // about 1,500 multiply-adds of 16 bits a cycle and multiprocessor at full rate
    const double cycles = 1.0 * Traits::kQueries * Traits::kKeys * (channels + 3 * key_channels) / 1500;
    choose_groups(plan, batch, key_channels, cycles, limits.multiprocessors);
  });
  return plan;
}

// Defined for each arithmetic in a file of its own (position_float16.cu, ...).
template <class Mma, PositionSum kSum>
void launch_weighted_sum(const WeightedSumParams& params, const DeviceLimits& limits, cudaStream_t stream);
template <class Mma>
void launch_query_key_gradient(const QueryKeyGradientParams& params, const DeviceLimits& limits, cudaStream_t stream);

}  // namespace segattn::cuda
