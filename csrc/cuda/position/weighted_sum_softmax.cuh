// The weights of position attention's weighted sum (weighted_sum.cuh). In every step, a warp computes the energies of
// its own 16 positions with the streamed positions, turns them into weights and stores these in shared memory for all
// warps.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"
#include "cuda/common/math.h"
#include "cuda/common/mma.cuh"
#include "cuda/common/tile.cuh"
#include "cuda/position/params.h"
#include "cuda/position/weighted_sum_traits.cuh"

namespace segattn::cuda {

template <class Traits_, PositionSum kSum, Keys kKeys>
struct WeightedSumSoftmax {
  using Traits = Traits_;
  using Mma = typename Traits::Mma;
  using StreamedTile = typename Traits::StreamedTile;
  static constexpr int kEnergyTiles = Traits::kStreamed / 8;
  // The accumulators are rescaled to a new maximum only if weights would exceed e^5.5 = 245. This almost never happens
  // after the first few steps, and float16 weights stay finite.
  static constexpr float kRescaleAbove = 5.5f;
  // The weights of the value gradient are about 1 / positions. A factor of 2^10 makes them normal numbers in float16.
  static constexpr int kWeightExponent = 10;
  static constexpr float kWeightUnit = 1.0f / (1 << kWeightExponent);

  const WeightedSumParams& p;
  unsigned char* owned_shared;
  unsigned char* streamed_shared;
  unsigned char* weight_shared;
  float* factors;  // [2][kOwned]: the factor that rescales earlier sums to the step's maximum
  int* rescales;   // [2][kWarps]: whether any of a warp's 16 factors is not 1
  const float* streamed_logsumexp;
  int key_channel_rows;
  int first_step, end_step;
  int key_count;  // Keys::kKept: of the sample

  typename Mma::A owned_fragments[Traits::kResidentSteps > 0 ? Traits::kResidentSteps : 1];
  float energies[1][kEnergyTiles][4];  // q.k, then the energies, then the weights, all in place
  float row_max[2], row_sum[2];        // of rows g and g + 8 of the warp's 16 positions

  __device__ __forceinline__ explicit WeightedSumSoftmax(const WeightedSumParams& params) : p(params) {
    row_max[0] = row_max[1] = -INFINITY;
    row_sum[0] = row_sum[1] = 0.0f;
  }

  __device__ __forceinline__ int streamed_positions() const {
    if constexpr (kKeys == Keys::kKept) {
      return key_count;
    } else {
      return p.streamed_positions;
    }
  }

  __device__ __forceinline__ void load_owned_fragments() {
    const auto position = Mma::a_column(typename Traits::OwnedTile(owned_shared), 16 * warp_index());
#pragma unroll
    for (int k = 0; k < Traits::kResidentSteps; ++k) {
      Mma::load_a_column(owned_fragments[k], position, k * Mma::kStep, 0);
    }
  }

  // Leaves q.k in `energies`; compute_weights multiplies it by scale.
  __device__ __forceinline__ void compute_energies(int step) {
    const StreamedTile tile(
        streamed_shared + (step - first_step) % Traits::kStages * StreamedTile::bytes(key_channel_rows));
#pragma unroll
    for (int j = 0; j < kEnergyTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        energies[0][j][c] = 0.0f;
      }
    }
    if constexpr (Traits::kResidentSteps > 0) {
      const auto position = Mma::b_row(tile, 0);
#pragma unroll
      for (int k = 0; k < Traits::kResidentSteps; ++k) {
        if (k * Mma::kStep < p.key_channels) {
#pragma unroll
          for (int j = 0; j < kEnergyTiles; j += 2) {
            typename Mma::B b;
            Mma::load_b_row(b, position, k * Mma::kStep, 8 * j);
            Mma::multiply(energies[0][j], owned_fragments[k], b, 0);
            Mma::multiply(energies[0][j + 1], owned_fragments[k], b, 1);
          }
        }
      }
    } else {
      multiply_tiles<Mma, Major::kColumn, Major::kRow, 1>(
          energies, typename Traits::OwnedTile(owned_shared), 16 * warp_index(), tile, 0, 0, key_channel_rows);
    }
  }

  // Turns q.k into weights, in registers; positions past the end have weight 0. The change to base 2 follows the
  // subtraction: before it, the rounding error would grow with the energies.
  __device__ __forceinline__ void compute_weights(int step) {
    const int column = step * Traits::kStreamed + lane_index() % 4 * 2;
    const bool edge = (step + 1) * Traits::kStreamed > streamed_positions();
#pragma unroll
    for (int j = 0; j < kEnergyTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float& energy = energies[0][j][c];
        energy *= p.scale;
        if (edge && column + 8 * j + c % 2 >= streamed_positions()) {
          energy = -INFINITY;
        }
      }
    }
    if constexpr (kSum == PositionSum::kForward) {
      online_softmax(step);
    } else {
#pragma unroll
      for (int j = 0; j < kEnergyTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int position = min(column + 8 * j + c, p.streamed_positions - 1);
          const float shift = streamed_logsumexp[position];
          energies[0][j][c] = ptx::exp2_approx((energies[0][j][c] - shift) * kLog2E + kWeightExponent);
          energies[0][j][c + 2] = ptx::exp2_approx((energies[0][j][c + 2] - shift) * kLog2E + kWeightExponent);
        }
      }
    }
  }

  __device__ __forceinline__ void online_softmax(int step) {
    const int lane = lane_index();
    bool any_rescale = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float step_max = -INFINITY;
#pragma unroll
      for (int j = 0; j < kEnergyTiles; ++j) {
        step_max = fmaxf(step_max, fmaxf(energies[0][j][2 * h], energies[0][j][2 * h + 1]));
      }
      step_max = fmaxf(step_max, __shfl_xor_sync(0xffffffffu, step_max, 1));
      step_max = fmaxf(step_max, __shfl_xor_sync(0xffffffffu, step_max, 2));
      const float before = row_max[h];
      row_max[h] = step_max > before + kRescaleAbove ? step_max : before;
      // While all energies are -inf, any finite shift gives weights of 0; -inf itself would give NaN.
      const float shift = row_max[h] == -INFINITY ? 0.0f : row_max[h];
      const float factor = ptx::exp2_approx((before - shift) * kLog2E);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kEnergyTiles; ++j) {
#pragma unroll
        for (int c = 2 * h; c < 2 * h + 2; ++c) {
          energies[0][j][c] = ptx::exp2_approx((energies[0][j][c] - shift) * kLog2E);
          sum += energies[0][j][c];
        }
      }
      row_sum[h] = row_sum[h] * factor + sum;
      any_rescale |= factor != 1.0f;
      if (lane % 4 == 0) {
        factors[step % 2 * Traits::kOwned + 16 * warp_index() + lane / 4 + 8 * h] = factor;
      }
    }
    any_rescale = __any_sync(0xffffffffu, any_rescale);
    if (lane == 0) {
      rescales[step % 2 * Traits::kWarps + warp_index()] = any_rescale && step > first_step;
    }
  }

  __device__ __forceinline__ void store_weights(int step) {
    const int lane = lane_index();
    const TilePosition position(
        StreamedTile(weight_shared + step % 2 * Traits::kWeightBytes), 16 * warp_index() + lane / 4, lane % 4 * 2);
#pragma unroll
    for (int j = 0; j < kEnergyTiles; ++j) {
      store_pair(position.at(0, 8 * j), energies[0][j][0], energies[0][j][1]);
      store_pair(position.at(8, 8 * j), energies[0][j][2], energies[0][j][3]);
    }
  }
};

}  // namespace segattn::cuda
