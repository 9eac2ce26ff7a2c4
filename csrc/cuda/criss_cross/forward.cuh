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

  // visit(line, half, query, index into the factors) for those of the lane's queries that have factors, in missing
  // lines too: store_sums reads the factors of every line of the block.
  template <class Visit>
  __device__ __forceinline__ void for_factors(int query0, const Visit& visit) const {
    weights.for_queries(query0, [&](int line, int q, int half) {
      const int row = q - weights.first_query;
      if (row < weights.factor_pitch()) {
        visit(line, half, q, (2 * weights.block.pair() + line) * weights.factor_pitch() + row);
      }
    });
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
        for_factors(query0, [&](int line, int half, int, int at) {
          softmax.max_energy[line][half] = weights.own_factors()[at];
          softmax.sum[line][half] = Weights::Block::lane_column() == 0 ? weights.other_factors()[at] : Real(0);
        });
      }
      // A lane rescales only weights that it stored itself, and no other lane reads them yet: no barrier.
      softmax.update(d, query0, key0, [&](int line, int half, Real factor) {
        for (int k = 2 * Weights::Block::lane_column(); k < key0; k += 8) {
          if (T* element = weights.weight_at(line, softmax.query(query0, half), k)) {
            store_pair(element, to_accumulator(element[0]) * factor, to_accumulator(element[1]) * factor);
          }
        }
      });
      weights.for_queries(query0, [&](int line, int q, int half) {
        weights.for_keys(line, q, key0, [&](T* element, int j, int) {
          store_pair(element, d[line][j][2 * half], d[line][j][2 * half + 1]);
        });
      });
      softmax.reduce_lanes();
      __syncwarp();  // all four lanes of a query have read what its first lane overwrites
      if (Weights::Block::lane_column() == 0) {
        for_factors(query0, [&](int line, int half, int q, int at) {
          if (key0 + Shape::kTile < p.lines.length) {
            weights.own_factors()[at] = softmax.max_energy[line][half];
            weights.other_factors()[at] = softmax.sum[line][half];
            return;
          }
          if (!weights.query_exists(line, q) || q >= block.owned_end()) {
            weights.own_factors()[at] = weights.other_factors()[at] = 0;
            return;
          }
          const auto other = p.accumulate ? block.logsumexp(p.other_logsumexp, line, q) : Logsumexp<Real>{};
          const auto merged = softmax.merge(line, half, !p.accumulate, other);
          weights.own_factors()[at] = merged.factor;
          weights.other_factors()[at] = merged.other_factor;
          if (weights.channel_group() == 0) {
            block.store_logsumexp(p.logsumexp, line, q, merged.logsumexp);
          }
        });
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
