// The softmax of a warp's queries while their keys come a tile at a time, and how the two lines of a query meet.
#pragma once

#include "cuda/criss_cross/line_block.cuh"

namespace segattn::cuda {

// Of a query whose result over the other line is known: the log-sum-exp of both, and what the two weighted sums are
// multiplied with (the other line's are exp(score - its log-sum-exp), this line's exp(score - highest)).
template <class Real>
struct MergeFactors {
  Real logsumexp;
  Real other_factor;
  Real factor;
};

// The lane's queries are `query(first, half)` of both lines.
template <class Arithmetic, class Shape>
struct LineSoftmax {
  using Block = LineBlock<Arithmetic, Shape>;
  using Real = typename Arithmetic::Real;
  static constexpr Real kNone = -static_cast<Real>(INFINITY);

  const Block& block;
  Real scale;
  Real highest[2][2];  // score so far: [line][half]; the same for the four lanes of a query
  Real sum[2][2];      // of exp(score - highest), over the lane's own keys

  __device__ __forceinline__ LineSoftmax(const Block& block_, Real scale_) : block(block_), scale(scale_) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      highest[i / 2][i % 2] = kNone;
      sum[i / 2][i % 2] = 0;
    }
  }

  __device__ __forceinline__ int query(int first_query, int half) const {
    return first_query + 16 * block.rank() + opaque(lane_index()) / 4 + 8 * half;
  }

  // Takes a tile of products of query and key; d becomes exp(scale * d - highest), 0 where the query does not see the
  // key. `lower(line, half, factor)` is called where that puts earlier keys' weights too high, by 1 / factor.
  template <class Lower>
  __device__ __forceinline__ void take(typename Block::Scores& d, int first_query, int first_key, const Lower& lower) {
    const int t = opaque(lane_index()) % 4;
#pragma unroll
    for (int line = 0; line < 2; ++line) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Real top = highest[line][half];
#pragma unroll
        for (int j = 0; j < Shape::kTile / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            Real& x = d[line][j][2 * half + e];
            x = block.sees(line, query(first_query, half), first_key + 8 * j + 2 * t + e) ? x * scale : kNone;
            top = fmax(top, x);
          }
        }
        top = fmax(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmax(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const Real shift = top == kNone ? Real(0) : top;
        const Real factor = line_exp(highest[line][half] - shift);
        if (first_key > 0 && top > highest[line][half]) {
          lower(line, half, factor);
        }
        Real total = sum[line][half] * factor;
#pragma unroll
        for (int j = 0; j < Shape::kTile / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            Real& x = d[line][j][2 * half + e];
            x = line_exp(x - shift);
            total += x;
            serialize(total);
          }
        }
        highest[line][half] = top;
        sum[line][half] = total;
      }
    }
  }
  __device__ __forceinline__ void take(typename Block::Scores& d, int first_query, int first_key) {
    take(d, first_query, first_key, [](int, int, Real) {});
  }

  // Sums up the four lanes of each query, in each of them.
  __device__ __forceinline__ void add_lanes() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Real& total = sum[i / 2][i % 2];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
    }
  }

  // other: the other line's log-sum-exp, or null: there is none
  __device__ __forceinline__ MergeFactors<Real> merged(int line, int half, const Real* other) const {
    const Real top = highest[line][half], total = sum[line][half];
    if (other == nullptr) {
      return {top + log(total), 0, 1 / total};
    }
    const Real before = *other, common = fmax(before, top);
    const Real theirs = line_exp(before - common), ours = line_exp(top - common);
    const Real both = theirs + total * ours;
    return {common + log(both), theirs / both, ours / both};
  }
};

}  // namespace segattn::cuda
