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
#include "cuda/position/row_softmax.cuh"
#include "cuda/position/weighted_sum_traits.cuh"

namespace segattn::cuda {

template <class Traits_, PositionSum kSum, Keys kKeys>
struct WeightedSumSoftmax : RowSoftmax<Traits_::kRoundsTiles> {
  using Traits = Traits_;
  using Rows = RowSoftmax<Traits::kRoundsTiles>;
  using Mma = typename Traits::Mma;
  using OwnedTile = typename Traits::ReadyOwnedTile;
  using StreamedTile = typename Traits::ReadyStreamedTile;
  static constexpr int kEnergyTiles = Traits::kStreamed / 8;
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

  __device__ __forceinline__ explicit WeightedSumSoftmax(const WeightedSumParams& params) : p(params) {}

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

  // The columns of the step's tile that are not past the end.
  __device__ __forceinline__ int columns_left(int step) const {
    return streamed_positions() - step * Traits::kStreamed;
  }

  // Turns q.k into weights, in registers; positions past the end have weight 0.
  __device__ __forceinline__ void compute_weights(int step) {
    if constexpr (kSum == PositionSum::kForward) {
      const int lane = lane_index();
      Rows::compute_weights(
          energies[0], columns_left(step), p,
          [&](int h, float factor) {
            if (lane % 4 == 0) {
              factors[step % 2 * Traits::kOwned + 16 * warp_index() + lane / 4 + 8 * h] = factor;
            }
          },
          [&](bool any_grows) {
            if (lane == 0) {
              rescales[step % 2 * Traits::kWarps + warp_index()] = any_grows && step > first_step;
            }
          });
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
            energy = Rows::rounded(
                ptx::exp2_approx(__fmaf_rn(kSubtractsLow ? difference - low : difference, kLog2E, kWeightExponent)));
          }
        }
      }
      mask_columns(energies[0], columns_left(step), 0.0f);
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
