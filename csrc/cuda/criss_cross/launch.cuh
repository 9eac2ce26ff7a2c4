// Partition of the lines into blocks, and the launches (launch.h).
#pragma once

#include <algorithm>
#include <limits>

#include "cuda/criss_cross/backward.cuh"
#include "cuda/criss_cross/forward.cuh"
#include "cuda/criss_cross/launch.h"
#include "cuda/criss_cross/logsumexp.cuh"
#include "cuda/criss_cross/products.cuh"
#include "cuda/criss_cross/weighted_sum.cuh"

namespace segattn::cuda {

// Splits the output channels into groups of one block each. Every group recomputes the weights, which costs as much as
// summing `recompute_cost` channels. Takes the split whose busiest multiprocessor has the least work: the turns of
// blocks it needs, times the work of a block. Fewer than kBusyWarps warps take as long as that many.
inline void split_channels(
    LineSumParams& params, int64_t blocks, unsigned warps, int recompute_cost, const DeviceLimits& limits) {
  constexpr int64_t kBusyWarps = 8;
  const int channels = params.values.channels;
  const auto divide = [&](int64_t groups) {
    params.channels_per_group = ceil_div(ceil_div(channels, groups), kLineChannels) * kLineChannels;
    params.channel_groups = ceil_div(channels, params.channels_per_group);
  };
  int64_t best = 1, least = std::numeric_limits<int64_t>::max();
  for (int64_t groups = 1; groups <= ceil_div(channels, kLineChannels); ++groups) {
    divide(groups);
    const int64_t turns = ceil_div(blocks * params.channel_groups, limits.multiprocessors);
    const int64_t work = std::max<int64_t>(turns * warps, kBusyWarps) * (recompute_cost + params.channels_per_group);
    if (work < least) {
      best = groups;
      least = work;
    }
  }
  divide(best);
}

// Rows: one pair, for as many blocks as possible. Columns: as many neighbours as a block can have, to read longer runs
// of each image row.
template <class Arithmetic>
int preferred_pairs(const LineFeatures& features, int lines) {
  return std::min(lines_innermost(features) ? kMaxPairs<Arithmetic, StripShape> : 1, lines > 4 ? 4 : lines > 2 ? 2 : 1);
}

// Wide tiles save reads. float64 has no registers for them. Without tensor cores the products take longer than the
// reads they would save.
template <class Arithmetic>
constexpr bool kSupportsWideTiles = Arithmetic::kTensorCores;
// Whether the lines are longer than a strip tile and fit in one wide tile.
inline bool fit_one_wide_tile(const Lines& lines) {
  return lines.pairs == 1 && lines.owned_blocks == 1 && lines.length > StripShape::kTile &&
      lines.length <= WideShape::kTile;
}

inline int64_t partition_lines(Lines& lines, int pairs, int owned) {
  lines.pairs = pairs;
  lines.line_blocks = ceil_div(lines.count, 2 * pairs);
  lines.owned_blocks = ceil_div(lines.length, owned);
  lines.owned = ceil_div(lines.length, lines.owned_blocks);
  return lines.batch * lines.line_blocks * lines.owned_blocks;
}

template <class Shape>
unsigned line_warps(const Lines& lines) {
  return Shape::kWarps * lines.pairs;
}
template <class Shape>
dim3 line_threads(const Lines& lines) {
  return dim3(32 * line_warps<Shape>(lines));
}

// The cost of computing the weights as channels of the sum (split_channels). By counted instructions a channel of the
// energies with its share of the softmax is two channels of the sum.
inline int weights_cost(const LineSumParams& params) {
  return 2 * std::max(params.query.channels, kLineChannels / 2);
}

template <class Arithmetic>
size_t staging_bytes(int pairs) {
  return LineWeights<Arithmetic, StripShape>::shared_bytes(pairs, 0, 0);
}

// For the kernels without weights in shared memory: 64 queries per block.
template <class Arithmetic>
int64_t partition_products(Lines& lines, const LineFeatures& features, const DeviceLimits& limits) {
  int pairs = preferred_pairs<Arithmetic>(features, lines.count);
  while (pairs > 1 && staging_bytes<Arithmetic>(pairs) > static_cast<size_t>(limits.shared_bytes)) {
    pairs /= 2;
  }
  lines.pairs = pairs;
  lines.line_blocks = ceil_div(lines.count, 2 * pairs);
  lines.owned_blocks = ceil_div(lines.length, StripShape::kTile);
  lines.owned = StripShape::kTile;
  return lines.batch * lines.line_blocks * lines.owned_blocks;
}

template <class Arithmetic>
void launch_line_statistics(LineStatisticsParams params, const DeviceLimits& limits, cudaStream_t stream) {
  const int64_t blocks = partition_products<Arithmetic>(params.lines, params.query, limits);
  SEGATTN_LAUNCH(
      (line_statistics_kernel<Arithmetic>), dim3(grid_blocks(blocks)), line_threads<StripShape>(params.lines),
      staging_bytes<Arithmetic>(params.lines.pairs), stream, params);
}

template <class Arithmetic>
void launch_line_product(LineProductParams params, const DeviceLimits& limits, cudaStream_t stream) {
  const int64_t blocks = partition_products<Arithmetic>(params.lines, params.query_side, limits);
  SEGATTN_LAUNCH(
      (line_product_kernel<Arithmetic>), dim3(grid_blocks(blocks)), line_threads<StripShape>(params.lines),
      staging_bytes<Arithmetic>(params.lines.pairs), stream, params);
}

// Chooses pairs of lines, owned positions and positions per pass. Returns the number of blocks for one channel group.
// Until the weights fit, reduces the owned positions first (down to 16), then the lines per block. Several passes are
// the last resort: every pass after the first reads the output and writes it again, or, with given weights, every
// kLineChannels channels copy the weights again.
template <class Arithmetic, LineOwner kOwner>
int64_t partition_sums(LineSumParams& params, const DeviceLimits& limits) {
  Lines& lines = params.lines;
  const size_t capacity = static_cast<size_t>(limits.shared_bytes);
  const int min_owned = std::min(lines.length, 16);
  const auto bytes = [](int pairs, int owned, int contracted) {
    return LineWeights<Arithmetic, StripShape>::shared_bytes(
        pairs, kOwner == LineOwner::kKeys ? contracted : owned, kOwner == LineOwner::kKeys ? owned : contracted);
  };
  constexpr int kTile = StripShape::kTile;
  for (params.positions_per_pass = lines.length; params.positions_per_pass > 0;
       params.positions_per_pass = (params.positions_per_pass - 1) / kTile * kTile) {
    for (int pairs = preferred_pairs<Arithmetic>(params.output, lines.count); pairs >= 1; pairs /= 2) {
      int owned = std::min(lines.length, kMaxOwned);
      while (owned >= min_owned && bytes(pairs, owned, params.positions_per_pass) > capacity) {
        --owned;
      }
      if (owned >= min_owned) {
        return partition_lines(lines, pairs, owned);
      }
    }
  }
  throw std::runtime_error(
      "segattn_ops: the criss-cross kernels need " + std::to_string(bytes(1, 16, kTile)) +
      " bytes of shared memory, this device has " + std::to_string(capacity));
}

template <class Arithmetic, LineWeight kWeight, LineOwner kOwner>
void launch_line_sum(LineSumParams params, const DeviceLimits& limits, cudaStream_t stream) {
  Lines& lines = params.lines;
  int64_t blocks = partition_sums<Arithmetic, kOwner>(params, limits);
  if constexpr (kWeight == LineWeight::kGradient) {
    // Nearly all of the work is computing the weights, which every channel group would repeat: split owned positions.
    while (blocks < 2 * limits.multiprocessors && lines.owned >= 32) {
      blocks = partition_lines(lines, lines.pairs, lines.owned / 2);
    }
    params.channel_groups = 1;
    params.channels_per_group = params.values.channels;
  } else {
    const int recompute_cost = kWeight == LineWeight::kSoftmax ? weights_cost(params) : kLineChannels;
    split_channels(params, blocks, line_warps<StripShape>(lines), recompute_cost, limits);
  }
  params.weight_rows = kOwner == LineOwner::kKeys ? params.positions_per_pass : lines.owned;
  params.weight_columns = round_up(kOwner == LineOwner::kKeys ? lines.owned : params.positions_per_pass, 16);
  SEGATTN_LAUNCH(
      (line_sum_kernel<Arithmetic, kWeight, kOwner>), dim3(grid_blocks(blocks * params.channel_groups)),
      line_threads<StripShape>(lines),
      LineWeights<Arithmetic, StripShape>::shared_bytes(lines.pairs, params.weight_rows, params.weight_columns), stream,
      params);
}

// Chooses pairs of lines and owned queries whose weights fit. Returns the number of blocks, 0 if 16 queries do not fit.
template <class Arithmetic>
int64_t partition_attention(Lines& lines, const LineFeatures& output, const DeviceLimits& limits) {
  for (int pairs = preferred_pairs<Arithmetic>(output, lines.count); pairs >= 1; pairs /= 2) {
    int owned = std::min(lines.length, kMaxOwned);
    const int min_owned = std::min(lines.length, 16);
    while (owned >= min_owned &&
           LineAttention<Arithmetic, StripShape>::shared_bytes(pairs, owned, lines.length) >
               static_cast<size_t>(limits.shared_bytes)) {
      --owned;
    }
    if (owned >= min_owned) {
      return partition_lines(lines, pairs, owned);
    }
  }
  return 0;
}

template <class Arithmetic>
bool line_attention_fits(Lines lines, const LineFeatures& output, const DeviceLimits& limits) {
  return partition_attention<Arithmetic>(lines, output, limits) > 0;
}

// At 97 x 97, rows in wide tiles read query and key once.
template <class Arithmetic>
void launch_line_attention(LineAttentionParams params, const DeviceLimits& limits, cudaStream_t stream) {
  Lines& lines = params.lines;
  const int64_t blocks = partition_attention<Arithmetic>(lines, params.output, limits);
  params.positions_per_pass = lines.length;
  params.weight_rows = lines.owned;
  params.weight_columns = round_up(lines.length, 16);
  if constexpr (kSupportsWideTiles<Arithmetic>) {
    const size_t bytes = LineAttention<Arithmetic, WideShape>::shared_bytes(1, lines.length, lines.length);
    if (fit_one_wide_tile(lines) && bytes <= static_cast<size_t>(limits.shared_bytes)) {
      split_channels(params, blocks, line_warps<WideShape>(lines), weights_cost(params), limits);
      SEGATTN_LAUNCH(
          (line_attention_kernel<Arithmetic, WideShape>), dim3(grid_blocks(blocks * params.channel_groups)),
          line_threads<WideShape>(lines), bytes, stream, params);
      return;
    }
  }
  split_channels(params, blocks, line_warps<StripShape>(lines), weights_cost(params), limits);
  SEGATTN_LAUNCH(
      (line_attention_kernel<Arithmetic, StripShape>), dim3(grid_blocks(blocks * params.channel_groups)),
      line_threads<StripShape>(lines),
      (LineAttention<Arithmetic, StripShape>::shared_bytes(lines.pairs, lines.owned, lines.length)), stream, params);
}

template <class Arithmetic>
bool try_launch_line_backward(LineBackwardParams params, const DeviceLimits& limits, cudaStream_t stream) {
  Lines& lines = params.lines;
  const size_t capacity = static_cast<size_t>(limits.shared_bytes);
  const auto bytes = [&](int pairs) {
    return LineWeights<Arithmetic, StripShape>::shared_bytes(pairs, lines.length, lines.length);
  };
  int pairs = preferred_pairs<Arithmetic>(params.value, lines.count);
  while (pairs > 1 && bytes(pairs) > capacity) {
    pairs /= 2;
  }
  if (lines.length > kMaxOwned || bytes(pairs) > capacity) {
    return false;
  }
  int64_t blocks = partition_lines(lines, pairs, lines.length);
  while (pairs > 1 && blocks < limits.multiprocessors) {  // narrower strips, on more multiprocessors
    pairs /= 2;
    blocks = partition_lines(lines, pairs, lines.length);
  }
  params.weight_rows = lines.length;
  params.weight_columns = round_up(lines.length, 16);
  params.channel_groups = 1;
  params.channels_per_group = std::max(params.query.channels, params.value.channels);
  if constexpr (kSupportsWideTiles<Arithmetic>) {
    const size_t wide_bytes = LineWeights<Arithmetic, WideShape>::shared_bytes(1, lines.length, lines.length);
    if (fit_one_wide_tile(lines) && wide_bytes <= capacity) {
      SEGATTN_LAUNCH(
          (line_backward_kernel<Arithmetic, WideShape>), dim3(grid_blocks(blocks)), line_threads<WideShape>(lines),
          wide_bytes, stream, params);
      return true;
    }
  }
  SEGATTN_LAUNCH(
      (line_backward_kernel<Arithmetic, StripShape>), dim3(grid_blocks(blocks)), line_threads<StripShape>(lines),
      bytes(pairs), stream, params);
  return true;
}

#define SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kWeight, kOwner)                    \
  template void launch_line_sum<Arithmetic, LineWeight::kWeight, LineOwner::kOwner>( \
      LineSumParams, const DeviceLimits&, cudaStream_t);

#define SEGATTN_INSTANTIATE_LINES(Arithmetic)                                                                \
  template void launch_line_statistics<Arithmetic>(LineStatisticsParams, const DeviceLimits&, cudaStream_t); \
  template void launch_line_product<Arithmetic>(LineProductParams, const DeviceLimits&, cudaStream_t);       \
  template bool line_attention_fits<Arithmetic>(Lines, const LineFeatures&, const DeviceLimits&);            \
  template void launch_line_attention<Arithmetic>(LineAttentionParams, const DeviceLimits&, cudaStream_t);   \
  template bool try_launch_line_backward<Arithmetic>(LineBackwardParams, const DeviceLimits&, cudaStream_t); \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kGiven, kQueries)                                                 \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kGiven, kKeys)                                                    \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kSoftmax, kQueries)                                               \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kSoftmax, kKeys)                                                  \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kGradient, kQueries)                                              \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kGradient, kKeys)

}  // namespace segattn::cuda
