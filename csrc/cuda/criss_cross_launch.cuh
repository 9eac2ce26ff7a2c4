// How the lines are cut into blocks, and the launches.
#pragma once

#include <algorithm>

#include "criss_cross_launch.h"
#include "criss_cross_sum.cuh"

namespace segattn {

inline int divide_lines(int a, int b) { return (a + b - 1) / b; }

inline dim3 line_grid(int64_t blocks) { return dim3(static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX))); }

// Rows: one pair, so that as many blocks as possible share the work. Columns: as many neighbours as a block can have.
template <class T>
int preferred_pairs(const LineFeatures& features, int lines) {
  const bool columns = features.line_stride < features.position_stride;
  return std::min(columns ? kMaxPairs<T> : 1, lines > 4 ? 4 : lines > 2 ? 2 : 1);
}

inline int64_t cut_lines(Lines& lines, int pairs, int owned) {
  lines.pairs = pairs;
  lines.line_blocks = divide_lines(lines.count, 2 * pairs);
  lines.owned_blocks = divide_lines(lines.length, owned);
  lines.owned = divide_lines(lines.length, lines.owned_blocks);
  return lines.batch * lines.line_blocks * lines.owned_blocks;
}

template <class T>
size_t stage_bytes(int pairs) {
  const int planes = pairs * 2 / kLinesPerPlane<T>;
  return sizeof(LineWord<T>) * planes * (plane_words(planes, kLineChannels) + plane_padding(planes));
}

// For the kernels without a map tile: 64 queries a block.
template <class T>
int64_t cut_products(Lines& lines, const LineFeatures& features, const DeviceLimits& limits) {
  int pairs = preferred_pairs<T>(features, lines.count);
  while (pairs > 1 && stage_bytes<T>(pairs) > static_cast<size_t>(limits.shared_bytes)) {
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
  using T = typename Arithmetic::Element;
  const int64_t blocks = cut_products<T>(params.lines, params.query, limits);
  SEGATTN_LAUNCH(
      (line_statistics_kernel<Arithmetic>), line_grid(blocks), dim3(32 * kWarpsPerPair * params.lines.pairs),
      stage_bytes<T>(params.lines.pairs), stream, params);
}

template <class Arithmetic>
void launch_line_product(LineProductParams params, const DeviceLimits& limits, cudaStream_t stream) {
  using T = typename Arithmetic::Element;
  const int64_t blocks = cut_products<T>(params.lines, params.query_side, limits);
  SEGATTN_LAUNCH(
      (line_product_kernel<Arithmetic>), line_grid(blocks), dim3(32 * kWarpsPerPair * params.lines.pairs),
      stage_bytes<T>(params.lines.pairs), stream, params);
}

// Chooses pairs of lines, owned positions and parts; returns the blocks, channel groups not counted. Better few lines a
// block than few owned positions, and better few owned positions than parts, which meet in the output.
template <class Sum>
int64_t cut_sums(LineSumParams& params, const DeviceLimits& limits) {
  using T = typename Sum::T;
  Lines& lines = params.lines;
  const size_t room = static_cast<size_t>(limits.shared_bytes);
  const int least = std::min(lines.length, 16);
  for (params.part = lines.length; params.part > 0; params.part = (params.part - 1) / kLineTile * kLineTile) {
    for (int pairs = preferred_pairs<T>(params.output, lines.count); pairs >= 1; pairs /= 2) {
      int owned = std::min(lines.length, kMaxOwned);
      while (owned >= least && Sum::shared_bytes(pairs, owned, params.part) > room) {
        --owned;
      }
      if (owned >= least) {
        return cut_lines(lines, pairs, owned);
      }
    }
  }
  throw std::runtime_error(
      "segattn_ops: the criss-cross kernels need " + std::to_string(Sum::shared_bytes(1, 16, kLineTile)) +
      " bytes of shared memory, this device has " + std::to_string(room));
}

template <class Arithmetic, LineWeight kWeight, bool kOwnsKeys>
void launch_line_sum(LineSumParams params, const DeviceLimits& limits, cudaStream_t stream) {
  using Sum = LineSum<Arithmetic, kWeight, kOwnsKeys>;
  Lines& lines = params.lines;
  int64_t blocks = cut_sums<Sum>(params, limits);
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
  SEGATTN_LAUNCH(
      (line_sum_kernel<Arithmetic, kWeight, kOwnsKeys>), line_grid(blocks * params.channel_groups),
      dim3(32 * kWarpsPerPair * lines.pairs),
      Sum::shared_bytes(lines.pairs, lines.owned, params.part), stream, params);
}

#define SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kWeight, kOwnsKeys)                 \
  template void launch_line_sum<Arithmetic, LineWeight::kWeight, kOwnsKeys>(         \
      LineSumParams, const DeviceLimits&, cudaStream_t);

#define SEGATTN_INSTANTIATE_LINES(Arithmetic)                                                                     \
  template void launch_line_statistics<Arithmetic>(LineStatisticsParams, const DeviceLimits&, cudaStream_t);      \
  template void launch_line_product<Arithmetic>(LineProductParams, const DeviceLimits&, cudaStream_t);            \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kGiven, false)                                                         \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kGiven, true)                                                          \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kSoftmax, false)                                                       \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kSoftmax, true)                                                        \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kGradient, false)                                                      \
  SEGATTN_INSTANTIATE_LINE_SUM(Arithmetic, kGradient, true)

} // namespace segattn
