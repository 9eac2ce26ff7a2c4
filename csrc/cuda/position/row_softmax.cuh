// The softmax of rows of energies in mma's accumulator layout (mma.cuh): what the weighted sums on mma.sync
// (weighted_sum.cuh) and on wgmma (wgmma/weighted_sum.cuh) share. A thread has two rows, and four lanes share a row.
#pragma once

#include <cfloat>

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/position/params.h"

namespace segattn::cuda {

// The accumulators are rescaled to a new maximum only if weights would exceed 2^8. This almost never happens after the
// first few steps, and float16 weights stay finite.
constexpr float kRescaleAbove = 8.0f;
// The weights of the value gradient are about 1 / positions. A factor of 2^10 makes them normal numbers in float16.
constexpr int kWeightExponent = 10;
constexpr float kWeightUnit = 1.0f / (1 << kWeightExponent);

// Sets the elements of the columns from `columns` on. energies: (16 x 8 kTiles)
template <int kTiles>
__device__ __forceinline__ void mask_columns(float (&energies)[kTiles][4], int columns, float value) {
  const int left = columns - lane_index() % 4 * 2;
  if (left < 8 * kTiles) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        energies[j][c] = 8 * j + c % 2 < left ? energies[j][c] : value;
      }
    }
  }
}

// Of the four lanes that share a row.
__device__ __forceinline__ float sum_of_row(float sum) {
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  return sum;
}

// The logsumexp of a row, and what it is rounded from: row_max * ln2 + rest.
struct RowLogsumexp {
  float rounded, rest;

  __device__ __forceinline__ RowLogsumexp(float row_max, float row_sum, const WeightedSumParams& p) {
    rest = __fmaf_rn(row_max, p.ln2_low, logf(row_sum));
    rounded = __fmaf_rn(row_max, p.ln2, rest);
  }
};

// kRoundsWeights: the products take weights rounded to TF32, which are rounded here.
template <bool kRoundsWeights>
struct RowSoftmax {
  // Of rows g and g + 8 of the warp's 16 positions. The maximum is of the energies times log2(e), and finite: -inf less
  // -inf would be NaN.
  float row_max[2], row_sum[2];
  // kRoundsWeights: the sums of the rounded weights. The output is divided by them, so that a row with one large
  // weight has the value of that weight, as if delta were summed from P and dP. The logsumexp is not.
  float rounded_sum[2];

  __device__ __forceinline__ RowSoftmax() {
    row_max[0] = row_max[1] = -FLT_MAX;
    row_sum[0] = row_sum[1] = rounded_sum[0] = rounded_sum[1] = 0.0f;
  }

  // A weight as the products take it.
  static __device__ __forceinline__ float rounded(float weight) {
    if constexpr (kRoundsWeights) {
      return round_to_tf32(weight);
    } else {
      return weight;
    }
  }

  // Turns a step's q.k into weights, in place, and adds them to the sums. Columns from `columns` on have weight 0.
  // take_growth(g): whether the maximum grows in any row of the warp; before it, if so, take_factor(h, factor) for both
  // rows: the factor of earlier sums.
  //
  // In base 2: q.k times scale_log2 less the maximum is rounded once, and the rounding of scale_log2 is the same for
  // all energies (WeightedSumParams).
  template <int kTiles, class TakeFactor, class TakeGrowth>
  __device__ __forceinline__ void compute_weights(
      float (&energies)[kTiles][4], int columns, const WeightedSumParams& p, const TakeFactor& take_factor,
      const TakeGrowth& take_growth) {
    if (p.scale < 0.0f) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          energies[j][c] = -energies[j][c];
        }
      }
    }
    mask_columns(energies, columns, -INFINITY);
    float step_max[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = fmaxf(energies[0][2 * h], energies[0][2 * h + 1]);
#pragma unroll
      for (int j = 1; j < kTiles; ++j) {
        most = fmaxf(most, fmaxf(energies[j][2 * h], energies[j][2 * h + 1]));
      }
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      step_max[h] = most * p.scale_log2;
    }
    const bool grows = step_max[0] > row_max[0] + kRescaleAbove || step_max[1] > row_max[1] + kRescaleAbove;
    const bool any_grows = __any_sync(0xffffffffu, grows);
    if (any_grows) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float before = row_max[h];
        row_max[h] = step_max[h] > before + kRescaleAbove ? step_max[h] : before;
        const float factor = ptx::exp2_approx(before - row_max[h]);
        row_sum[h] *= factor;
        rounded_sum[h] *= factor;
        take_factor(h, factor);
      }
    }
    take_growth(any_grows);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int c = 2 * h; c < 2 * h + 2; ++c) {
          const float weight = ptx::exp2_approx(__fmaf_rn(energies[j][c], p.scale_log2, -row_max[h]));
          row_sum[h] += weight;
          energies[j][c] = rounded(weight);
          if constexpr (kRoundsWeights) {
            rounded_sum[h] += energies[j][c];
          }
        }
      }
    }
  }
};

}  // namespace segattn::cuda
