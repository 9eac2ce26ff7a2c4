// Online softmax of a warp's queries over tiles of keys, and its merge with the softmax over the other direction.
#pragma once

#include <cfloat>

#include "cuda/criss_cross/line_block.cuh"

namespace segattn::cuda {

// The logsumexp of a query over both directions, and the factors that bring the weighted sums of either to it. The
// other direction's weights are exp(energy - its logsumexp), those of this line exp(energy - max_energy).
template <class Real>
struct MergeFactors {
  Logsumexp<Real> logsumexp;
  Real other_factor;
  Real factor;
};

// The lane's queries are `query(first_query, half)` of both lines.
template <class Arithmetic, class Shape>
struct LineSoftmax {
  using Block = LineBlock<Arithmetic, Shape>;
  using Real = typename Arithmetic::Real;
  static constexpr Real kMinusInfinity = -static_cast<Real>(INFINITY);
  // Stands for a scale of 0, which times `excluded` would be NaN. The energies are 0 up to rounding with it, too.
  static constexpr Real kSmallest = sizeof(Real) == 4 ? Real(FLT_MIN) : Real(DBL_MIN);

  const Block& block;
  Real scale;
  Real excluded;          // the product of a key that the query does not attend to; its energy is -inf
  Real max_energy[2][2];  // so far: [line][half]; the same in the four lanes of a query
  Real sum[2][2];         // of exp(energy - max_energy), over the lane's own keys

  __device__ __forceinline__ LineSoftmax(const Block& block_, Real scale_)
      : block(block_),
        scale(scale_ == 0 ? kSmallest : scale_),
        excluded(scale_ < 0 ? -kMinusInfinity : kMinusInfinity) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      max_energy[i / 2][i % 2] = kMinusInfinity;
      sum[i / 2][i % 2] = 0;
    }
  }

  __device__ __forceinline__ int query(int first_query, int half) const {
    return first_query + 16 * block.rank() + block.lane_row() + 8 * half;
  }

  // Adds a tile of products of query and key. d becomes exp(scale * d - max_energy), or 0 where the query does not
  // attend to the key. Where the maximum rises, rescale(line, half, factor) multiplies the weights of earlier keys by
  // factor.
  template <class Rescale>
  __device__ __forceinline__ void update(
      typename Block::Products& d, int first_query, int first_key, const Rescale& rescale) {
    block.mask(d, first_query, first_key, excluded);
#pragma unroll
    for (int line = 0; line < 2; ++line) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Real product = excluded;  // the one of the largest energy
        if (scale > 0) {
#pragma unroll
          for (int j = 0; j < Shape::kTile / 8; ++j) {
            product = fmax(product, fmax(d[line][j][2 * half], d[line][j][2 * half + 1]));
          }
        } else {
#pragma unroll
          for (int j = 0; j < Shape::kTile / 8; ++j) {
            product = fmin(product, fmin(d[line][j][2 * half], d[line][j][2 * half + 1]));
          }
        }
        Real new_max = fmax(max_energy[line][half], product * scale);
        new_max = fmax(new_max, __shfl_xor_sync(0xffffffffu, new_max, 1));
        new_max = fmax(new_max, __shfl_xor_sync(0xffffffffu, new_max, 2));
        const Real shift = new_max == kMinusInfinity ? Real(0) : new_max;
        const Real factor = line_exp(max_energy[line][half] - shift);
        if (first_key > 0 && new_max > max_energy[line][half]) {
          rescale(line, half, factor);
        }
        Real total = sum[line][half] * factor;
#pragma unroll
        for (int j = 0; j < Shape::kTile / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            Real& x = d[line][j][2 * half + e];
            x = line_exp(shifted_energy(x, scale, shift));
            total += x;
            serialize(total);
          }
        }
        max_energy[line][half] = new_max;
        sum[line][half] = total;
      }
    }
  }
  __device__ __forceinline__ void update(typename Block::Products& d, int first_query, int first_key) {
    update(d, first_query, first_key, [](int, int, Real) {});
  }

  // Leaves the sum over the four lanes of a query in each of them.
  __device__ __forceinline__ void reduce_lanes() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Real& total = sum[i / 2][i % 2];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
    }
  }

  // After reduce_lanes each of the four lanes that have the same queries continues with one of the four: own_half() of
  // own_line().
  __device__ __forceinline__ int own_line() const { return block.lane_column() / 2; }
  __device__ __forceinline__ int own_half() const { return block.lane_column() % 2; }
  __device__ __forceinline__ Real own(const Real (&values)[2][2]) const {
    const Real of_line[2] = {
        own_half() == 0 ? values[0][0] : values[0][1], own_half() == 0 ? values[1][0] : values[1][1]};
    return own_line() == 0 ? of_line[0] : of_line[1];
  }

  // other: of the other direction, unless this is the first
  __device__ __forceinline__ MergeFactors<Real> merge(bool is_first, Logsumexp<Real> other) const {
    const Real own_max = own(max_energy), own_sum = own(sum);
    if (is_first) {
      // Energies of -inf throughout a column do not count if the row has others.
      const bool no_column = own_sum == 0 && block.lines.skips_self;
      return {split_logsumexp(own_max, own_sum), 0, no_column ? 0 : 1 / own_sum};
    }
    const Real common_max = fmax(other.value, own_max);
    const Real other_scale = line_exp(other.value - common_max, -other.low);
    const Real own_scale = line_exp(own_max - common_max);
    const Real total = other_scale + own_sum * own_scale;
    return {split_logsumexp(common_max, total), other_scale / total, own_scale / total};
  }
};

}  // namespace segattn::cuda
