// Products of every query with the keys of its line: affinity, and the gradient of aggregation's weights.
#pragma once

#include "cuda/criss_cross/line_block.cuh"

namespace segattn::cuda {

template <class Arithmetic>
__device__ __forceinline__ void line_product(
    const LineProductParams& p, LineWord<typename Arithmetic::Element>* shared) {
  using T = typename Arithmetic::Element;
  using Block = LineBlock<Arithmetic, StripShape>;
  const Block block(p.lines, shared, 1);
  const int g = lane_index() / 4, t = lane_index() % 4;
  for (int first_key = 0; first_key < p.lines.length; first_key += Block::kTile) {
    typename Block::Products d;
    block.multiply_features(d, p.query_side, p.key_side, block.owned_begin, first_key);
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      T* out = static_cast<T*>(p.affinity.data) + block.window.sample * p.affinity.batch_stride +
          (block.first_line() + line) * p.affinity.line_stride;
#pragma unroll
      for (int i = 0; i < Block::kTile / 2; ++i) {
        const int j = i / 4, e = i % 4;
        const int query = block.owned_begin + 16 * block.rank() + g + e / 2 * 8;
        const int key = first_key + 8 * j + 2 * t + e % 2;
        if (query < block.owned_end() && block.attended(line, query).contain(key)) {
          const int channel = p.affinity.first_channel + key - (p.lines.skips_self && key > query);
          out[channel * p.affinity.channel_stride + query * p.affinity.position_stride] =
              from_accumulator<T>(d[line][j][e]);
        }
      }
    }
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
