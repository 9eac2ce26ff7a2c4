// How the lines are cut into blocks, and the launches.
#pragma once

#include <algorithm>

#include "criss_cross_launch.h"
#include "criss_cross_sum.cuh"

namespace segattn {

inline int divide_lines(int a, int b) { return (a + b - 1) / b; }

// Rows: one pair, so that as many blocks as possible share the work. Columns: as many neighbours as a block can have.
template <class Arithmetic>
int preferred_pairs(const LineFeatures& features, int lines) {
  const bool columns = features.line_stride < features.position_stride;
  return std::min(columns ? kMaxPairs<Arithmetic> : 1, lines > 4 ? 4 : lines > 2 ? 2 : 1);
}

inline int64_t cut_lines(Lines& lines, int pairs, int owned) {
  lines.pairs = pairs;
  lines.line_blocks = divide_lines(lines.count, 2 * pairs);
  lines.owned_blocks = divide_lines(lines.length, owned);
  lines.owned = divide_lines(lines.length, lines.owned_blocks);
  return lines.batch * lines.line_blocks * lines.owned_blocks;
}

template <class Arithmetic>
size_t stage_bytes(int pairs) {
  return LineWeights<Arithmetic>::shared_bytes(pairs, 0, 0);
}

// For the kernels without a map tile: 64 queries a block.
template <class Arithmetic>
int64_t cut_products(Lines& lines, const LineFeatures& features, const DeviceLimits& limits) {
  int pairs = preferred_pairs<Arithmetic>(features, lines.count);
  while (pairs > 1 && stage_bytes<Arithmetic>(pairs) > static_cast<size_t>(limits.shared_bytes)) {
    pairs /= 2;
  }
  lines.pairs = pairs;
  lines.line_blocks = divide_lines(lines.count, 2 * pairs);
  lines.owned_blocks = divide_lines(lines.length, kLineTile);
  lines.owned = kLineTile;
  return lines.batch * lines.line_blocks * lines.owned_blocks;
}

template <class Arithmetic>
void launch_line_statistics(LineStatisticsParams params, const DeviceLimits& limits, cudaStream_t stream) {
  const int64_t blocks = cut_products<Arithmetic>(params.lines, params.query, limits);
  SEGATTN_LAUNCH(
      (line_statistics_kernel<Arithmetic>), dim3(grid_blocks(blocks)), dim3(32 * kWarpsPerPair * params.lines.pairs),
      stage_bytes<Arithmetic>(params.lines.pairs), stream, params);
}

template <class Arithmetic>
void launch_line_product(LineProductParams params, const DeviceLimits& limits, cudaStream_t stream) {
  const int64_t blocks = cut_products<Arithmetic>(params.lines, params.query_side, limits);
  SEGATTN_LAUNCH(
      (line_product_kernel<Arithmetic>), dim3(grid_blocks(blocks)), dim3(32 * kWarpsPerPair * params.lines.pairs),
      stage_bytes<Arithmetic>(params.lines.pairs), stream, params);
}

// Chooses pairs of lines, owned positions and parts; returns the blocks, channel groups not counted. Better few lines a
// block than few owned positions, and better few owned positions than parts, which meet in the output.
template <class Arithmetic, bool kOwnsKeys>
int64_t cut_sums(LineSumParams& params, const DeviceLimits& limits) {
  Lines& lines = params.lines;
  const size_t room = static_cast<size_t>(limits.shared_bytes);
  const int least = std::min(lines.length, 16);
  const auto bytes = [](int pairs, int owned, int part) {
    return LineWeights<Arithmetic>::shared_bytes(pairs, kOwnsKeys ? part : owned, kOwnsKeys ? owned : part);
  };
  for (params.part = lines.length; params.part > 0; params.part = (params.part - 1) / kLineTile * kLineTile) {
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
      "segattn_ops: the criss-cross kernels need " + std::to_string(bytes(1, 16, kLineTile)) +
      " bytes of shared memory, this device has " + std::to_string(room));
}

template <class Arithmetic, LineWeight kWeight, bool kOwnsKeys>
void launch_line_sum(LineSumParams params, const DeviceLimits& limits, cudaStream_t stream) {
  Lines& lines = params.lines;
  int64_t blocks = cut_sums<Arithmetic, kOwnsKeys>(params, limits);
  const int64_t wanted = 2 * limits.multiprocessors;
  if (kWeight == LineWeight::kGradient) {
    // making the weights is nearly all of the work: it is shared out by owned positions
    while (blocks < wanted && lines.owned >= 32) {
      blocks = cut_lines(lines, lines.pairs, lines.owned / 2);
    }
  }
  // Every group makes the weights again, at the price of as many channels as query has.
  const int channels = params.values.channels;
  const int price = kWeight == LineWeight::kSoftmax ? std::max(params.query.channels, kLineChannels) : kLineChannels;
  const int most = kWeight == LineWeight::kGradient ? 1 : std::max(1, channels / price);
  const int groups = static_cast<int>(std::clamp<int64_t>((wanted + blocks - 1) / std::max<int64_t>(blocks, 1), 1, most));
  params.channels_per_group = divide_lines(divide_lines(channels, groups), kLineChannels) * kLineChannels;
  params.channel_groups = divide_lines(channels, params.channels_per_group);
  params.map_rows = kOwnsKeys ? params.part : lines.owned;
  params.map_columns = round_up_16(kOwnsKeys ? lines.owned : params.part);
  SEGATTN_LAUNCH(
      (line_sum_kernel<Arithmetic, kWeight, kOwnsKeys>), dim3(grid_blocks(blocks * params.channel_groups)),
      dim3(32 * kWarpsPerPair * lines.pairs),
      LineWeights<Arithmetic>::shared_bytes(lines.pairs, params.map_rows, params.map_columns), stream, params);
}

template <class Arithmetic>
bool launch_line_backward(LineBackwardParams params, const DeviceLimits& limits, cudaStream_t stream) {
  const auto bytes = [&](int pairs) {
    return LineWeights<Arithmetic>::shared_bytes(pairs, params.lines.length, params.lines.length);
  };
  int pairs = preferred_pairs<Arithmetic>(params.value, params.lines.count);
  while (pairs > 1 && bytes(pairs) > static_cast<size_t>(limits.shared_bytes)) {
    pairs /= 2;
  }
  if (params.lines.length > kMaxOwned || bytes(pairs) > static_cast<size_t>(limits.shared_bytes)) {
    return false;
  }
  int64_t blocks = cut_lines(params.lines, pairs, params.lines.length);
  while (pairs > 1 && blocks < limits.multiprocessors) { // narrower strips, but on more multiprocessors
    pairs /= 2;
    blocks = cut_lines(params.lines, pairs, params.lines.length);
  }
  params.map_rows = params.lines.length;
  params.map_columns = round_up_16(params.lines.length);
  SEGATTN_LAUNCH(
      (line_backward_kernel<Arithmetic>), dim3(grid_blocks(blocks)), dim3(32 * kWarpsPerPair * pairs), bytes(pairs), stream,
      params);
  return true;
}

#define SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kWeight, kOwnsKeys)                 \
  template void launch_line_sum<Arithmetic, LineWeight::kWeight, kOwnsKeys>(         \
      LineSumParams, const DeviceLimits&, cudaStream_t);

#define SEGATTN_INSTANTIATE_LINES(Arithmetic)                                                                     \
  template void launch_line_statistics<Arithmetic>(LineStatisticsParams, const DeviceLimits&, cudaStream_t);      \
  template void launch_line_product<Arithmetic>(LineProductParams, const DeviceLimits&, cudaStream_t);            \
  template bool launch_line_backward<Arithmetic>(LineBackwardParams, const DeviceLimits&, cudaStream_t);          \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kGiven, false)                                                         \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kGiven, true)                                                          \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kSoftmax, false)                                                       \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kSoftmax, true)                                                        \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kGradient, false)                                                      \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kGradient, true)

} // namespace segattn
