// The weights of position attention's weighted sum (weighted_sum.cuh): every warp makes the scores of its own 16
// positions with a step's streamed positions, turns them into weights and leaves these in shared memory for all warps.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"
#include "cuda/common/math.h"
#include "cuda/common/mma.cuh"
#include "cuda/common/tile.cuh"
#include "cuda/position/params.h"
#include "cuda/position/weighted_sum_traits.cuh"

namespace segattn::cuda {

template <class Traits_, PositionSum kSum>
struct WeightedSumWeights {
  using Traits = Traits_;
  using Mma = typename Traits::Mma;
  using StreamedTile = typename Traits::StreamedTile;
  static constexpr int kScoreTiles = Traits::kStreamed / 8;
  // Weights may reach e^5.5 = 245 before the accumulators are rescaled to the new maximum: after the first few steps
  // they almost never are, and a float16 weight stays finite.
  static constexpr float kRescaleAbove = 5.5f;
  // The value gradient's weights are about 1 / positions: multiplied by 2^10 they are normal numbers in float16.
  static constexpr int kWeightExponent = 10;
  static constexpr float kWeightUnit = 1.0f / (1 << kWeightExponent);

  const WeightedSumParams& p;
  unsigned char* owned_shared;
  unsigned char* streamed_shared;
  unsigned char* weight_shared;
  float* factors;  // [2][kOwned]: by what the step's new maximum scales what was summed before
  int* changed;    // [2][kWarps]: whether any of a warp's 16 factors is not 1
  const float* streamed_logsumexp;
  int embedding_rows;
  int first_step, end_step;

  typename Mma::A owned_fragments[Traits::kScoreSteps > 0 ? Traits::kScoreSteps : 1];
  float scores[1][kScoreTiles][4];
  float row_max[2], row_sum[2];  // of rows g and g + 8 of the warp's 16 positions

  __device__ __forceinline__ explicit WeightedSumWeights(const WeightedSumParams& params) : p(params) {
    row_max[0] = row_max[1] = -INFINITY;
    row_sum[0] = row_sum[1] = 0.0f;
  }

  __device__ __forceinline__ void load_owned_fragments() {
    const typename Traits::OwnedTile tile(owned_shared);
#pragma unroll
    for (int k = 0; k < Traits::kScoreSteps; ++k) {
      Mma::load_a_column(owned_fragments[k], tile, 16 * warp_index(), k * Mma::kStep);
    }
  }

  __device__ __forceinline__ void multiply_scores(int step) {
    const StreamedTile tile(
        streamed_shared + (step - first_step) % Traits::kStages * StreamedTile::bytes(embedding_rows));
#pragma unroll
    for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        scores[0][j][c] = 0.0f;
      }
    }
    if constexpr (Traits::kScoreSteps > 0) {
#pragma unroll
      for (int k = 0; k < Traits::kScoreSteps; ++k) {
        if (k * Mma::kStep < p.key_channels) {
#pragma unroll
          for (int j = 0; j < kScoreTiles; j += 2) {
            typename Mma::B b;
            Mma::load_b_row(b, tile, k * Mma::kStep, 8 * j);
            Mma::multiply(scores[0][j], owned_fragments[k], b, 0);
            Mma::multiply(scores[0][j + 1], owned_fragments[k], b, 1);
          }
        }
      }
    } else {
      multiply_tiles<Mma, Major::kColumn, Major::kRow, 1>(
          scores, typename Traits::OwnedTile(owned_shared), 16 * warp_index(), tile, 0, 0, embedding_rows);
    }
  }

  // Scores become weights, in registers; positions past the end weigh nothing. The change to base 2 comes after the
  // subtraction: before it, its rounding error would grow with the scores.
  __device__ __forceinline__ void make_weights(int step) {
    const int column = step * Traits::kStreamed + lane_index() % 4 * 2;
    const bool edge = (step + 1) * Traits::kStreamed > p.streamed_positions;
#pragma unroll
    for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float& s = scores[0][j][c];
        s *= p.scale;
        if (edge && column + 8 * j + c % 2 >= p.streamed_positions) {
          s = -INFINITY;
        }
      }
    }
    if constexpr (kSum == PositionSum::kForward) {
      softmax_step(step);
    } else {
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int position = min(column + 8 * j + c, p.streamed_positions - 1);
          const float shift = streamed_logsumexp[position];
          scores[0][j][c] = ptx::exp2_approx((scores[0][j][c] - shift) * kLog2E + kWeightExponent);
          scores[0][j][c + 2] = ptx::exp2_approx((scores[0][j][c + 2] - shift) * kLog2E + kWeightExponent);
        }
      }
    }
  }

  __device__ __forceinline__ void softmax_step(int step) {
    const int lane = lane_index();
    bool any_changed = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float highest = -INFINITY;
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
        highest = fmaxf(highest, fmaxf(scores[0][j][2 * h], scores[0][j][2 * h + 1]));
      }
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      const float before = row_max[h];
      row_max[h] = highest > before + kRescaleAbove ? highest : before;
      // all scores so far are -inf: any finite shift gives weights of zero, -inf itself would give NaN
      const float shift = row_max[h] == -INFINITY ? 0.0f : row_max[h];
      const float factor = ptx::exp2_approx((before - shift) * kLog2E);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
        for (int c = 2 * h; c < 2 * h + 2; ++c) {
          scores[0][j][c] = ptx::exp2_approx((scores[0][j][c] - shift) * kLog2E);
          sum += scores[0][j][c];
        }
      }
      row_sum[h] = row_sum[h] * factor + sum;
      any_changed |= factor != 1.0f;
      if (lane % 4 == 0) {
        factors[step % 2 * Traits::kOwned + 16 * warp_index() + lane / 4 + 8 * h] = factor;
      }
    }
    any_changed = __any_sync(0xffffffffu, any_changed);
    if (lane == 0) {
      changed[step % 2 * Traits::kWarps + warp_index()] = any_changed && step > first_step;
    }
  }

  __device__ __forceinline__ void store_weights(int step) {
    const int lane = lane_index();
    const StreamedTile tile(weight_shared + step % 2 * Traits::kWeightBytes);
    const int row = 16 * warp_index() + lane / 4;
#pragma unroll
    for (int j = 0; j < kScoreTiles; ++j) {
      store_pair(tile.at(row, 8 * j + lane % 4 * 2), scores[0][j][0], scores[0][j][1]);
      store_pair(tile.at(row + 8, 8 * j + lane % 4 * 2), scores[0][j][2], scores[0][j][3]);
    }
  }
};

}  // namespace segattn::cuda
