// Position attention on tensor cores: a weighted sum over all positions, with the weights made on the way.
//
// A block owns kOwned positions and kChannels value channels and streams the other side past them, 64 bytes of
// positions a step. Per step every warp
//   1. multiplies scores of the *next* step for its own 16 positions (S = owned^T streamed, contraction over E),
//   2. adds values * weights^T of this step to its 64 positions x 32..64 channels of the output,
//   3. turns the scores into weights (online softmax) and puts them into shared memory for the next step,
// so that the exponentials of a step run beside its matrix products and a step has one barrier. The output is computed
// as O^T = V P^T: channels-first operands and results need no transposition anywhere.
// A warp tile of 64 x 64 reads 128 bytes of shared memory for each mma; a warp that kept P in registers would own 16
// positions x all channels and read 256, which is more than an SM delivers while the tensor cores run at full rate.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "element.cuh"
#include "launch.cuh"
#include "mma.cuh"
#include "position_params.cuh"
#include "tile.cuh"

namespace segattn {

// kScoreSteps: mma steps over E whose owned fragments stay in registers; 0 reads them from shared memory, for any E.
template <class Mma_, int kOwned_, int kChannels_, int kChannelWarps_, int kStages_, int kScoreSteps_, int kMinBlocks_>
struct WeightedSumTraits {
  using Mma = Mma_;
  using Element = typename Mma::Element;
  static constexpr int kOwned = kOwned_;
  static constexpr int kChannels = kChannels_;
  static constexpr int kStages = kStages_;
  static constexpr int kScoreSteps = kScoreSteps_;
  static constexpr int kMinBlocks = kMinBlocks_;
  static constexpr int kStreamed = 64 / static_cast<int>(sizeof(Element)); // positions a step
  static constexpr int kWarps = kOwned / 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kChannelWarps = kChannelWarps_;
  static constexpr int kWarpChannels = kChannels / kChannelWarps;
  static constexpr int kWarpOwned = kOwned / (kWarps / kChannelWarps);

  static_assert(kOwned % 16 == 0, "scores are made 16 positions to a warp");
  static_assert(kWarps % kChannelWarps == 0, "warps form a grid of positions x channels");
  static_assert(kWarpChannels % 16 == 0 && kWarpOwned % 16 == 0, "warp tiles consist of mma tiles");
  static_assert(kWarpChannels * kWarpOwned <= 64 * 64, "128 accumulators a thread leave room for the rest");
  static_assert(kStages >= 2, "a copy is under way while another stage is multiplied");

  using OwnedTile = SharedTile<Element, kOwned>;
  using StreamedTile = SharedTile<Element, kStreamed>;

  // Rows of the tiles whose rows are embedding channels.
  static constexpr __host__ __device__ int embedding_rows(int embedding) {
    return kScoreSteps > 0 ? kScoreSteps * Mma::kStep : (embedding + Mma::kStep - 1) / Mma::kStep * Mma::kStep;
  }
  static constexpr __host__ __device__ int owned_bytes(int embedding) {
    return OwnedTile::bytes(embedding_rows(embedding));
  }
  static constexpr __host__ __device__ int streamed_bytes(int embedding) {
    return StreamedTile::bytes(embedding_rows(embedding));
  }
  static constexpr int kValueBytes = StreamedTile::bytes(kChannels);
  static constexpr int kWeightBytes = StreamedTile::bytes(kOwned);
  static constexpr int kStatisticsBytes = 2 * (kOwned + kWarps) * 4 + 24; // and a WeightedSumPlace
  // 16-bit results pass through shared memory, rows of kOutputPitch elements: four banks on from row to row.
  static constexpr int kOutputPitch = kOwned + 8;
  static constexpr int kOutputBytes = sizeof(Element) == 2 ? kChannels * kOutputPitch * 2 : 0;
  static constexpr __host__ __device__ int shared_bytes(int embedding) {
    const int pipeline = owned_bytes(embedding) + kStages * (streamed_bytes(embedding) + kValueBytes) +
        2 * kWeightBytes + kStatisticsBytes;
    return pipeline > kOutputBytes ? pipeline : kOutputBytes;
  }
};

// What a block works on. It waits in shared memory for the end, where registers are free again.
struct WeightedSumPlace {
  int64_t sample;
  int split;
  int channel_block;
  int first_owned;
  int first_channel;
};

template <class Traits_, bool kForward>
struct WeightedSum {
  using Traits = Traits_;
  using Mma = typename Traits::Mma;
  using Element = typename Traits::Element;
  using StreamedTile = typename Traits::StreamedTile;
  static constexpr int kScoreTiles = Traits::kStreamed / 8;
  static constexpr int kChannelTiles = Traits::kWarpChannels / 16;
  static constexpr int kOwnedTiles = Traits::kWarpOwned / 8;
  // Weights may reach e^5.5 = 245 before the accumulators are rescaled to the new maximum: after the first few steps they
  // almost never are, and a float16 weight stays finite.
  static constexpr float kRescaleAbove = 5.5f;
  // The value gradient's weights are about 1 / positions: multiplied by 2^10 they are normal numbers in float16.
  static constexpr float kWeightExponent = 10.0f;

  const WeightedSumParams& p;
  unsigned char* owned_shared;
  unsigned char* streamed_shared;
  unsigned char* value_shared;
  unsigned char* weight_shared;
  float* factors; // [2][kOwned]: by what the step's new maximum scales what was summed before
  int* changed;   // [2][kWarps]: whether any of a warp's 16 factors is not 1
  WeightedSumPlace* place;
  // This thread's share of the next streamed tile and the next values to copy: both walk along the positions.
  const Element* next_streamed;
  const Element* next_values;
  const float* streamed_logsumexp;
  int embedding_rows;
  int first_step, end_step;

  typename Mma::A owned_fragments[Traits::kScoreSteps > 0 ? Traits::kScoreSteps : 1];
  float scores[1][kScoreTiles][4];
  float sums[kChannelTiles][kOwnedTiles][4];
  float row_max[2], row_sum[2]; // of rows g and g + 8 of the warp's 16 positions

  __device__ __forceinline__ void copy_streamed(int step) {
    if (step < end_step) {
      const int slot = (step - first_step) % Traits::kStages;
      copy_share_async<Traits::kThreads>(
          StreamedTile(streamed_shared + slot * StreamedTile::bytes(embedding_rows)), next_streamed,
          p.streamed.row_stride, embedding_rows, p.embedding, p.streamed_positions - step * Traits::kStreamed);
      next_streamed += Traits::kStreamed;
    }
  }

  __device__ __forceinline__ void copy_values(int step) {
    if (step < end_step) {
      const int slot = (step - first_step) % Traits::kStages;
      copy_share_async<Traits::kThreads>(
          StreamedTile(value_shared + slot * Traits::kValueBytes), next_values, p.values.row_stride, Traits::kChannels,
          p.channels - place->first_channel, p.streamed_positions - step * Traits::kStreamed);
      next_values += Traits::kStreamed;
    }
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
        if (k * Mma::kStep < p.embedding) {
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
      multiply_tiles<Mma, false, true, 1>(
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
    if constexpr (kForward) {
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

  __device__ __forceinline__ int warp_first_owned() const {
    return warp_index() / Traits::kChannelWarps * Traits::kWarpOwned;
  }
  __device__ __forceinline__ int warp_first_channel() const {
    return warp_index() % Traits::kChannelWarps * Traits::kWarpChannels;
  }

  // Brings what was summed so far to the maximum that `step`'s weights are relative to.
  __device__ __forceinline__ void rescale_sums(int step) {
    bool any_changed = false;
#pragma unroll
    for (int i = 0; i < Traits::kWarpOwned / 16; ++i) {
      any_changed |= changed[step % 2 * Traits::kWarps + warp_first_owned() / 16 + i] != 0;
    }
    if (any_changed) {
      multiply_sums(factors + step % 2 * Traits::kOwned);
    }
  }

  // per_owned: [kOwned]
  __device__ __forceinline__ void multiply_sums(const float* per_owned) {
#pragma unroll
    for (int j = 0; j < kOwnedTiles; ++j) {
      const float2 factor =
          *reinterpret_cast<const float2*>(per_owned + warp_first_owned() + 8 * j + lane_index() % 4 * 2);
#pragma unroll
      for (int i = 0; i < kChannelTiles; ++i) {
        sums[i][j][0] *= factor.x;
        sums[i][j][1] *= factor.y;
        sums[i][j][2] *= factor.x;
        sums[i][j][3] *= factor.y;
      }
    }
  }

  __device__ __forceinline__ void multiply_values(int step, int k, int k_end) {
    if (place->first_channel + warp_first_channel() >= p.channels) {
      return; // the last channel block may have nothing for some warps
    }
    const StreamedTile value_tile(value_shared + (step - first_step) % Traits::kStages * Traits::kValueBytes);
    const StreamedTile weight_tile(weight_shared + step % 2 * Traits::kWeightBytes);
    multiply_tiles<Mma, true, false, 2>(
        sums, value_tile, warp_first_channel(), weight_tile, warp_first_owned(), k, k_end);
  }

  // kForward: divides by the sums of weights and leaves the log-sum-exp.
  __device__ __forceinline__ void normalize() {
    const int lane = lane_index(), first_owned = place->first_owned;
    float* logsumexp = p.logsumexp + (place->split * p.batch + place->sample) * p.owned_positions;
    __syncthreads(); // every warp has read the factors of the last step
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = row_sum[h];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const int row = 16 * warp_index() + lane / 4 + 8 * h;
      if (lane % 4 == 0) {
        factors[row] = 1.0f / sum;
        if (place->channel_block == 0 && first_owned + row < p.owned_positions) {
          logsumexp[first_owned + row] = row_max[h] + logf(sum);
        }
      }
    }
    __syncthreads();
    multiply_sums(factors);
  }

  // map: the sample's output, (C, owned_positions). Straight from the accumulators, a channel's 8 positions at a time: for
  // float32 these are whole sectors.
  template <class Out>
  __device__ __forceinline__ void store_sums(Out* map, const WeightedSumPlace& at) {
    const int lane = lane_index();
#pragma unroll
    for (int i = 0; i < kChannelTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int channel = at.first_channel + warp_first_channel() + 16 * i + lane / 4 + 8 * h;
        if (channel < p.channels) {
          Out* row = map + static_cast<int64_t>(channel) * p.owned_positions;
#pragma unroll
          for (int j = 0; j < kOwnedTiles; ++j) {
            const int position = at.first_owned + warp_first_owned() + 8 * j + lane % 4 * 2;
            const float low = sums[i][j][2 * h], high = sums[i][j][2 * h + 1];
            const bool both = position + 1 < p.owned_positions;
            if (both && reinterpret_cast<uintptr_t>(row + position) % (2 * sizeof(Out)) == 0) {
              store_pair(row + position, low, high);
            } else {
              if (position < p.owned_positions) {
                row[position] = from_accumulator<Out>(low);
              }
              if (both) {
                row[position + 1] = from_accumulator<Out>(high);
              }
            }
          }
        }
      }
    }
  }

  // The same for 16 bits, by way of shared memory: 8 positions are but half a sector there, and unaligned rows would take
  // 2-byte stores. A warp writes whole rows in 4-byte stores, from their first 4-byte boundary on.
  __device__ __forceinline__ void store_sums_by_rows(Element* map, unsigned char* shared, const WeightedSumPlace& at) {
    constexpr int kPitch = Traits::kOutputPitch;
    const int lane = lane_index();
    Element* tile = reinterpret_cast<Element*>(shared);
    __syncthreads(); // every warp is done with what lies there
#pragma unroll
    for (int i = 0; i < kChannelTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kOwnedTiles; ++j) {
        Element* corner = tile + (warp_first_channel() + 16 * i + lane / 4) * kPitch + warp_first_owned() + 8 * j +
            lane % 4 * 2;
        store_pair(corner, sums[i][j][0], sums[i][j][1]);
        store_pair(corner + 8 * kPitch, sums[i][j][2], sums[i][j][3]);
      }
    }
    __syncthreads();
    const int positions = min(Traits::kOwned, p.owned_positions - at.first_owned);
    const int channels = min(Traits::kChannels, p.channels - at.first_channel);
    for (int channel = warp_index(); channel < channels; channel += Traits::kWarps) {
      const Element* from = tile + channel * kPitch;
      Element* row = map + static_cast<int64_t>(at.first_channel + channel) * p.owned_positions + at.first_owned;
      const int before = reinterpret_cast<uintptr_t>(row) / 2 % 2; // elements before the boundary
      if (before != 0 && lane == 0) {
        row[0] = from[0];
      }
      for (int i = before + 2 * lane; i < positions; i += 64) {
        if (i + 1 < positions) {
          const uint32_t low = *reinterpret_cast<const unsigned short*>(from + i);
          const uint32_t high = *reinterpret_cast<const unsigned short*>(from + i + 1);
          *reinterpret_cast<uint32_t*>(row + i) = low | high << 16;
        } else {
          row[i] = from[i];
        }
      }
    }
  }

  __device__ __forceinline__ WeightedSum(const WeightedSumParams& params, unsigned char* shared) : p(params) {
    embedding_rows = Traits::embedding_rows(p.embedding);
    owned_shared = shared;
    streamed_shared = owned_shared + Traits::owned_bytes(p.embedding);
    value_shared = streamed_shared + Traits::kStages * Traits::streamed_bytes(p.embedding);
    weight_shared = value_shared + Traits::kStages * Traits::kValueBytes;
    factors = reinterpret_cast<float*>(weight_shared + 2 * Traits::kWeightBytes);
    changed = reinterpret_cast<int*>(factors + 2 * Traits::kOwned);
    place = reinterpret_cast<WeightedSumPlace*>(changed + 2 * Traits::kWarps);
  }

  __device__ __forceinline__ void run() {
    // Blocks that run together read the same streamed positions: channel blocks first, then owned blocks.
    int64_t block = blockIdx.x;
    const int channel_block = static_cast<int>(block % p.channel_blocks);
    block /= p.channel_blocks;
    const int owned_block = static_cast<int>(block % p.owned_blocks);
    block /= p.owned_blocks;
    const int split = static_cast<int>(block % p.splits);
    const int64_t sample = block / p.splits;

    const int first_owned = owned_block * Traits::kOwned, first_channel = channel_block * Traits::kChannels;
    if (threadIdx.x == 0) {
      *place = {sample, split, channel_block, first_owned, first_channel};
    }
    __syncthreads();
    streamed_logsumexp = p.logsumexp + sample * p.streamed_positions;
    first_step = split * p.steps_per_split;
    const auto first = [&](const Operand& operand) {
      return static_cast<const Element*>(operand.data) + sample * operand.batch_stride;
    };
    using Share = CopyShare<Traits::kThreads, Element, Traits::kStreamed>;
    const int first_column = first_step * Traits::kStreamed + Share::column();
    next_streamed = first(p.streamed) + Share::row() * p.streamed.row_stride + first_column;
    next_values = first(p.values) + (first_channel + Share::row()) * p.values.row_stride + first_column;
    const GlobalMatrix<Element> owned{first(p.owned), p.owned.row_stride, p.embedding, p.owned_positions};
    const int steps = (p.streamed_positions + Traits::kStreamed - 1) / Traits::kStreamed;
    end_step = min(first_step + p.steps_per_split, steps);
    row_max[0] = row_max[1] = -INFINITY;
    row_sum[0] = row_sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < kChannelTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kOwnedTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          sums[i][j][c] = 0.0f;
        }
      }
    }

    // Copy group n brings the streamed tile of step n and the values of step n - 1: what the loop below takes at once.
    copy_tile_async<Traits::kThreads>(
        typename Traits::OwnedTile(owned_shared), owned, 0, embedding_rows, first_owned);
    copy_streamed(first_step);
    ptx::cp_async_commit();
#pragma unroll
    for (int n = 1; n < Traits::kStages; ++n) {
      copy_streamed(first_step + n);
      copy_values(first_step + n - 1);
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<Traits::kStages - 1>();
    __syncthreads();
    load_owned_fragments();
    multiply_scores(first_step);
    make_weights(first_step);
    store_weights(first_step);

    for (int step = first_step; step < end_step; ++step) {
      ptx::cp_async_wait<Traits::kStages - 2>();
      __syncthreads(); // this step's tiles and weights are there, the previous step's are no longer read
      copy_streamed(step + Traits::kStages);
      copy_values(step + Traits::kStages - 1);
      ptx::cp_async_commit();
      const bool more = step + 1 < end_step;
      if (more) {
        multiply_scores(step + 1);
      }
      if constexpr (kForward) {
        rescale_sums(step);
      }
      multiply_values(step, 0, Traits::kStreamed / 2);
      if (more) {
        make_weights(step + 1);
        store_weights(step + 1);
      }
      multiply_values(step, Traits::kStreamed / 2, Traits::kStreamed);
    }

    if constexpr (kForward) {
      normalize();
    } else {
#pragma unroll
      for (int i = 0; i < kChannelTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kOwnedTiles; ++j) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            sums[i][j][c] *= 1.0f / 1024.0f; // 2^-kWeightExponent
          }
        }
      }
    }
    const WeightedSumPlace at = *place;
    const int64_t map = static_cast<int64_t>(p.channels) * p.owned_positions;
    if (p.splits > 1) {
      store_sums(static_cast<float*>(p.output) + (at.split * p.batch + at.sample) * map, at);
    } else if constexpr (sizeof(Element) == 2) {
      store_sums_by_rows(static_cast<Element*>(p.output) + at.sample * map, owned_shared, at);
    } else {
      store_sums(static_cast<Element*>(p.output) + at.sample * map, at);
    }
  }
};

template <class Traits, bool kForward>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    weighted_sum_kernel(const WeightedSumParams params) {
#if defined(SEGATTN_EMULATED) || __CUDA_ARCH__ >= 800
  SEGATTN_DYNAMIC_SHARED(unsigned char, shared);
  WeightedSum<Traits, kForward>(params, shared).run();
#endif
}

} // namespace segattn
