// Position attention's weighted sum on Hopper (sm_90a): the sum of weighted_sum.cuh, with wgmma and bulk tensor copies.
// docs/hopper.md has the arithmetic behind its shape.
//
// A block owns 128 positions and 128 or 256 value channels, and streams the positions of the other side, 64 per step.
// Of its three warpgroups the first copies; the other two, the consumers, each own 64 positions and have their output,
// 64 positions x all channels, in registers. The energies are computed with owned positions as rows, so that a thread's
// weights, rounded to 16 bits, are the first operand of the output product in the registers where they are:
// O^T (positions x channels) += P V^T. Operands are channels-first, as in global memory: owned and streamed tiles are
// MN-major, values K-major.
//
// In every step a consumer
//   1. issues the energies of the *next* step, then the output product of this one,
//   2. turns the next step's energies into weights while the output product runs,
//   3. waits for the output product, releases the stage, and rescales the output where the maximum has grown.
// The consumers issue their products in turn, so that one's exponentials overlap the other's products.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/math.h"
#include "cuda/common/mma.cuh"
#include "cuda/common/ptx_sm90.cuh"
#include "cuda/common/ring.cuh"
#include "cuda/position/params.h"
#include "cuda/position/row_softmax.cuh"
#include "cuda/position/wgmma/params.h"
#include "cuda/position/wgmma/weighted_sum_epilogue.cuh"
#include "cuda/position/wgmma/weighted_sum_traits.cuh"

namespace segattn::cuda {

// Shared memory of a block, and its work.
template <class Traits_, PositionSum kSum, Keys kKeys>
struct WgmmaWeightedSum {
  static_assert(kKeys == Keys::kAll || kSum == PositionSum::kForward, "grad_value owns keys and streams all queries");
  using Traits = Traits_;
  using Element = typename Traits::Element;
  using Place = RingPlace<Traits::kStages>;
  static constexpr bool kForward = kSum == PositionSum::kForward;
  static constexpr int kCluster = Traits::kCluster;

  const WgmmaWeightedSumParams& params;
  const WeightedSumParams& p;
  unsigned char* shared;
  uint64_t* barriers;
  WgmmaTile tile;
  int first_step, end_step;
  int streamed_positions;

  __device__ __forceinline__ WgmmaWeightedSum(const WgmmaWeightedSumParams& params_, unsigned char* dynamic_shared)
      : params(params_), p(params_.problem) {
    // An offset, so that the compiler sees that the pointer is to shared memory.
    shared = dynamic_shared + (-reinterpret_cast<uintptr_t>(dynamic_shared) & (Traits::kTileAlignment - 1));
    barriers = reinterpret_cast<uint64_t*>(shared + Traits::kBarriersOffset);

    // The tiles of a cluster are neighbours along the owned positions. Blocks that run together read the same streamed
    // positions: of one split and mostly of one sample.
    const int split = static_cast<int>(blockIdx.x) / p.tiles;
    const int index = p.first_tile + static_cast<int>(blockIdx.x) % p.tiles;
    const int rank = index % kCluster;
    tile.channel_block = index / kCluster % p.channel_blocks;
    const int owned_block = index / kCluster / p.channel_blocks * kCluster + rank;
    tile.sample = owned_block / p.owned_blocks;
    tile.first_owned = owned_block % p.owned_blocks * Traits::kOwned;
    tile.first_channel = tile.channel_block * Traits::kChannels;
    tile.partial = split * p.tiles + owned_block * p.channel_blocks + tile.channel_block - p.first_tile;

    streamed_positions = p.streamed_positions;
    if constexpr (kKeys == Keys::kKept) {
      streamed_positions = p.key_counts[tile.sample];
    }
    first_step = split * p.steps_per_split;
    end_step = min(first_step + p.steps_per_split, ceil_div(streamed_positions, Traits::kStreamed));
  }

  // Of the ring's stages. Keys and values have barriers of their own: energies need no values.
  __device__ __forceinline__ uint64_t* owned_full() const { return barriers; }
  __device__ __forceinline__ uint64_t* streamed_full(int stage) const { return barriers + 1 + stage; }
  __device__ __forceinline__ uint64_t* values_full(int stage) const { return barriers + 1 + Traits::kStages + stage; }
  __device__ __forceinline__ uint64_t* empty(int stage) const { return barriers + 1 + 2 * Traits::kStages + stage; }

  __device__ __forceinline__ unsigned char* owned_tile(int consumer) const {
    return shared + consumer * Traits::kOwnedBytes;
  }
  __device__ __forceinline__ unsigned char* streamed_tile(int stage) const {
    return shared + Traits::kStagesOffset + stage * Traits::kStageBytes;
  }
  __device__ __forceinline__ unsigned char* value_tile(int stage) const {
    return streamed_tile(stage) + Traits::kStreamedBytes;
  }
  // Value gradient: [kStreamed]
  __device__ __forceinline__ float* logsumexp(int stage) const {
    return reinterpret_cast<float*>(shared + Traits::kStatisticsOffset) + stage * Traits::kStreamed;
  }

  // All threads of the block; of the cluster.
  static __device__ __forceinline__ void block_sync() {
    if constexpr (kCluster > 1) {
      ptx::cluster_sync();
    } else {
      __syncthreads();
    }
  }

  __device__ __forceinline__ void init_barriers() const {
    if (threadIdx.x == 0) {
      // In the value gradient every lane of the producer arrives with its share of the logsumexp, too.
      ptx::mbarrier_init(owned_full(), 1);
      for (int stage = 0; stage < Traits::kStages; ++stage) {
        ptx::mbarrier_init(streamed_full(stage), kForward ? 1 : 1 + 32);
        ptx::mbarrier_init(values_full(stage), 1);
        ptx::mbarrier_init(empty(stage), kCluster * Traits::kConsumerWarps);
      }
      ptx::fence_barrier_init();
    }
    block_sync();
  }

  // ---- the producer, one warp ----

  // Copies a tile of kBox * kCluster channels: a block of a cluster its share, to all of them.
  template <int kBox>
  __device__ __forceinline__ void copy_tile(
      unsigned char* to, const CUtensorMap* map, int step, int first_channel, uint64_t* full) const {
    const int position = step * Traits::kStreamed;
    if constexpr (kCluster > 1) {
      const int rank = static_cast<int>(ptx::cluster_rank());
      ptx::copy_box_multicast(
          to + rank * kBox * Traits::kRowBytes, map, position, first_channel + rank * kBox, tile.sample, full,
          (1 << kCluster) - 1);
    } else {
      ptx::copy_box(to, map, position, first_channel, tile.sample, full);
    }
  }

  // Without steps it copies nothing: no consumer would wait, and a block must not exit before its copies have arrived.
  __device__ __forceinline__ void produce() const {
    const int lane = lane_index();
    if (lane == 0 && first_step < end_step) {
      ptx::mbarrier_arrive_expect(owned_full(), Traits::kConsumers * Traits::kOwnedBytes);
      for (int consumer = 0; consumer < Traits::kConsumers; ++consumer) {
        ptx::copy_box(
            owned_tile(consumer), &params.owned, tile.first_owned + consumer * Traits::kConsumerOwned, 0, tile.sample,
            owned_full());
      }
    }
    const float* statistic = nullptr;
    if constexpr (!kForward) {
      statistic = p.logsumexp + static_cast<int64_t>(tile.sample) * p.streamed_positions;
    }
    Place place;
#pragma unroll 1  // of few registers
    for (int step = first_step; step < end_step; ++step) {
      const int stage = place.stage;
      ptx::mbarrier_wait(empty(stage), place.parity ^ 1);
      if (lane == 0) {
        ptx::mbarrier_arrive_expect(streamed_full(stage), Traits::kStreamedBytes);
        copy_tile<Traits::kStreamedBox>(streamed_tile(stage), &params.streamed, step, 0, streamed_full(stage));
        ptx::mbarrier_arrive_expect(values_full(stage), Traits::kValueBytes);
        copy_tile<Traits::kValueBox>(value_tile(stage), &params.values, step, tile.first_channel, values_full(stage));
      }
      if constexpr (!kForward) {
#pragma unroll
        for (int i = 0; i < Traits::kStreamed; i += 32) {
          const int position = step * Traits::kStreamed + i + lane;
          logsumexp(stage)[i + lane] = statistic[min(position, p.streamed_positions - 1)];
        }
        ptx::mbarrier_arrive(streamed_full(stage));
      }
      place.advance();
    }
  }

  // ---- the consumers, a warpgroup each ----

  using Energies = float[Traits::kStreamed / 8][4];
  using Weights = uint32_t[Traits::kStreamed / 16][4];
  using Rows = RowSoftmax<false>;

  // energies (64 owned x kStreamed) = owned^T streamed, as a group of its own
  __device__ __forceinline__ void issue_energies(Energies& energies, const unsigned char* owned, int stage) const {
    constexpr int kGroupBytes = 8 * Traits::kRowBytes, kStepBytes = 16 * Traits::kRowBytes;
    const unsigned char* streamed = streamed_tile(stage);
#pragma unroll
    for (int k = 0; k < Traits::kKeyChannels / 16; ++k) {
      ptx::wgmma<Element, ptx::MatrixMajor::kMn, ptx::MatrixMajor::kMn>(
          energies, ptx::matrix_descriptor(owned + k * kStepBytes, 0, kGroupBytes),
          ptx::matrix_descriptor(streamed + k * kStepBytes, 0, kGroupBytes), k > 0);
    }
    ptx::wgmma_commit();
  }

  // sums (64 owned x kChannels) += weights values^T
  __device__ __forceinline__ void issue_sums(WgmmaSums<Traits>& sums, const Weights& weights, int stage) const {
    constexpr int kGroupBytes = 8 * Traits::kRowBytes;
    const unsigned char* values = value_tile(stage);
#pragma unroll
    for (int k = 0; k < Traits::kStreamed / 16; ++k) {
      ptx::wgmma<Element, ptx::MatrixMajor::kK>(
          sums, weights[k], ptx::matrix_descriptor(values + k * 32, 0, kGroupBytes), true);
    }
    ptx::wgmma_commit();
  }

  // Turns q.k of a step into weights, in place. Forward: whether earlier sums are to be rescaled, by `factors`.
  __device__ __forceinline__ bool compute_weights(
      Energies& energies, Rows& rows, int step, int stage, float (&factors)[2]) const {
    const int columns = streamed_positions - step * Traits::kStreamed;
    if constexpr (kForward) {
      bool rescales = false;
      rows.compute_weights(
          energies, columns, p, [&](int h, float factor) { factors[h] = factor; },
          [&](bool any_grows) { rescales = any_grows; });
      return rescales;
    } else {
      // The change to base 2 follows the subtraction: before it, the rounding error would grow with the energies.
      const float* shift = logsumexp(stage) + lane_index() % 4 * 2;
#pragma unroll
      for (int j = 0; j < Traits::kStreamed / 8; ++j) {
        const float2 shifts = *reinterpret_cast<const float2*>(shift + 8 * j);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float difference = __fmaf_rn(energies[j][c], p.scale, -(c % 2 == 0 ? shifts.x : shifts.y));
          energies[j][c] = ptx::exp2_approx(__fmaf_rn(difference, kLog2E, kWeightExponent));
        }
      }
      mask_columns(energies, columns, 0.0f);
      return false;
    }
  }

  // The weights as operand of the output product: accumulators have the layout of the first operand.
  static __device__ __forceinline__ void round_weights(Weights& weights, const Energies& energies) {
#pragma unroll
    for (int k = 0; k < Traits::kStreamed / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &energies[2 * k + i / 2][i % 2 * 2];
        weights[k][i] = packed_pair<Element>(pair[0], pair[1]);
      }
    }
  }

  static __device__ __forceinline__ void multiply_sums(WgmmaSums<Traits>& sums, const float (&factors)[2]) {
#pragma unroll
    for (int j = 0; j < Traits::kChannels / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sums[j][c] *= factors[c / 2];
      }
    }
  }

  // This warp has read the stage: for all blocks of the cluster, which copy to it.
  __device__ __forceinline__ void release(int stage) const {
    __syncwarp();
    if constexpr (kCluster > 1) {
      if (lane_index() < kCluster) {
        ptx::mbarrier_arrive_at(empty(stage), lane_index());
      }
    } else if (lane_index() == 0) {
      ptx::mbarrier_arrive(empty(stage));
    }
  }

  // The consumers issue products in turn, the first one first. A consumer waits at the barrier of its number, at which
  // the other arrives when it has issued its own; the last arrival would meet no wait and is left out.
  static __device__ __forceinline__ void await_turn(int consumer) {
    ptx::named_barrier_sync(kTurnBarrier + consumer, 128 * Traits::kConsumers);
  }
  static __device__ __forceinline__ void pass_turn(int consumer) {
    ptx::named_barrier_arrive(kTurnBarrier + 1 - consumer, 128 * Traits::kConsumers);
  }

  __device__ __forceinline__ void consume(int consumer) const {
    WgmmaSums<Traits> sums;
#pragma unroll
    for (int j = 0; j < Traits::kChannels / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sums[j][c] = 0.0f;
      }
    }
    Rows rows;
    if (first_step < end_step) {
      const unsigned char* owned = owned_tile(consumer);
      Energies energies = {};
      Weights weights;
      float factors[2] = {1.0f, 1.0f};
      Place place;
      ptx::mbarrier_wait(owned_full(), 0);
      ptx::mbarrier_wait(streamed_full(place.stage), place.parity);
      ptx::wgmma_fence();
      issue_energies(energies, owned, place.stage);
      ptx::wgmma_wait<0>();
      ptx::hold(energies);
      compute_weights(energies, rows, first_step, place.stage, factors);
      round_weights(weights, energies);
      if (consumer == 1) {
        pass_turn(consumer);
      }
      ptx::mbarrier_wait(values_full(place.stage), place.parity);
      for (int step = first_step; step + 1 < end_step; ++step) {
        Place next = place;
        next.advance();
        ptx::mbarrier_wait(streamed_full(next.stage), next.parity);
        await_turn(consumer);
        ptx::hold(energies);
        ptx::hold(sums);
        ptx::wgmma_fence();
        issue_energies(energies, owned, next.stage);
        issue_sums(sums, weights, place.stage);
        pass_turn(consumer);
        ptx::wgmma_wait<1>();
        ptx::hold(energies);
        const bool rescales = compute_weights(energies, rows, step + 1, next.stage, factors);
        ptx::hold(energies);
        ptx::mbarrier_wait(values_full(next.stage), next.parity);
        ptx::wgmma_wait<0>();
        ptx::hold(sums);
        release(place.stage);
        if (rescales) {
          multiply_sums(sums, factors);
        }
        round_weights(weights, energies);
        place = next;
      }
      await_turn(consumer);
      ptx::hold(sums);
      ptx::wgmma_fence();
      issue_sums(sums, weights, place.stage);
      if (consumer == 0) {
        pass_turn(consumer);
      }
      ptx::wgmma_wait<0>();
      ptx::hold(sums);
    }
    finish(sums, rows, consumer);
  }

  // Divides by the sums of the weights and stores the logsumexp; for the value gradient, divides by the weights' unit.
  // Then stores the sums. A block without kept keys has no steps, a logsumexp of -inf and the output 0.
  __device__ __forceinline__ void finish(WgmmaSums<Traits>& sums, const Rows& rows, int consumer) const {
    float factors[2] = {kWeightUnit, kWeightUnit};
    if constexpr (kForward) {
      float* statistic = p.logsumexp +
          (p.to_partials ? static_cast<int64_t>(tile.partial) * Traits::kOwned
                         : static_cast<int64_t>(tile.sample) * p.owned_positions + tile.first_owned);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = sum_of_row(rows.row_sum[h]);
        factors[h] = kKeys == Keys::kAll || first_step < end_step ? 1.0f / sum : 0.0f;
        const int row = Traits::kConsumerOwned * consumer + 16 * (warp_index() % 4) + lane_index() / 4 + 8 * h;
        const bool stores = p.to_partials || (tile.channel_block == 0 && tile.first_owned + row < p.owned_positions);
        if (lane_index() % 4 == 0 && stores) {
          statistic[row] = RowLogsumexp(rows.row_max[h], sum, p).rounded;
        }
      }
    }
    multiply_sums(sums, factors);
    if (p.to_partials) {
      store_partial<Traits>(static_cast<float*>(p.output), sums, tile, consumer);
    } else {
      store_sums_by_rows<Traits, SumPart::kRounded>(p.output, shared, sums, p, tile, consumer);
      if constexpr (kForward) {
        if (p.output_low != nullptr) {
          store_sums_by_rows<Traits, SumPart::kRoundingError>(p.output_low, shared, sums, p, tile, consumer);
        }
      }
    }
  }

  // Each role is one branch to the end of the kernel: the branches have different register budgets. No block of a
  // cluster exits while another may copy to it or arrive at its barriers.
  __device__ __forceinline__ void run() const {
    init_barriers();
    const int warpgroup = warp_index() / 4;
    if (warpgroup == 0) {
      ptx::decrease_registers<Traits::kProducerRegisters>();
      if (warp_index() == 0) {
        produce();
        __syncwarp();
      }
    } else {
      ptx::increase_registers<Traits::kConsumerRegisters>();
      consume(warpgroup - 1);
    }
    if constexpr (kCluster > 1) {
      ptx::cluster_sync();
    }
  }
};

template <class Traits, PositionSum kSum, Keys kKeys>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    wgmma_weighted_sum_kernel(const __grid_constant__ WgmmaWeightedSumParams params) {
  SEGATTN_DYNAMIC_SHARED(unsigned char, shared);
  WgmmaWeightedSum<Traits, kSum, kKeys>(params, shared).run();
}

}  // namespace segattn::cuda
