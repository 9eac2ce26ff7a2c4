// Criss-cross attention over one direction in one kernel, where a query's weights for its whole line fit shared memory.
// The first direction leaves its own normalised result and log-sum-exp, the second merges its own with them.
#pragma once

#include "cuda/criss_cross/line_weights.cuh"
#include "cuda/criss_cross/online_softmax.cuh"

namespace segattn::cuda {

template <class Arithmetic, class Shape>
struct LineAttention {
  using T = typename Arithmetic::Element;
  using Real = typename Arithmetic::Real;
  using Weights = LineWeights<Arithmetic, Shape>;

  const LineAttentionParams& p;
  Weights weights;

  __device__ __forceinline__ LineAttention(const LineAttentionParams& params, LineWord<T>* shared)
      : p(params), weights(params, shared) {
    weights.first_query = weights.block.owned_begin;
  }

  static constexpr size_t shared_bytes(int pairs, int queries, int keys) {
    return Weights::shared_bytes(pairs, queries, keys) + 2 * sizeof(Real) * 2 * pairs * queries;
  }

  // visit(line, half, query, its index among the factors) for the lane's queries, where there is such a line and query
  template <class Visit>
  __device__ __forceinline__ void for_own_queries(int query0, const Visit& visit) const {
    weights.for_queries(query0, [&](int line, int q, int half) {
      if (q < weights.block.owned_end() && weights.inside(line, q)) {
        visit(line, half, q, (2 * weights.block.pair() + line) * p.map_rows + q - weights.first_query);
      }
    });
  }

  // The warp's queries from query0 on: weights exp(score - highest), the factors that sums by them take, log-sum-exp.
  // Between two tiles of keys, highest and sum are where the factors will be: products leave no registers for them.
  __device__ __forceinline__ void make_weights(int query0) {
    const auto& block = weights.block;
    for (int key0 = 0; key0 < p.lines.length; key0 += Shape::kTile) {
      typename Weights::Scores d;
      block.multiply_features(d, p.query, p.key, query0, key0);
      LineSoftmax<Arithmetic, Shape> softmax(block, static_cast<Real>(p.scale));
      if (key0 > 0) {
        for_own_queries(query0, [&](int line, int half, int, int at) {
          softmax.highest[line][half] = weights.factors(0)[at];
          softmax.sum[line][half] = opaque(lane_index()) % 4 == 0 ? weights.factors(1)[at] : Real(0);
        });
      }
      // The weights of earlier keys are where this lane has put them: nobody else reads them yet.
      softmax.take(d, query0, key0, [&](int line, int half, Real factor) {
        for (int k = 2 * (opaque(lane_index()) % 4); k < key0; k += 8) {
          if (T* element = weights.map_element(line, softmax.query(query0, half), k)) {
            store_pair(element, to_accumulator(element[0]) * factor, to_accumulator(element[1]) * factor);
          }
        }
      });
      weights.for_queries(query0, [&](int line, int q, int half) {
        weights.for_keys(line, q, key0, [&](T* element, int j, int) {
          store_pair(element, d[line][j][2 * half], d[line][j][2 * half + 1]);
        });
      });
      softmax.add_lanes();
      __syncwarp();  // all four lanes of a query have read what the first now replaces
      if (opaque(lane_index()) % 4 == 0) {
        for_own_queries(query0, [&](int line, int half, int q, int at) {
          if (key0 + Shape::kTile < p.lines.length) {
            weights.factors(0)[at] = softmax.highest[line][half];
            weights.factors(1)[at] = softmax.sum[line][half];
            return;
          }
          const auto meeting = softmax.merged(line, half, p.accumulate ? block.scalar(p.other, line, q) : nullptr);
          weights.factors(0)[at] = meeting.factor;
          weights.factors(1)[at] = meeting.other_factor;
          if (weights.group() == 0) {
            *block.scalar(p.logsumexp, line, q) = meeting.logsumexp;
          }
        });
      }
    }
  }

  __device__ __forceinline__ void run() {
    for (int q = 0; q < p.map_rows; q += Shape::kTile) {
      make_weights(weights.first_query + q);
    }
    weights.template apply<LineOwner::kQueries, MergeScale::kFactors>(
        p.values, p.output, 0, p.lines.length, p.accumulate);
  }
};

template <class Arithmetic, class Shape>
__global__ void __launch_bounds__(kMaxLineThreads<Arithmetic, Shape>)
    line_attention_kernel(const LineAttentionParams p) {
  if constexpr (kLineCompiled<Arithmetic>) {
    SEGATTN_DYNAMIC_SHARED(LineWord<typename Arithmetic::Element>, shared);
    LineAttention<Arithmetic, Shape>(p, shared).run();
  }
}

}  // namespace segattn::cuda
