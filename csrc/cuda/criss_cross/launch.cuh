// How the lines are cut into blocks, and the launches.
#pragma once

#include <algorithm>

#include "cuda/criss_cross/backward.cuh"
#include "cuda/criss_cross/forward.cuh"
#include "cuda/criss_cross/launch.h"
#include "cuda/criss_cross/scores.cuh"
#include "cuda/criss_cross/weighted_sum.cuh"

namespace segattn::cuda {

// Every group of channels computes the weights again, which costs as much as summing `recompute_cost` channels.
inline void share_channels(LineSumParams& params, int64_t groups, int recompute_cost) {
  const int channels = params.values.channels;
  groups = std::clamp<int64_t>(groups, 1, std::max(1, channels / recompute_cost));
  params.channels_per_group = ceil_div(ceil_div(channels, groups), kLineChannels) * kLineChannels;
  params.channel_groups = ceil_div(channels, params.channels_per_group);
}

// Rows: one pair, so that as many blocks as possible share the work. Columns: as many neighbours as a block can have.
template <class Arithmetic>
int preferred_pairs(const LineFeatures& features, int lines) {
  const bool columns = features.line_stride < features.position_stride;
  return std::min(columns ? kMaxPairs<Arithmetic, StripShape> : 1, lines > 4 ? 4 : lines > 2 ? 2 : 1);
}

// Whether the lines are whole in wide tiles, and in no others. float64 has no registers for such tiles, and where there
// are no tensor cores the products take longer than the reads that wide tiles save.
template <class Arithmetic>
constexpr bool kWideTiles = Arithmetic::kTensorCores;
inline bool wants_wide_tiles(const Lines& lines) {
  return lines.pairs == 1 && lines.owned_blocks == 1 && lines.length > StripShape::kTile &&
      lines.length <= WideShape::kTile;
}

inline int64_t cut_lines(Lines& lines, int pairs, int owned) {
  lines.pairs = pairs;
  lines.line_blocks = ceil_div(lines.count, 2 * pairs);
  lines.owned_blocks = ceil_div(lines.length, owned);
  lines.owned = ceil_div(lines.length, lines.owned_blocks);
  return lines.batch * lines.line_blocks * lines.owned_blocks;
}

template <class Shape>
dim3 line_threads(const Lines& lines) {
  return dim3(32 * Shape::kWarps * lines.pairs);
}

template <class Arithmetic>
size_t stage_bytes(int pairs) {
  return LineWeights<Arithmetic, StripShape>::shared_bytes(pairs, 0, 0);
}

// For the kernels without a map tile: 64 queries a block.
template <class Arithmetic>
int64_t cut_products(Lines& lines, const LineFeatures& features, const DeviceLimits& limits) {
  int pairs = preferred_pairs<Arithmetic>(features, lines.count);
  while (pairs > 1 && stage_bytes<Arithmetic>(pairs) > static_cast<size_t>(limits.shared_bytes)) {
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
  const int64_t blocks = cut_products<Arithmetic>(params.lines, params.query, limits);
  SEGATTN_LAUNCH(
      (line_statistics_kernel<Arithmetic>), dim3(grid_blocks(blocks)), line_threads<StripShape>(params.lines),
      stage_bytes<Arithmetic>(params.lines.pairs), stream, params);
}

template <class Arithmetic>
void launch_line_product(LineProductParams params, const DeviceLimits& limits, cudaStream_t stream) {
  const int64_t blocks = cut_products<Arithmetic>(params.lines, params.query_side, limits);
  SEGATTN_LAUNCH(
      (line_product_kernel<Arithmetic>), dim3(grid_blocks(blocks)), line_threads<StripShape>(params.lines),
      stage_bytes<Arithmetic>(params.lines.pairs), stream, params);
}

// Chooses pairs of lines, owned positions and parts; returns the blocks, channel groups not counted. Better few lines a
// block than few owned positions, and better few owned positions than parts, which meet in the output.
template <class Arithmetic, LineOwner kOwner>
int64_t cut_sums(LineSumParams& params, const DeviceLimits& limits) {
  Lines& lines = params.lines;
  const size_t room = static_cast<size_t>(limits.shared_bytes);
  const int least = std::min(lines.length, 16);
  const auto bytes = [](int pairs, int owned, int part) {
    return LineWeights<Arithmetic, StripShape>::shared_bytes(
        pairs, kOwner == LineOwner::kKeys ? part : owned, kOwner == LineOwner::kKeys ? owned : part);
  };
  constexpr int kTile = StripShape::kTile;
  for (params.part = lines.length; params.part > 0; params.part = (params.part - 1) / kTile * kTile) {
    for (int pairs = preferred_pairs<Arithmetic>(params.output, lines.count); pairs >= 1; pairs /= 2) {
      int owned = std::min(lines.length, kMaxOwned);
      while (owned >= least && bytes(pairs, owned, params.part) > room) {
        --owned;
      }
      if (owned >= least) {
        return cut_lines(lines, pairs, owned);
      }
    }
  }
  throw std::runtime_error(
      "segattn_ops: the criss-cross kernels need " + std::to_string(bytes(1, 16, kTile)) +
      " bytes of shared memory, this device has " + std::to_string(room));
}

template <class Arithmetic, LineWeight kWeight, LineOwner kOwner>
void launch_line_sum(LineSumParams params, const DeviceLimits& limits, cudaStream_t stream) {
  Lines& lines = params.lines;
  int64_t blocks = cut_sums<Arithmetic, kOwner>(params, limits);
  const int64_t wanted = 2 * limits.multiprocessors;
  if (kWeight == LineWeight::kGradient) {
    // making the weights is nearly all of the work: it is shared out by owned positions
    while (blocks < wanted && lines.owned >= 32) {
      blocks = cut_lines(lines, lines.pairs, lines.owned / 2);
    }
  }
  const int recompute_cost =
      kWeight == LineWeight::kSoftmax ? std::max(params.query.channels, kLineChannels) : kLineChannels;
  share_channels(params, kWeight == LineWeight::kGradient ? 1 : ceil_div(wanted, blocks), recompute_cost);
  params.map_rows = kOwner == LineOwner::kKeys ? params.part : lines.owned;
  params.map_columns = round_up(kOwner == LineOwner::kKeys ? lines.owned : params.part, 16);
  SEGATTN_LAUNCH(
      (line_sum_kernel<Arithmetic, kWeight, kOwner>), dim3(grid_blocks(blocks * params.channel_groups)),
      line_threads<StripShape>(lines),
      LineWeights<Arithmetic, StripShape>::shared_bytes(lines.pairs, params.map_rows, params.map_columns), stream,
      params);
}

// Pairs of lines and owned queries whose weights fit; 0 blocks where 16 queries' do not.
template <class Arithmetic>
int64_t cut_attention(Lines& lines, const LineFeatures& output, const DeviceLimits& limits) {
  for (int pairs = preferred_pairs<Arithmetic>(output, lines.count); pairs >= 1; pairs /= 2) {
    int owned = std::min(lines.length, kMaxOwned);
    const int least = std::min(lines.length, 16);
    while (owned >= least &&
           LineAttention<Arithmetic, StripShape>::shared_bytes(pairs, owned, lines.length) >
               static_cast<size_t>(limits.shared_bytes)) {
      --owned;
    }
    if (owned >= least) {
      return cut_lines(lines, pairs, owned);
    }
  }
  return 0;
}

template <class Arithmetic>
bool line_attention_fits(Lines lines, const LineFeatures& output, const DeviceLimits& limits) {
  return cut_attention<Arithmetic>(lines, output, limits) > 0;
}

// 97 x 97: rows in wide tiles read query and key once; a block of 256 threads then has a multiprocessor's registers.
template <class Arithmetic>
void launch_line_attention(LineAttentionParams params, const DeviceLimits& limits, cudaStream_t stream) {
  Lines& lines = params.lines;
  const int64_t blocks = cut_attention<Arithmetic>(lines, params.output, limits);
  const int recompute_cost = std::max(params.query.channels, kLineChannels);
  params.part = lines.length;
  params.map_rows = lines.owned;
  params.map_columns = round_up(lines.length, 16);
  if constexpr (kWideTiles<Arithmetic>) {
    const size_t bytes = LineAttention<Arithmetic, WideShape>::shared_bytes(1, lines.length, lines.length);
    if (wants_wide_tiles(lines) && bytes <= static_cast<size_t>(limits.shared_bytes)) {
      share_channels(params, limits.multiprocessors / blocks, recompute_cost);
      SEGATTN_LAUNCH(
          (line_attention_kernel<Arithmetic, WideShape>), dim3(grid_blocks(blocks * params.channel_groups)),
          line_threads<WideShape>(lines), bytes, stream, params);
      return;
    }
  }
  share_channels(params, ceil_div(2 * limits.multiprocessors, blocks), recompute_cost);
  SEGATTN_LAUNCH(
      (line_attention_kernel<Arithmetic, StripShape>), dim3(grid_blocks(blocks * params.channel_groups)),
      line_threads<StripShape>(lines),
      (LineAttention<Arithmetic, StripShape>::shared_bytes(lines.pairs, lines.owned, lines.length)), stream, params);
}

template <class Arithmetic>
bool launch_line_backward(LineBackwardParams params, const DeviceLimits& limits, cudaStream_t stream) {
  Lines& lines = params.lines;
  const size_t room = static_cast<size_t>(limits.shared_bytes);
  const auto bytes = [&](int pairs) {
    return LineWeights<Arithmetic, StripShape>::shared_bytes(pairs, lines.length, lines.length);
  };
  int pairs = preferred_pairs<Arithmetic>(params.value, lines.count);
  while (pairs > 1 && bytes(pairs) > room) {
    pairs /= 2;
  }
  if (lines.length > kMaxOwned || bytes(pairs) > room) {
    return false;
  }
  int64_t blocks = cut_lines(lines, pairs, lines.length);
  while (pairs > 1 && blocks < limits.multiprocessors) {  // narrower strips, but on more multiprocessors
    pairs /= 2;
    blocks = cut_lines(lines, pairs, lines.length);
  }
  params.map_rows = lines.length;
  params.map_columns = round_up(lines.length, 16);
  params.channel_groups = 1;
  params.channels_per_group = std::max(params.query.channels, params.value.channels);
  if constexpr (kWideTiles<Arithmetic>) {
    const size_t wide_bytes = LineWeights<Arithmetic, WideShape>::shared_bytes(1, lines.length, lines.length);
    if (wants_wide_tiles(lines) && wide_bytes <= room) {
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
  template bool launch_line_backward<Arithmetic>(LineBackwardParams, const DeviceLimits&, cudaStream_t);     \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kGiven, kQueries)                                                 \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kGiven, kKeys)                                                    \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kSoftmax, kQueries)                                               \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kSoftmax, kKeys)                                                  \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kGradient, kQueries)                                              \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kGradient, kKeys)

}  // namespace segattn::cuda
