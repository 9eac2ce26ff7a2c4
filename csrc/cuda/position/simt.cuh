// Position attention without tensor cores: float64 on every device, every type before sm_80, and channel counts that no
// tensor-core tile has room for. One kernel computes sums of the same form (SimtParams): a block owns 32
// positions, steps through all streamed positions 32 at a time, computes their 32 x 32 weights and adds values times
// weights. The query and key gradients each recompute the weights: 1.6 times the minimum work of the backward pass, but
// no partials.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/position/params.h"

namespace segattn::cuda {

// Shared memory and FMAs bound the time. The tiles are the largest that take less than 48 KB of shared memory.
template <class T, PositionSum kSum_, Keys kKeys_>
struct SimtTraits {
  using Element = T;
  using Real = Accumulator<T>;
  static constexpr PositionSum kSum = kSum_;
  static constexpr Keys kKeys = kKeys_;
  static constexpr int kThreads = 256;
  static constexpr int kTile = 32;          // owned positions, streamed positions, and contraction of one step
  static constexpr int kPitch = kTile + 1;  // a column has no bank conflicts
  static constexpr int kChannels = sizeof(Real) == 8 ? 128 : 256;
  static constexpr int kRowGroups = kThreads / 8;  // a thread has 4 positions of every 32nd channel
  static constexpr int kRows = kChannels / kRowGroups;
  static constexpr bool kForward = kSum == PositionSum::kForward;
  static constexpr bool kCorrectsQueryGradient = kSum == PositionSum::kCorrectedQueryGradient;
  static constexpr bool kQueryGradient = kSum == PositionSum::kQueryGradient || kCorrectsQueryGradient;
  static constexpr bool kNeedsProduct = kQueryGradient || kSum == PositionSum::kKeyGradient;
  static constexpr bool kOwnsQueries = kForward || kQueryGradient;
  static constexpr bool kSubtractsLow = sizeof(T) > 2;
  static_assert(kKeys == Keys::kAll || kOwnsQueries, "the gradients of key and value own keys and stream all queries");
  static_assert(kChannels >= 2 * kTile, "the two contraction tiles share their memory with the values");
  static constexpr size_t kSharedBytes = sizeof(Real) * (kChannels * kPitch + kTile * kPitch + 8 * kTile + 8 * kTile);
  static_assert(kSharedBytes <= 48 * 1024, "fits every processor without an opt-in");
};

template <class Traits>
struct SimtSum {
  using Element = typename Traits::Element;
  using Real = typename Traits::Real;
  static constexpr int kTile = Traits::kTile;
  static constexpr int kPitch = Traits::kPitch;

  const SimtParams& p;
  Real* values_shared;   // [kChannels][kPitch]; during a contraction its two tiles [kTile][kPitch]
  Real* weights_shared;  // [kTile streamed][kPitch]: weight of owned position i at [j][i]
  Real* maxima;          // [8][kTile]
  Real* partial_sums;    // [8][kTile]
  int64_t sample;
  int first_owned, first_channel;
  int key_count;  // Keys::kKept: of the sample

  __device__ __forceinline__ int streamed_positions() const {
    if constexpr (Traits::kKeys == Keys::kKept) {
      return key_count;
    } else {
      return p.streamed_positions;
    }
  }

  // Base e, not 2: in float64 the change of base would round every energy once more.
  __device__ __forceinline__ static Real exponential(Real x) {
    if constexpr (sizeof(Real) == 8) {
      return exp(x);
    } else {
      return expf(x);
    }
  }

  __device__ __forceinline__ const Element* base(const Operand& operand) const {
    return static_cast<const Element*>(operand.data) + sample * operand.batch_stride;
  }

  // tile[row][column] = operand(first_row + row, first_column + column), 0 past its edges
  __device__ __forceinline__ void load(
      Real* tile, int tile_rows, const Operand& operand, int first_row, int rows, int first_column, int columns) {
    const int column = static_cast<int>(threadIdx.x) % kTile;
    for (int row = static_cast<int>(threadIdx.x) / kTile; row < tile_rows; row += Traits::kThreads / kTile) {
      const bool inside = first_row + row < rows && first_column + column < columns;
      tile[row * kPitch + column] = inside
          ? to_accumulator(base(operand)[(first_row + row) * operand.row_stride + first_column + column])
          : Real(0);
    }
  }

  // products[jj] = sum over `channels` of left(c, owned i) right(c, streamed j), i = this lane, j = 4 warp + jj
  __device__ __forceinline__ void contract(
      Real (&products)[4], const Operand& left, const Operand& right, int channels, int first_streamed) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    Real* left_tile = values_shared;
    Real* right_tile = values_shared + kTile * kPitch;
#pragma unroll
    for (int jj = 0; jj < 4; ++jj) {
      products[jj] = 0;
    }
    for (int channel = 0; channel < channels; channel += kTile) {
      __syncthreads();
      load(left_tile, kTile, left, channel, channels, first_owned, p.owned_positions);
      load(right_tile, kTile, right, channel, channels, first_streamed, streamed_positions());
      __syncthreads();
#pragma unroll 8
      for (int c = 0; c < kTile; ++c) {
        const Real x = left_tile[c * kPitch + lane];
#pragma unroll
        for (int jj = 0; jj < 4; ++jj) {
          products[jj] += x * right_tile[c * kPitch + 4 * warp + jj];
        }
      }
    }
  }

  __device__ __forceinline__ SimtSum(const SimtParams& params, Real* shared) : p(params) {
    values_shared = shared;
    weights_shared = values_shared + Traits::kChannels * kPitch;
    maxima = weights_shared + kTile * kPitch;
    partial_sums = maxima + 8 * kTile;
  }

  __device__ __forceinline__ void run() {
    int64_t block = blockIdx.x;
    const int channel_block = static_cast<int>(block % p.channel_blocks);
    block /= p.channel_blocks;
    first_owned = static_cast<int>(block % p.owned_blocks) * kTile;
    sample = block / p.owned_blocks;
    first_channel = channel_block * Traits::kChannels;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int column_group = static_cast<int>(threadIdx.x) % 8 * 4, row_group = static_cast<int>(threadIdx.x) / 8;
    if constexpr (Traits::kKeys == Keys::kKept) {
      key_count = p.key_counts[sample];
    }
    const Real scale = static_cast<Real>(p.scale);
    const int64_t queries = Traits::kOwnsQueries ? p.owned_positions : p.streamed_positions;
    const Real* logsumexp = static_cast<const Real*>(p.logsumexp) + sample * queries;
    const Real* logsumexp_low = static_cast<const Real*>(p.logsumexp_low) + sample * queries;
    const Real* delta = static_cast<const Real*>(p.delta) + sample * queries;

    Real sums[Traits::kRows][4] = {};
    Real max_energy = -INFINITY, weight_sum = 0;  // of owned position `lane`, the same in every warp
    Real grad_sum = 0;  // kCorrectsQueryGradient: of owned position `lane`, the warp's partial sum of dS
    for (int streamed = 0; streamed < streamed_positions(); streamed += kTile) {
      Real weights[4], gradients[4];  // first q.k and dP, then turned into the weights in place
      contract(weights, p.owned, p.streamed, p.key_channels, streamed);
      if constexpr (Traits::kNeedsProduct) {
        contract(gradients, p.left, p.right, p.value_channels, streamed);
      }
      Real factor = 1;
      if constexpr (Traits::kForward) {
        Real warp_max = -INFINITY;
#pragma unroll
        for (int jj = 0; jj < 4; ++jj) {
          weights[jj] = streamed + 4 * warp + jj < streamed_positions() ? weights[jj] * scale : -INFINITY;
          warp_max = fmax(warp_max, weights[jj]);
        }
        maxima[warp * kTile + lane] = warp_max;
        __syncthreads();
        const Real before = max_energy;
#pragma unroll
        for (int w = 0; w < 8; ++w) {
          max_energy = fmax(max_energy, maxima[w * kTile + lane]);
        }
        const Real shift = max_energy == -INFINITY ? Real(0) : max_energy;
        factor = exponential(before - shift);
        Real sum = 0;
#pragma unroll
        for (int jj = 0; jj < 4; ++jj) {
          weights[jj] = exponential(weights[jj] - shift);
          sum += weights[jj];
        }
        partial_sums[warp * kTile + lane] = sum;
      } else {
#pragma unroll
        for (int jj = 0; jj < 4; ++jj) {
          const int j = streamed + 4 * warp + jj;
          const int query = Traits::kOwnsQueries ? first_owned + lane : j;
          if (j < streamed_positions() && query < queries) {
            const Real difference = weights[jj] * scale - logsumexp[query];
            weights[jj] = exponential(Traits::kSubtractsLow ? difference - logsumexp_low[query] : difference);
            if constexpr (Traits::kNeedsProduct) {
              weights[jj] *= gradients[jj] - delta[query];
            }
          } else {
            weights[jj] = 0;
          }
        }
      }
#pragma unroll
      for (int jj = 0; jj < 4; ++jj) {
        weights_shared[(4 * warp + jj) * kPitch + lane] = weights[jj];
        if constexpr (Traits::kCorrectsQueryGradient) {
          grad_sum += weights[jj];
        }
      }
      __syncthreads();  // weights and sums are written, and the contraction tiles no longer read
      if constexpr (Traits::kForward) {
        weight_sum *= factor;
#pragma unroll
        for (int w = 0; w < 8; ++w) {
          weight_sum += partial_sums[w * kTile + lane];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Real f = __shfl_sync(0xffffffffu, factor, column_group + i);
#pragma unroll
          for (int r = 0; r < Traits::kRows; ++r) {
            sums[r][i] *= f;
          }
        }
      }
      load(values_shared, Traits::kChannels, p.values, first_channel, p.out_channels, streamed, streamed_positions());
      __syncthreads();
#pragma unroll 4
      for (int j = 0; j < kTile; ++j) {
        Real weight[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weight[i] = weights_shared[j * kPitch + column_group + i];
        }
#pragma unroll
        for (int r = 0; r < Traits::kRows; ++r) {
          const Real value = values_shared[(row_group + r * Traits::kRowGroups) * kPitch + j];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums[r][i] += value * weight[i];
          }
        }
      }
    }

    if constexpr (Traits::kCorrectsQueryGradient) {
      partial_sums[warp * kTile + lane] = grad_sum;
      __syncthreads();
      grad_sum = 0;
#pragma unroll
      for (int w = 0; w < 8; ++w) {
        grad_sum += partial_sums[w * kTile + lane];
      }
      if (p.grad_logsumexp != nullptr && first_owned + lane < p.owned_positions) {  // leaves the error of delta
        grad_sum -= static_cast<const Real*>(p.grad_logsumexp)[sample * queries + first_owned + lane];
      }
    }
    Real factor = static_cast<Real>(p.scale);  // of the query and key gradients
    if constexpr (Traits::kForward) {
      const bool is_empty =
          (Traits::kKeys == Keys::kKept && streamed_positions() == 0) || (p.is_part && weight_sum == 0);
      factor = is_empty ? Real(0) : Real(1) / weight_sum;
      if (channel_block == 0 && warp == 0 && first_owned + lane < p.owned_positions) {
        const int64_t query = sample * queries + first_owned + lane;
        const Real log_sum = sizeof(Real) == 8 ? log(weight_sum) : logf(weight_sum);
        const Real row_logsumexp = max_energy + log_sum;
        static_cast<Real*>(p.logsumexp)[query] = row_logsumexp;
        if (p.logsumexp_low != nullptr) {
          static_cast<Real*>(p.logsumexp_low)[query] =
              rounding_error(row_logsumexp, (max_energy - row_logsumexp) + log_sum);
        }
      }
    } else if constexpr (Traits::kSum == PositionSum::kValueGradient) {
      factor = 1;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Real f = __shfl_sync(0xffffffffu, factor, column_group + i);
      const Real column_grad_sum =
          Traits::kCorrectsQueryGradient ? __shfl_sync(0xffffffffu, grad_sum, column_group + i) : Real(0);
      const int position = first_owned + column_group + i;
#pragma unroll
      for (int r = 0; r < Traits::kRows; ++r) {
        const int channel = first_channel + row_group + r * Traits::kRowGroups;
        if (channel < p.out_channels && position < p.owned_positions) {
          const int64_t element = (sample * p.out_channels + channel) * p.owned_positions + position;
          if constexpr (Traits::kCorrectsQueryGradient) {
            sums[r][i] -= column_grad_sum * static_cast<const Real*>(p.mean_key)[element];
          }
          if (sizeof(Element) == 2 && p.is_part) {
            static_cast<Real*>(p.output)[element] = sums[r][i] * f;
            continue;
          }
          const Element result = from_accumulator<Element>(sums[r][i] * f);
          static_cast<Element*>(p.output)[element] = result;
          if constexpr (Traits::kForward && sizeof(Element) == 2) {
            if (p.output_low != nullptr) {
              static_cast<Element*>(p.output_low)[element] =
                  from_accumulator<Element>(sums[r][i] * f - to_accumulator(result));
            }
          }
        }
      }
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2) simt_sum_kernel(const SimtParams params) {
  SEGATTN_DYNAMIC_SHARED(typename Traits::Real, shared);
  SimtSum<Traits>(params, shared).run();
}

}  // namespace segattn::cuda
