// The input gradient of channel self-attention for 16-bit types: two products over channels in one accumulator.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/channel/params.h"
#include "cuda/common/element.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/math.h"
#include "cuda/common/mma.cuh"
#include "cuda/common/tile.cuh"

namespace segattn::cuda {

template <class Mma_>
struct InputGradientTraits {
  using Mma = Mma_;
  using T = typename Mma::Element;
  static constexpr int kTile = 128;  // output channels, positions
  static constexpr int kDepth = 64;  // contracted channels of a step
  static constexpr int kStages = 3;
  static constexpr int kThreads = 256;
  static constexpr int kWarpRows = 32, kWarpColumns = 64;  // 4 x 2 warps
  static constexpr int kTileBytes = SharedTile<T, kTile>::bytes(kDepth);
  static constexpr size_t kSharedBytes = static_cast<size_t>(kStages) * 2 * kTileBytes;
  static_assert(
      kSharedBytes <= 99 * 1024, "a block fits the smallest shared memory of devices with 16-bit tensor cores");
};

template <class T>
__device__ __forceinline__ GlobalMatrix<T> matrix_of(const Operand& operand, int64_t sample, int rows, int columns) {
  return {static_cast<const T*>(operand.data) + sample * operand.batch_stride, operand.row_stride, rows, columns};
}

template <class Traits>
__device__ __forceinline__ void input_gradient(const InputGradientParams& p, unsigned char* shared) {
  using Mma = typename Traits::Mma;
  using T = typename Traits::T;
  using Tile = SharedTile<T, Traits::kTile>;  // [contracted channel][output channel or position]
  int64_t block = blockIdx.x;
  const int first_channel = static_cast<int>(block % p.channel_tiles) * Traits::kTile;
  block /= p.channel_tiles;
  const int first_position = static_cast<int>(block % p.position_tiles) * Traits::kTile;
  const int64_t sample = block / p.position_tiles;
  const int64_t channels = p.channels;
  const int steps_each = ceil_div(p.channels, Traits::kDepth), steps = 2 * steps_each;

  const auto tile = [&](int stage, int side) { return Tile(shared + (2 * stage + side) * Traits::kTileBytes); };
  const auto start = [&](int step) {
    if (step < steps) {
      // Selected, not indexed: an array indexed at run time would be in local memory (96 bytes per thread).
      const bool second = step >= steps_each;
      const auto left = matrix_of<T>(second ? p.symmetric : p.weights, sample, p.channels, p.channels);
      const auto right = matrix_of<T>(second ? p.input : p.grad_output, sample, p.channels, p.positions);
      const int row = (step - (second ? steps_each : 0)) * Traits::kDepth, stage = step % Traits::kStages;
      copy_tile_async<Traits::kThreads>(tile(stage, 0), left, row, Traits::kDepth, first_channel);
      copy_tile_async<Traits::kThreads>(tile(stage, 1), right, row, Traits::kDepth, first_position);
    }
    ptx::cp_async_commit();
  };

  constexpr int kM = Traits::kWarpRows / 16, kN = Traits::kWarpColumns / 8;
  float sums[kM][kN][4] = {};
  const int row = warp_index() % 4 * Traits::kWarpRows, column = warp_index() / 4 * Traits::kWarpColumns;
#pragma unroll
  for (int step = 0; step < Traits::kStages - 1; ++step) {
    start(step);
  }
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<Traits::kStages - 2>();
    __syncthreads();  // this step's tiles have arrived, and the last step's are no longer read
    start(step + Traits::kStages - 1);
    const int stage = step % Traits::kStages;
    multiply_tiles<Mma, Major::kColumn, Major::kRow, 2>(
        sums, tile(stage, 0), row, tile(stage, 1), column, 0, Traits::kDepth);
  }

  const int g = lane_index() / 4, t = lane_index() % 4;
  T* grad_input = static_cast<T*>(p.grad_input) + sample * channels * p.positions;
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int c = first_channel + row + 16 * i + g + e / 2 * 8;
        const int n = first_position + column + 8 * j + 2 * t + e % 2;
        if (c < p.channels && n < p.positions) {
          grad_input[static_cast<int64_t>(c) * p.positions + n] = from_accumulator<T>(sums[i][j][e]);
        }
      }
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads) channel_combine_kernel(const InputGradientParams p) {
  SEGATTN_DYNAMIC_SHARED(unsigned char, shared);
  input_gradient<Traits>(p, shared);
}

}  // namespace segattn::cuda
