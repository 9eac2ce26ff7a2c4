// The tiles of position attention's tensor-core kernels, and the choice of tile and blocks for a problem.
//
// Shared memory of the weighted sum in bytes, for E key channels (the limit of a block is 99 KB on sm_86, sm_89 and
// sm_120, 163 KB on sm_80, 227 KB on sm_90):
//   16 bits   Wide       128 positions x 256 channels, E <= 64   95,320, three stages
//             Narrow     128 positions x 128 channels, E <= 64   70,744, three stages
//             WideAny    128 positions x 256 channels, any E     384 E + 50,264: E <= 128 at 99 KB
//             NarrowAny   64 positions x 128 channels, any E     256 E + 25,144: E <= 288 at 99 KB, 800 on sm_90
//   TF32      Wide       128 positions x 256 channels, E <= 64   91,224, two stages; not 3xTF32
//             WideAny    128 positions x 256 channels, any E     640 E + 50,264: E <= 72 at 99 KB. 3xTF32 has only 128
//                        channels: with 192, its fragments and the sums of a step spilled beside 96 accumulators
//             NarrowAny   64 positions x 128 channels, any E     384 E + 25,144: E <= 192 at 99 KB, 536 on sm_90
// and of the query and key gradient, with E rounded up to 64:
//   16 bits   Resident   128 queries x 128 keys, E <= 64         99,328 + 256 C: C <= 256 at 163 KB, 512 on sm_90
//             Deep       128 queries x 128 keys, E <= 64         132,096, four stages
//             Flat       128 queries x 128 keys, E <= 64          99,328, two stages
//             Any         64 queries x  64 keys, any E            256 E + 25,088: E <= 256 at 99 KB, 768 on sm_90
//   TF32      Kept        64 queries x  64 keys, E <= 64          99,584, including 16,896 for P and the sums of dS
//             Any         64 queries x  64 keys, any E            512 E + 66,816: E <= 64 at 99 KB, 320 on sm_90
// A chunk of Deep and Flat takes 256 mma, about 410 cycles on an H200 and 1,024 on sm_86. A read from L2 takes longer
// than that on the former and less on the latter, so devices with shared memory for only two stages need no more.
// Resident keeps grad_output of a query block in shared memory: with both operands streamed, L2 takes longer than the
// tensor cores on sm_90. In TF32 one block instead of two would fit in a multiprocessor.
// Problems that fit no tile run on the SIMT kernel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/common/device_limits.h"
#include "cuda/common/math.h"
#include "cuda/common/mma.cuh"
#include "cuda/position/query_key_gradient.cuh"
#include "cuda/position/weighted_sum.cuh"

namespace segattn::cuda {

// Arguments: owned positions, value channels, warps along the channels, stages, resident steps, minimum blocks per
// multiprocessor.
template <class Mma>
struct WeightedSumTiles {
  static constexpr int kResident = 64 / Mma::kStep;  // mma steps of the owned fragments that stay in registers
  using Wide = WeightedSumTraits<Mma, 128, 256, 4, sizeof(typename Mma::Element) == 2 ? 3 : 2, kResident, 1>;
  using Narrow = WeightedSumTraits<Mma, 128, 128, 4, 3, kResident, 1>;
  using WideAny = WeightedSumTraits<Mma, 128, Mma::kProducts == 3 ? 128 : 256, 4, 2, 0, 1>;
  using NarrowAny = WeightedSumTraits<Mma, 64, 128, 4, 2, 0, 2>;
  // 3xTF32 fragments take twice the registers: no room for resident ones.
  static constexpr bool kHasWide = Mma::kProducts == 1;
  static constexpr bool kHasNarrow = sizeof(typename Mma::Element) == 2;
};

template <class Traits>
constexpr bool weighted_sum_fits(int key_channels, int shared_limit) {
  return (Traits::kResidentSteps == 0 || key_channels <= Traits::kResidentSteps * Traits::Mma::kStep) &&
      Traits::shared_bytes(key_channels) <= shared_limit;
}

// Calls visit.operator()<Traits>() with the tile for E = key_channels and C = channels; false if none fits.
template <class Mma, class Visit>
bool with_weighted_sum_tile(int key_channels, int channels, int shared_limit, const Visit& visit) {
  using Tiles = WeightedSumTiles<Mma>;
  if constexpr (Tiles::kHasNarrow) {
    if (channels <= Tiles::Narrow::kChannels && weighted_sum_fits<typename Tiles::Narrow>(key_channels, shared_limit)) {
      visit.template operator()<typename Tiles::Narrow>();
      return true;
    }
  }
  if constexpr (Tiles::kHasWide) {
    if ((Tiles::kHasNarrow || channels > Tiles::NarrowAny::kChannels) &&
        weighted_sum_fits<typename Tiles::Wide>(key_channels, shared_limit)) {
      visit.template operator()<typename Tiles::Wide>();
      return true;
    }
  }
  // Every channel block recomputes the energies, so a wide tile is preferred to two narrow ones if it fits.
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

// How a weighted sum is divided into blocks.
struct WeightedSumPlan {
  bool found = false;  // a tensor-core tile fits
  int owned_blocks, channel_blocks;
  int tile_positions, tile_channels;
  // The first whole_tiles of the output tiles have a block each, the split_tiles after them a block for each split.
  int64_t whole_tiles, split_tiles;
  int steps;
  int splits, steps_per_split;  // of the split tiles
};

// Divides the tiles. As many as fill the multiprocessors evenly are whole; the others would leave most multiprocessors
// without work in the last wave, and have their streamed positions split where that is faster. Splits cost float32
// partials that are written and read. The device moves about 2,000 bytes of memory a cycle. Both ranges of tiles are
// multiples of `unit`, as the number of tiles is: the tiles of a cluster are not parted.
inline void choose_splits(WeightedSumPlan& plan, int64_t tiles, int unit, double cycles_per_step, int multiprocessors) {
  constexpr double kBytesPerCycle = 2000;
  const int64_t last = tiles - (tiles - tiles % multiprocessors) / unit * unit;
  const double partial_bytes = 8.0 * plan.tile_positions * plan.tile_channels * last;
  int best = 1;
  double least = 0;
  for (int splits = 1; splits <= std::min(kMaxSplits, std::max(plan.steps / 4, 1)); ++splits) {
    const int per_split = ceil_div(plan.steps, splits);
    if (ceil_div(plan.steps, per_split) != splits) {
      continue;  // the last split would be empty
    }
    const double waves = ceil_div(last * splits, multiprocessors);
    const double cycles =
        waves * per_split * cycles_per_step + (splits > 1 ? splits * partial_bytes / kBytesPerCycle : 0);
    if (splits == 1 || cycles < least) {
      best = splits;
      least = cycles;
    }
  }
  plan.split_tiles = best > 1 ? last : 0;
  plan.whole_tiles = tiles - plan.split_tiles;
  plan.splits = best;
  plan.steps_per_split = ceil_div(plan.steps, best);
}

template <class Mma>
WeightedSumPlan plan_weighted_sum(
    int64_t batch, int owned_positions, int streamed_positions, int key_channels, int channels,
    const DeviceLimits& limits) {
  WeightedSumPlan plan;
  plan.found = with_weighted_sum_tile<Mma>(key_channels, channels, limits.shared_bytes, [&]<class Traits>() {
    plan.owned_blocks = ceil_div(owned_positions, Traits::kOwned);
    plan.channel_blocks = ceil_div(channels, Traits::kChannels);
    plan.tile_positions = Traits::kOwned;
    plan.tile_channels = Traits::kChannels;
    plan.steps = ceil_div(streamed_positions, Traits::kStreamed);
    constexpr double kCyclesPerStep = 1100;  // of a Wide tile, at full rate
    choose_splits(plan, batch * plan.owned_blocks * plan.channel_blocks, 1, kCyclesPerStep, limits.multiprocessors);
  });
  return plan;
}

// Arguments: queries, keys, warps along the queries and along the keys, stages, where grad_query is accumulated,
// whether grad_output is streamed.
template <class Mma>
struct QueryKeyGradientTiles {
  using Resident = QueryKeyGradientTraits<Mma, 128, 128, 2, 4, 4, QueryGradientSums::kRegisters, GradOutput::kResident>;
  using Deep = QueryKeyGradientTraits<Mma, 128, 128, 2, 4, 4, QueryGradientSums::kRegisters>;
  using Flat = QueryKeyGradientTraits<Mma, 128, 128, 2, 4, 2, QueryGradientSums::kRegisters>;
  using Kept = QueryKeyGradientTraits<Mma, 64, 64, 2, 2, 2, QueryGradientSums::kRegisters>;
  using Any = QueryKeyGradientTraits<Mma, 64, 64, 2, 2, 2, QueryGradientSums::kGlobalMemory>;
};

template <class Traits>
constexpr bool query_key_gradient_fits(int key_channels, int value_channels, int shared_limit) {
  return (!Traits::kKeepsQueryGradient || key_channels <= Traits::kGradientRows) &&
      value_channels >= Traits::kLeastValueChannels &&
      Traits::shared_bytes(key_channels, value_channels) <= shared_limit;
}

// As with_weighted_sum_tile, for the gradients of query and key.
template <class Mma, class Visit>
bool with_query_key_gradient_tile(int key_channels, int value_channels, int shared_limit, const Visit& visit) {
  using Tiles = QueryKeyGradientTiles<Mma>;
  if constexpr (sizeof(typename Mma::Element) == 2) {
    if (query_key_gradient_fits<typename Tiles::Resident>(key_channels, value_channels, shared_limit)) {
      visit.template operator()<typename Tiles::Resident>();
      return true;
    }
    if (query_key_gradient_fits<typename Tiles::Deep>(key_channels, value_channels, shared_limit)) {
      visit.template operator()<typename Tiles::Deep>();
      return true;
    }
    if (query_key_gradient_fits<typename Tiles::Flat>(key_channels, value_channels, shared_limit)) {
      visit.template operator()<typename Tiles::Flat>();
      return true;
    }
  } else if (query_key_gradient_fits<typename Tiles::Kept>(key_channels, value_channels, shared_limit)) {
    visit.template operator()<typename Tiles::Kept>();
    return true;
  }
  if (query_key_gradient_fits<typename Tiles::Any>(key_channels, value_channels, shared_limit)) {
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

// The numbers of key-block groups and query-block ranges: enough to fill the multiprocessors evenly, but few, since
// each group writes a float32 partial of grad_query and each range one of grad_key, which are read again.
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
  plan.found = with_query_key_gradient_tile<Mma>(key_channels, channels, limits.shared_bytes, [&]<class Traits>() {
    plan.query_blocks = ceil_div(queries, Traits::kQueries);
    plan.key_blocks = ceil_div(keys, Traits::kKeys);
    plan.padded_queries = plan.query_blocks * Traits::kQueries;
    plan.padded_keys = plan.key_blocks * Traits::kKeys;
    // A multiprocessor does about 1,500 16-bit multiply-adds a cycle at full rate.
    const double cycles = 1.0 * Traits::kQueries * Traits::kKeys * (channels + 3 * key_channels) / 1500;
    choose_groups(plan, batch, key_channels, cycles, limits.multiprocessors);
  });
  return plan;
}

}  // namespace segattn::cuda
