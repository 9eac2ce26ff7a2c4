// Criss-cross attention over one direction in one kernel, for lines whose weights fit in shared memory. The first
// direction writes its own normalised result and logsumexp; the second merges its own with them.
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
    return Weights::shared_bytes(pairs, queries, keys) + Weights::factor_bytes(pairs, queries);
  }

  // For the warp's queries from query0 on: the weights exp(energy - max_energy), the factors of their sums, and
  // logsumexp. The products leave no registers for max_energy and sum: between two tiles of keys both are kept in the
  // factors' memory.
  __device__ __forceinline__ void compute_weights(int query0) {
    const auto& block = weights.block;
    for (int key0 = 0; key0 < p.lines.length; key0 += Shape::kTile) {
      typename Weights::Products d;
      block.multiply_features(d, p.query, p.key, query0, key0);
      LineSoftmax<Arithmetic, Shape> softmax(block, static_cast<Real>(p.scale));
      if (key0 > 0) {
        weights.for_queries(query0, [&](int line, int q, int half) {
          const int row = q - weights.first_query;
          if (row < weights.factor_pitch()) {
            const int at = (2 * block.pair() + line) * weights.factor_pitch() + row;
            softmax.max_energy[line][half] = weights.own_factors()[at];
            softmax.sum[line][half] = Weights::Block::lane_column() == 0 ? weights.other_factors()[at] : Real(0);
          }
        });
      }
      // A lane rescales only weights that it stored itself, and no other lane reads them yet: no barrier.
      softmax.update(d, query0, key0, [&](int line, int half, Real factor) {
        const int row = softmax.query(query0, half) - weights.first_query, column = 2 * Weights::Block::lane_column();
        if (row < p.weight_rows) {
          T* const elements = weights.weights_of(2 * block.pair() + line) + row * weights.pitch();
          for (int k = column; k < key0; k += 8) {
            T* const pair = elements + k;
            store_pair(pair, to_accumulator(pair[0]) * factor, to_accumulator(pair[1]) * factor);
          }
        }
      });
      weights.for_queries(query0, [&](int line, int q, int half) {
        weights.for_keys(line, q, key0, [&](T* element, int j, int) {
          store_pair(element, d[line][j][2 * half], d[line][j][2 * half + 1]);
        });
      });
      softmax.reduce_lanes();
      __syncwarp();  // all four lanes of a query have read what one of them overwrites
      const int line = softmax.own_line(), q = softmax.query(query0, softmax.own_half());
      const int row = q - weights.first_query;
      if (row < weights.factor_pitch()) {
        const int at = (2 * block.pair() + line) * weights.factor_pitch() + row;
        Real& factor = weights.own_factors()[at];
        Real& other_factor = weights.other_factors()[at];
        if (key0 + Shape::kTile < p.lines.length) {
          factor = softmax.own(softmax.max_energy);
          other_factor = softmax.own(softmax.sum);
        } else if (!weights.query_exists(line, q) || q >= block.owned_end()) {  // store_sums reads these factors, too
          factor = other_factor = 0;
        } else {
          const auto other = p.accumulate ? block.logsumexp(p.other_logsumexp, line, q) : Logsumexp<Real>{};
          const auto merged = softmax.merge(!p.accumulate, other);
          factor = merged.factor;
          other_factor = merged.other_factor;
          if (weights.channel_group() == 0) {
            block.store_logsumexp(p.logsumexp, line, q, merged.logsumexp);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    for (int q = 0; q < p.weight_rows; q += Shape::kTile) {
      compute_weights(weights.first_query + q);
    }
    weights.template sum_values<LineOwner::kQueries, MergeScale::kFactors>(
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
