// logsumexp of the lines, for lines whose weights do not fit in shared memory.
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
    typename Block::Products d;
    block.multiply_features(d, p.query, p.key, block.owned_begin, first_key);
    softmax.update(d, block.owned_begin, first_key);
  }
  softmax.reduce_lanes();
  const int line = softmax.own_line(), query = softmax.query(block.owned_begin, softmax.own_half());
  if (query < block.owned_end() && block.first_line() + line < block.window.line_end) {
    const auto other =
        p.accumulate ? block.logsumexp(p.logsumexp, line, query) : Logsumexp<typename Arithmetic::Real>{};
    block.store_logsumexp(p.logsumexp, line, query, softmax.merge(!p.accumulate, other).logsumexp);
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

}  // namespace segattn::cuda
