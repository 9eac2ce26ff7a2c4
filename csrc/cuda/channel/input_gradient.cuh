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
  static constexpr int kDepth = 32;  // contracted channels of a step
  static constexpr int kStages = 5;  // 80 KB: two blocks on sm_80
  static constexpr int kThreads = 256;
  static constexpr int kWarpRows = 32, kWarpColumns = 64;  // 4 x 2 warps
  static constexpr int kTileBytes = SharedTile<T, kTile>::bytes(kDepth);
  static constexpr size_t kSharedBytes = static_cast<size_t>(kStages) * 2 * kTileBytes;
  static_assert(
      kSharedBytes <= 99 * 1024, "a block fits the smallest shared memory of devices with 16-bit tensor cores");
};

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

  // The sources of the next copy: first weights and grad_output, then symmetric and input.
  using Share = CopyShare<Traits::kThreads, T, Traits::kTile>;
  const auto first = [&](const Operand& operand, int column) {
    return static_cast<const T*>(operand.data) + sample * operand.batch_stride + Share::row() * operand.row_stride +
        column + Share::column();
  };
  const T* next_left = first(p.weights, first_channel);
  const T* next_right = first(p.grad_output, first_position);
  int64_t left_stride = p.weights.row_stride, right_stride = p.grad_output.row_stride;
  int rows_left = p.channels, copy_stage = 0;
  bool second = false;
  const auto tile = [&](int stage, int side) { return Tile(shared + (2 * stage + side) * Traits::kTileBytes); };
  const auto next_stage = [](int stage) { return stage == Traits::kStages - 1 ? 0 : stage + 1; };
  const auto start_next = [&] {
    if (rows_left <= 0 && !second) {
      next_left = first(p.symmetric, first_channel);
      next_right = first(p.input, first_position);
      left_stride = p.symmetric.row_stride;
      right_stride = p.input.row_stride;
      rows_left = p.channels;
      second = true;
    }
    if (rows_left > 0) {
      copy_share_async<Traits::kThreads, Traits::kDepth>(
          tile(copy_stage, 0), next_left, left_stride, Traits::kDepth, rows_left, p.channels - first_channel);
      copy_share_async<Traits::kThreads, Traits::kDepth>(
          tile(copy_stage, 1), next_right, right_stride, Traits::kDepth, rows_left, p.positions - first_position);
      next_left += Traits::kDepth * left_stride;
      next_right += Traits::kDepth * right_stride;
      rows_left -= Traits::kDepth;
      copy_stage = next_stage(copy_stage);
    }
    ptx::cp_async_commit();
  };

  constexpr int kM = Traits::kWarpRows / 16, kN = Traits::kWarpColumns / 8;
  float sums[kM][kN][4] = {};
  const int row = warp_index() % 4 * Traits::kWarpRows, column = warp_index() / 4 * Traits::kWarpColumns;
#pragma unroll
  for (int step = 0; step < Traits::kStages - 1; ++step) {
    start_next();
  }
  const int steps = 2 * ceil_div(p.channels, Traits::kDepth);
  int stage = 0;
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<Traits::kStages - 2>();
    __syncthreads();  // this step's tiles have arrived, and the last step's are no longer read
    start_next();
    multiply_tiles<Mma, Major::kColumn, Major::kRow, 2>(
        sums, tile(stage, 0), row, tile(stage, 1), column, 0, Traits::kDepth);
    stage = next_stage(stage);
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
__global__ void __launch_bounds__(Traits::kThreads, 2) channel_combine_kernel(const InputGradientParams p) {
  SEGATTN_DYNAMIC_SHARED(unsigned char, shared);
  input_gradient<Traits>(p, shared);
}

}  // namespace segattn::cuda
