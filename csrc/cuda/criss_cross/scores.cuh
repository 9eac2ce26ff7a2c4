// Kernels that make scores alone: the log-sum-exp of lines, and the map of affinity.
#pragma once

#include "cuda/criss_cross/online_softmax.cuh"

namespace segattn::cuda {

template <class Arithmetic>
__device__ __forceinline__ void line_statistics(
    const LineStatisticsParams& p, LineWord<typename Arithmetic::Element>* shared) {
  using Block = LineBlock<Arithmetic, StripShape>;
  const Block block(p.lines, shared, 1);
  LineSoftmax<Arithmetic, StripShape> softmax(block, static_cast<typename Arithmetic::Real>(p.scale));
  for (int first_key = 0; first_key < p.lines.length; first_key += Block::kTile) {
    typename Block::Scores d;
    block.multiply_features(d, p.query, p.key, block.owned_begin, first_key);
    softmax.take(d, block.owned_begin, first_key);
  }
  softmax.add_lanes();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int line = i / 2, half = i % 2, query = softmax.query(block.owned_begin, half);
    if (lane_index() % 4 == 0 && query < block.owned_end() && block.first_line() + line < block.window.line_end) {
      auto* result = block.scalar(p.logsumexp, line, query);
      *result = softmax.merged(line, half, p.merges ? result : nullptr).logsumexp;
    }
  }
}

template <class Arithmetic>
__device__ __forceinline__ void line_product(
    const LineProductParams& p, LineWord<typename Arithmetic::Element>* shared) {
  using T = typename Arithmetic::Element;
  using Real = typename Arithmetic::Real;
  using Block = LineBlock<Arithmetic, StripShape>;
  const Block block(p.lines, shared, 1);
  const int g = lane_index() / 4, t = lane_index() % 4;
  for (int first_key = 0; first_key < p.lines.length; first_key += Block::kTile) {
    typename Block::Scores d;
    block.multiply_features(d, p.query_side, p.key_side, block.owned_begin, first_key);
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      T* out = static_cast<T*>(p.map.data) + block.window.sample * p.map.batch_stride +
          (block.first_line() + line) * p.map.line_stride;
#pragma unroll
      for (int i = 0; i < Block::kTile / 2; ++i) {
        const int j = i / 4, e = i % 4;
        const int query = block.owned_begin + 16 * block.rank() + g + e / 2 * 8;
        const int key = first_key + 8 * j + 2 * t + e % 2;
        if (query < block.owned_end() && block.sees(line, query, key)) {
          const int channel = p.map.first + key - (p.lines.skips_self && key > query);
          out[channel * p.map.channel_stride + query * p.map.position_stride] = from_accumulator<T>(d[line][j][e]);
        }
      }
    }
  }
}

template <class Arithmetic>
__global__ void __launch_bounds__(kMaxLineThreads<Arithmetic, StripShape>)
    line_statistics_kernel(const LineStatisticsParams p) {
  if constexpr (kLineCompiled<Arithmetic>) {
    SEGATTN_DYNAMIC_SHARED(LineWord<typename Arithmetic::Element>, shared);
    line_statistics<Arithmetic>(p, shared);
  }
}

template <class Arithmetic>
__global__ void __launch_bounds__(kMaxLineThreads<Arithmetic, StripShape>)
    line_product_kernel(const LineProductParams p) {
  if constexpr (kLineCompiled<Arithmetic>) {
    SEGATTN_DYNAMIC_SHARED(LineWord<typename Arithmetic::Element>, shared);
    line_product<Arithmetic>(p, shared);
  }
}

}  // namespace segattn::cuda
