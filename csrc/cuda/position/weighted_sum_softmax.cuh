// The weights of position attention's weighted sum (weighted_sum.cuh). In every step, a warp computes the energies of
// its own 16 positions with the streamed positions, turns them into weights and stores these in shared memory for all
// warps.
#pragma once

#include <cfloat>

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
  using OwnedTile = typename Traits::ReadyOwnedTile;
  using StreamedTile = typename Traits::ReadyStreamedTile;
  static constexpr int kEnergyTiles = Traits::kStreamed / 8;
  // The accumulators are rescaled to a new maximum only if weights would exceed 2^8. This almost never happens after
  // the first few steps, and float16 weights stay finite.
  static constexpr float kRescaleAbove = 8.0f;
  // The weights of the value gradient are about 1 / positions. A factor of 2^10 makes them normal numbers in float16.
  static constexpr int kWeightExponent = 10;
  static constexpr float kWeightUnit = 1.0f / (1 << kWeightExponent);

  // Whether the weights of the value gradient are exact to the rounding error of the logsumexp: that of 16-bit weights
  // is coarser.
  static constexpr bool kSubtractsLow = sizeof(typename Mma::Element) == 4;

  const WeightedSumParams& p;
  unsigned char* owned_shared;
  unsigned char* streamed_shared;
  unsigned char* weight_shared;
  float* factors;  // [2][kOwned]: the factor that rescales earlier sums to the step's maximum; where `rescales` is set
  int* rescales;   // [2][kWarps]: whether any of a warp's 16 factors is not 1
  const float* streamed_logsumexp;
  const float* streamed_logsumexp_low;  // kSubtractsLow
  int key_channel_rows;
  int first_step, end_step;
  int key_count;  // Keys::kKept: of the sample

  typename Mma::A owned_fragments[Traits::kResidentSteps > 0 ? Traits::kResidentSteps : 1];
  float energies[1][kEnergyTiles][4];  // q.k, then the weights, in place
  // Of rows g and g + 8 of the warp's 16 positions. The maximum is of the energies times log2(e), and finite: -inf less
  // -inf would be NaN.
  float row_max[2], row_sum[2];
  // Traits::kRoundsTiles: the sums of the rounded weights. The output is divided by them, so that a row with one large
  // weight has the value of that weight, as if delta were summed from P and dP. The logsumexp is not.
  float rounded_sum[2];

  __device__ __forceinline__ explicit WeightedSumSoftmax(const WeightedSumParams& params) : p(params) {
    row_max[0] = row_max[1] = -FLT_MAX;
    row_sum[0] = row_sum[1] = rounded_sum[0] = rounded_sum[1] = 0.0f;
  }

  __device__ __forceinline__ int streamed_positions() const {
    if constexpr (kKeys == Keys::kKept) {
      return key_count;
    } else {
      return p.streamed_positions;
    }
  }

  __device__ __forceinline__ void load_owned_fragments() {
    const auto position = Mma::a_column(OwnedTile(owned_shared), 16 * warp_index());
#pragma unroll
    for (int k = 0; k < Traits::kResidentSteps; ++k) {
      Mma::load_a_column(owned_fragments[k], position, k * Mma::kStep, 0);
    }
  }

  __device__ __forceinline__ void clear_energies() {
#pragma unroll
    for (int j = 0; j < kEnergyTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        energies[0][j][c] = 0.0f;
      }
    }
  }

  // Leaves q.k in `energies`. slot: of the streamed tile in the ring.
  __device__ __forceinline__ void compute_energies(int slot) {
    const StreamedTile tile(streamed_shared + slot * StreamedTile::bytes(key_channel_rows));
    clear_energies();
    if constexpr (Traits::kResidentSteps > 0) {
      const auto position = Mma::b_row(tile, 0);
      const auto multiply = [&](int k) {
#pragma unroll
        for (int j = 0; j < kEnergyTiles; j += 2) {
          typename Mma::B b;
          Mma::load_b_row(b, position, k * Mma::kStep, 8 * j);
          Mma::multiply(energies[0][j], owned_fragments[k], b, 0);
          Mma::multiply(energies[0][j + 1], owned_fragments[k], b, 1);
        }
      };
      if (p.key_channels > (Traits::kResidentSteps - 1) * Mma::kStep) {  // the usual case, without a branch for each k
#pragma unroll
        for (int k = 0; k < Traits::kResidentSteps; ++k) {
          multiply(k);
        }
      } else {
#pragma unroll
        for (int k = 0; k + 1 < Traits::kResidentSteps; ++k) {
          if (k * Mma::kStep < p.key_channels) {
            multiply(k);
          }
        }
      }
    } else {
      multiply_tiles<Mma, Major::kColumn, Major::kRow, 2>(
          energies, OwnedTile(owned_shared), 16 * warp_index(), tile, 0, 0, key_channel_rows);
    }
  }

  // A weight as the products take it.
  static __device__ __forceinline__ float rounded(float weight) {
    if constexpr (Traits::kRoundsTiles) {
      return round_to_tf32(weight);
    } else {
      return weight;
    }
  }

  // Sets the elements of positions past the end.
  __device__ __forceinline__ void mask_edge(int step, float value) {
    const int left = streamed_positions() - step * Traits::kStreamed - lane_index() % 4 * 2;
    if (left < Traits::kStreamed) {
#pragma unroll
      for (int j = 0; j < kEnergyTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          energies[0][j][c] = 8 * j + c % 2 < left ? energies[0][j][c] : value;
        }
      }
    }
  }

  // Turns q.k into weights, in registers; positions past the end have weight 0.
  __device__ __forceinline__ void compute_weights(int step) {
    if constexpr (kSum == PositionSum::kForward) {
      online_softmax(step);
    } else {
      // The change to base 2 follows the subtraction: before it, the rounding error would grow with the energies.
      const int column = step * Traits::kStreamed + lane_index() % 4 * 2;
#pragma unroll
      for (int j = 0; j < kEnergyTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int query = min(column + 8 * j + c, p.streamed_positions - 1);
          const float shift = streamed_logsumexp[query];
          const float low = kSubtractsLow ? streamed_logsumexp_low[query] : 0.0f;
#pragma unroll
          for (int h = 0; h < 4; h += 2) {
            float& energy = energies[0][j][c + h];
            const float difference = __fmaf_rn(energy, p.scale, -shift);
            energy = rounded(
                ptx::exp2_approx(__fmaf_rn(kSubtractsLow ? difference - low : difference, kLog2E, kWeightExponent)));
          }
        }
      }
      mask_edge(step, 0.0f);
    }
  }

  // In base 2: q.k times scale_log2 less the maximum is rounded once, and the rounding of scale_log2 is the same for
  // all energies (WeightedSumParams).
  __device__ __forceinline__ void online_softmax(int step) {
    const int lane = lane_index();
    if (p.scale < 0.0f) {
#pragma unroll
      for (int j = 0; j < kEnergyTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          energies[0][j][c] = -energies[0][j][c];
        }
      }
    }
    mask_edge(step, -INFINITY);
    float step_max[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = fmaxf(energies[0][0][2 * h], energies[0][0][2 * h + 1]);
#pragma unroll
      for (int j = 1; j < kEnergyTiles; ++j) {
        most = fmaxf(most, fmaxf(energies[0][j][2 * h], energies[0][j][2 * h + 1]));
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
        if (lane % 4 == 0) {
          factors[step % 2 * Traits::kOwned + 16 * warp_index() + lane / 4 + 8 * h] = factor;
        }
      }
    }
    if (lane == 0) {
      rescales[step % 2 * Traits::kWarps + warp_index()] = any_grows && step > first_step;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int j = 0; j < kEnergyTiles; ++j) {
#pragma unroll
        for (int c = 2 * h; c < 2 * h + 2; ++c) {
          const float weight = ptx::exp2_approx(__fmaf_rn(energies[0][j][c], p.scale_log2, -row_max[h]));
          row_sum[h] += weight;
          energies[0][j][c] = rounded(weight);
          if constexpr (Traits::kRoundsTiles) {
            rounded_sum[h] += energies[0][j][c];
          }
        }
      }
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
