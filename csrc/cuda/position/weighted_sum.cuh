// Position attention on tensor cores: a weighted sum over all positions, with the weights computed on the fly.
//
// A block owns kOwned positions and kChannels value channels. It streams the positions of the other side, one tile per
// step: 32 positions of 16-bit elements or 16 of float32. In every step each warp
//   1. computes the energies of the *next* step for its own 16 positions (owned^T streamed, contracted over E),
//   2. adds values * weights^T of this step to its output tile, 64 positions x 32..64 channels,
//   3. turns the energies into weights (online softmax) and stores them in shared memory for the next step.
// The exponentials of a step thus overlap its matrix products, and a step has one barrier. The output is computed as
// O^T = V P^T, so channels-first operands and results need no transposition.
// The weights P pass through shared memory because a warp tile of 64 x 64 then reads 128 bytes of it per mma. With P in
// registers, a warp would own 16 positions x all channels and read 256 bytes, more than a multiprocessor delivers with
// the tensor cores at full rate.
//
// weighted_sum_traits.cuh has the shape of a block, weighted_sum_softmax.cuh steps 1 and 3, weighted_sum_epilogue.cuh
// the stores of the result. This file has the pipeline that joins them.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/math.h"
#include "cuda/common/mma.cuh"
#include "cuda/common/tile.cuh"
#include "cuda/position/params.h"
#include "cuda/position/row_softmax.cuh"
#include "cuda/position/weighted_sum_epilogue.cuh"
#include "cuda/position/weighted_sum_softmax.cuh"
#include "cuda/position/weighted_sum_traits.cuh"

namespace segattn::cuda {

template <class Traits_, PositionSum kSum, Keys kKeys>
struct WeightedSum : WeightedSumSoftmax<Traits_, kSum, kKeys> {
  static_assert(kKeys == Keys::kAll || kSum == PositionSum::kForward, "grad_value owns keys and streams all queries");
  using Softmax = WeightedSumSoftmax<Traits_, kSum, kKeys>;
  using Traits = Traits_;
  using Mma = typename Traits::Mma;
  using Element = typename Traits::Element;
  using StreamedTile = typename Traits::StreamedTile;
  using Softmax::clear_energies, Softmax::compute_energies, Softmax::compute_weights, Softmax::end_step,
      Softmax::factors, Softmax::first_step;
  using Softmax::key_channel_rows, Softmax::key_count, Softmax::load_owned_fragments, Softmax::owned_shared, Softmax::p,
      Softmax::rescales;
  using Softmax::row_max, Softmax::row_sum, Softmax::rounded_sum, Softmax::store_weights, Softmax::streamed_logsumexp;
  using Softmax::streamed_logsumexp_low, Softmax::streamed_positions, Softmax::streamed_shared, Softmax::weight_shared;

  unsigned char* value_shared;
  WeightedSumBlock* block_shared;
  // This thread's source in the next streamed tile and the next value tile. Both advance along the positions.
  const Element* next_streamed;
  const Element* next_values;
  int end_inside;     // the end of the steps whose streamed and value tiles have no edge
  bool has_channels;  // the last channel block can leave warps without channels
  WeightedSumAccumulators<Traits> sums;

  // kInside: the tile has no edge, and the step is before the end.
  template <bool kInside>
  __device__ __forceinline__ void copy_streamed(int step, int slot) {
    if (kInside || step < end_step) {
      copy_share_async<Traits::kThreads, Traits::kResidentSteps * Mma::kStep>(
          StreamedTile(streamed_shared + slot * StreamedTile::bytes(key_channel_rows)), next_streamed,
          p.streamed.row_stride, key_channel_rows, kInside ? key_channel_rows : p.key_channels,
          kInside ? Traits::kStreamed : streamed_positions() - step * Traits::kStreamed);
      next_streamed += Traits::kStreamed;
    }
  }
  template <bool kInside>
  __device__ __forceinline__ void copy_values(int step, int slot) {
    if (kInside || step < end_step) {
      copy_share_async<Traits::kThreads, Traits::kChannels>(
          StreamedTile(value_shared + slot * Traits::kValueBytes), next_values, p.values.row_stride, Traits::kChannels,
          kInside ? Traits::kChannels : p.value_channels - block_shared->first_channel,
          kInside ? Traits::kStreamed : streamed_positions() - step * Traits::kStreamed);
      next_values += Traits::kStreamed;
    }
  }

  // Rescales the sums to the maximum energy that the weights of `step` were computed with.
  __device__ __forceinline__ void rescale_sums(int step) {
    constexpr int kGroups = Traits::kWarpOwned / 16;
    int rescale[kGroups];
    bool any_rescale = false;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      rescale[i] = rescales[step % 2 * Traits::kWarps + Traits::warp_first_owned() / 16 + i];
      any_rescale |= rescale[i] != 0;
    }
    if (any_rescale) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        if (rescale[i] != 0) {
          multiply_sums(factors + step % 2 * Traits::kOwned, i);
        }
      }
    }
  }

  // Multiplies the sums of the warp's positions [16 group, 16 group + 16). per_owned: [kOwned]
  __device__ __forceinline__ void multiply_sums(const float* per_owned, int group) {
#pragma unroll
    for (int j = 2 * group; j < 2 * group + 2; ++j) {
      const float2 factor =
          *reinterpret_cast<const float2*>(per_owned + Traits::warp_first_owned() + 8 * j + lane_index() % 4 * 2);
#pragma unroll
      for (int i = 0; i < Traits::kChannelTiles; ++i) {
        sums[i][j][0] *= factor.x;
        sums[i][j][1] *= factor.y;
        sums[i][j][2] *= factor.x;
        sums[i][j][3] *= factor.y;
      }
    }
  }

  __device__ __forceinline__ void multiply_values(int step, int slot, int k, int k_end) {
    if (has_channels) {
      const StreamedTile value_tile(value_shared + slot * Traits::kValueBytes);
      const typename Traits::ReadyStreamedTile weight_tile(weight_shared + step % 2 * Traits::kWeightBytes);
      multiply_tiles<Mma, Major::kRow, Major::kColumn, 2>(
          sums, value_tile, Traits::warp_first_channel(), weight_tile, Traits::warp_first_owned(), k, k_end);
    }
  }

  // Rounds the arrived tile of `slot` where the products take rounded elements.
  __device__ __forceinline__ void round_streamed(int slot) {
    if constexpr (Traits::kRoundsTiles) {
      round_share<Traits::kThreads>(
          StreamedTile(streamed_shared + slot * StreamedTile::bytes(key_channel_rows)), key_channel_rows);
    }
  }

  // kForward: divides by the sums of the weights and stores logsumexp and, for float32, its rounding error. A block
  // without kept keys has no steps: the first energies are all masked, which leaves a logsumexp of -inf, and its output
  // is 0.
  __device__ __forceinline__ void normalize() {
    const int lane = lane_index(), first_owned = block_shared->first_owned;
    const auto of_block = [&](float* statistic) {
      return statistic +
          (p.to_partials ? static_cast<int64_t>(block_shared->partial) * Traits::kOwned
                         : block_shared->sample * p.owned_positions + first_owned);
    };
    float* logsumexp = of_block(p.logsumexp);
    __syncthreads();  // every warp has read the factors of the last step
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = sum_of_row(row_sum[h]);
      const float divisor = Traits::kRoundsTiles ? sum_of_row(rounded_sum[h]) : sum;
      const int row = 16 * warp_index() + lane / 4 + 8 * h;
      if (lane % 4 == 0) {
        factors[row] = kKeys == Keys::kAll || first_step < end_step ? 1.0f / divisor : 0.0f;
        if (p.to_partials || (block_shared->channel_block == 0 && first_owned + row < p.owned_positions)) {
          const RowLogsumexp of_row(row_max[h], sum, p);
          logsumexp[row] = of_row.rounded;
          if constexpr (sizeof(Element) == 4) {
            const float error = __fmaf_rn(row_max[h], p.ln2, -of_row.rounded) + of_row.rest;
            of_block(p.logsumexp_low)[row] = rounding_error(of_row.rounded, error);
          }
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Traits::kWarpOwned / 16; ++i) {
      multiply_sums(factors, i);
    }
  }

  __device__ __forceinline__ WeightedSum(const WeightedSumParams& params, unsigned char* shared) : Softmax(params) {
    key_channel_rows = Traits::key_channel_rows(p.key_channels);
    owned_shared = shared;
    streamed_shared = owned_shared + Traits::owned_bytes(p.key_channels);
    value_shared = streamed_shared + Traits::kStages * Traits::streamed_bytes(p.key_channels);
    weight_shared = value_shared + Traits::kStages * Traits::kValueBytes;
    factors = reinterpret_cast<float*>(weight_shared + 2 * Traits::kWeightBytes);
    rescales = reinterpret_cast<int*>(factors + 2 * Traits::kOwned);
    block_shared = reinterpret_cast<WeightedSumBlock*>(rescales + 2 * Traits::kWarps);
  }

  __device__ __forceinline__ void run() {
    // Blocks that run together read the same streamed positions: of one split and mostly of one sample.
    const int split = static_cast<int>(blockIdx.x) / p.tiles;
    int tile = p.first_tile + static_cast<int>(blockIdx.x) % p.tiles;
    const int channel_block = tile % p.channel_blocks;
    tile /= p.channel_blocks;
    const int owned_block = tile % p.owned_blocks;
    const int64_t sample = tile / p.owned_blocks;

    const int first_owned = owned_block * Traits::kOwned, first_channel = channel_block * Traits::kChannels;
    if (threadIdx.x == 0) {
      *block_shared = {sample, static_cast<int>(blockIdx.x), channel_block, first_owned, first_channel};
    }
    __syncthreads();
    streamed_logsumexp = p.logsumexp + sample * p.streamed_positions;
    streamed_logsumexp_low = p.logsumexp_low + sample * p.streamed_positions;
    first_step = split * p.steps_per_split;
    const auto first = [&](const Operand& operand) {
      return static_cast<const Element*>(operand.data) + sample * operand.batch_stride;
    };
    using Share = CopyShare<Traits::kThreads, Element, Traits::kStreamed>;
    const int first_column = first_step * Traits::kStreamed + Share::column();
    next_streamed = first(p.streamed) + Share::row() * p.streamed.row_stride + first_column;
    next_values = first(p.values) + (first_channel + Share::row()) * p.values.row_stride + first_column;
    const GlobalMatrix<Element> owned{first(p.owned), p.owned.row_stride, p.key_channels, p.owned_positions};
    if constexpr (kKeys == Keys::kKept) {
      key_count = p.key_counts[sample];
    }
    const int steps = ceil_div(streamed_positions(), Traits::kStreamed);
    end_step = min(first_step + p.steps_per_split, steps);
    const bool rows_inside =
        key_channel_rows == p.key_channels && first_channel + Traits::kChannels <= p.value_channels;
    end_inside = rows_inside ? min(end_step, streamed_positions() / Traits::kStreamed) : 0;
    has_channels = first_channel + Traits::warp_first_channel() < p.value_channels;
#pragma unroll
    for (int i = 0; i < Traits::kChannelTiles; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kOwnedTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          sums[i][j][c] = 0.0f;
        }
      }
    }

    // Copy group n holds the streamed tile of step n and the values of step n - 1, which one iteration below consumes.
    copy_tile_async<Traits::kThreads>(
        typename Traits::OwnedTile(owned_shared), owned, 0, key_channel_rows, first_owned);
    copy_streamed<false>(first_step, 0);
    ptx::cp_async_commit();
#pragma unroll
    for (int n = 1; n < Traits::kStages; ++n) {
      copy_streamed<false>(first_step + n, n);
      copy_values<false>(first_step + n - 1, n - 1);
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<Traits::kStages - 1>();
    if constexpr (Traits::kRoundsTiles) {
      round_share<Traits::kThreads>(typename Traits::OwnedTile(owned_shared), key_channel_rows);
    }
    const bool has_steps = kKeys == Keys::kAll || first_step < end_step;  // without, no tile was copied
    if (has_steps) {
      round_streamed(0);
    }
    __syncthreads();
    load_owned_fragments();
    if (has_steps) {
      compute_energies(0);
    } else {
      clear_energies();
    }
    compute_weights(first_step);
    store_weights(first_step);

    int slot = 0;
    for (int step = first_step; step < end_step; ++step) {
      const int previous_slot = slot == 0 ? Traits::kStages - 1 : slot - 1;
      const int next_slot = slot == Traits::kStages - 1 ? 0 : slot + 1;
      ptx::cp_async_wait<Traits::kStages - 2>();
      if (step + 1 < end_step) {
        round_streamed(next_slot);
      }
      __syncthreads();  // this step's tiles and weights have arrived, and the last step's are no longer read
      if (step + Traits::kStages < end_inside) {
        copy_streamed<true>(step + Traits::kStages, slot);
        copy_values<true>(step + Traits::kStages - 1, previous_slot);
      } else {
        copy_streamed<false>(step + Traits::kStages, slot);
        copy_values<false>(step + Traits::kStages - 1, previous_slot);
      }
      ptx::cp_async_commit();
      const bool more = step + 1 < end_step;
      if (more) {
        compute_energies(next_slot);
      }
      if constexpr (kSum == PositionSum::kForward) {
        rescale_sums(step);
      }
      multiply_values(step, slot, 0, Traits::kStreamed / 2);
      if (more) {
        compute_weights(step + 1);
        store_weights(step + 1);
      }
      multiply_values(step, slot, Traits::kStreamed / 2, Traits::kStreamed);
      slot = next_slot;
    }

    if constexpr (kSum == PositionSum::kForward) {
      normalize();
    } else {
#pragma unroll
      for (int i = 0; i < Traits::kChannelTiles; ++i) {
#pragma unroll
        for (int j = 0; j < Traits::kOwnedTiles; ++j) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            sums[i][j][c] *= kWeightUnit;
          }
        }
      }
    }
    const WeightedSumBlock block = *block_shared;
    const int64_t sample_elements = static_cast<int64_t>(p.value_channels) * p.owned_positions;
    if (p.to_partials) {
      store_partial<Traits>(static_cast<float*>(p.output), sums, block);
    } else if constexpr (sizeof(Element) == 2) {
      store_sums_by_rows<Traits, SumPart::kRounded>(
          static_cast<Element*>(p.output) + block.sample * sample_elements, owned_shared, sums, p, block);
      if constexpr (kSum == PositionSum::kForward) {
        if (p.output_low != nullptr) {
          store_sums_by_rows<Traits, SumPart::kRoundingError>(
              static_cast<Element*>(p.output_low) + block.sample * sample_elements, owned_shared, sums, p, block);
        }
      }
    } else {
      store_sums<Traits>(static_cast<Element*>(p.output) + block.sample * sample_elements, sums, p, block);
    }
  }
};

template <class Traits, PositionSum kSum, Keys kKeys>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    weighted_sum_kernel(const WeightedSumParams params) {
#if defined(SEGATTN_EMULATED) || __CUDA_ARCH__ >= 800
  SEGATTN_DYNAMIC_SHARED(unsigned char, shared);
  WeightedSum<Traits, kSum, kKeys>(params, shared).run();
#endif
}

}  // namespace segattn::cuda
