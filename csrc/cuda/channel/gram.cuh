// The products of channel attention, left right^T of 16-bit operands, in float32. PyTorch's 16-bit cuBLAS product
// rounds to 16 bits, in which DANet's energies (about 5,100 at 512 x 97 x 97) overflow or lose the softmax.
//
// Both operands are [channel][position] and contracted along the rows, so tiles need no transposition. The positions
// are divided into splits with a partial matrix each, which the softmax adds in order. If left is right, only one
// triangle of tiles is computed, and tiles off the diagonal are also stored transposed.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/channel/params.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/math.h"
#include "cuda/common/mma.cuh"
#include "cuda/common/tile.cuh"

namespace segattn::cuda {

template <class Mma_>
struct GramTraits {
  using Mma = Mma_;
  using T = typename Mma::Element;
  static constexpr int kTile = 128;  // channels of either operand
  static constexpr int kDepth = 32;  // positions of a step: rows of 64 bytes
  static constexpr int kStages = 5;  // 80 KB: two blocks on sm_80
  static constexpr int kThreads = 256;
  static constexpr int kWarpRows = 32, kWarpColumns = 64;  // 4 x 2 warps
  static constexpr int kTileBytes = SharedTile<T, kDepth>::bytes(kTile);
  static constexpr size_t kSharedBytes = static_cast<size_t>(kStages) * 2 * kTileBytes;
  static_assert(
      kSharedBytes <= 99 * 1024, "a block fits the smallest shared memory of devices with 16-bit tensor cores");
};

// Row and column of tile number `pair` in the lower triangle, diagonal included, counted row by row.
__device__ __forceinline__ void triangle_tile(int pair, int& row, int& column) {
  row = static_cast<int>((sqrtf(8.0f * static_cast<float>(pair) + 1.0f) - 1.0f) * 0.5f);
  row -= row * (row + 1) / 2 > pair;
  row += (row + 1) * (row + 2) / 2 <= pair;
  column = pair - row * (row + 1) / 2;
}

// target[0] = first, target[1] = second, as far as `left` elements remain in the row. A single store where aligned:
// four lanes then write a whole sector.
__device__ __forceinline__ void store_adjacent(float* target, float first, float second, int64_t left) {
  if (left > 1 && reinterpret_cast<uintptr_t>(target) % 8 == 0) {
    *reinterpret_cast<float2*>(target) = make_float2(first, second);
  } else {
    if (left > 0) {
      target[0] = first;
    }
    if (left > 1) {
      target[1] = second;
    }
  }
}

template <class Traits>
__device__ __forceinline__ void gram(const GramParams& p, unsigned char* shared) {
  using Mma = typename Traits::Mma;
  using T = typename Traits::T;
  using Tile = SharedTile<T, Traits::kDepth>;
  int64_t block = blockIdx.x;
  const int split = static_cast<int>(block % p.splits);
  block /= p.splits;
  const int pair = static_cast<int>(block % p.tile_pairs);
  const int64_t sample = block / p.tile_pairs;
  int row_tile = pair / p.right_tiles, column_tile = pair % p.right_tiles;
  if (p.symmetric) {
    triangle_tile(pair, row_tile, column_tile);
  }
  const int first_row = row_tile * Traits::kTile, first_column = column_tile * Traits::kTile;
  const int begin = split * p.positions_per_split, end = min(begin + p.positions_per_split, p.positions);
  const bool on_diagonal = p.symmetric && row_tile == column_tile;

  using Share = CopyShare<Traits::kThreads, T, Traits::kDepth>;
  const auto first = [&](const Operand& operand, int channel) {
    return static_cast<const T*>(operand.data) + sample * operand.batch_stride +
        (channel + Share::row()) * operand.row_stride + begin + Share::column();
  };
  const T* next_left = first(p.left, first_row);
  const T* next_right = first(p.right, first_column);
  int copied = begin, copy_stage = 0;
  const auto tile = [&](int stage, int side) { return Tile(shared + (2 * stage + side) * Traits::kTileBytes); };
  const auto next_stage = [](int stage) { return stage == Traits::kStages - 1 ? 0 : stage + 1; };
  const auto start_next = [&] {
    if (copied < end) {
      copy_share_async<Traits::kThreads, Traits::kTile>(
          tile(copy_stage, 0), next_left, p.left.row_stride, Traits::kTile, p.left_channels - first_row, end - copied);
      if (!on_diagonal) {
        copy_share_async<Traits::kThreads, Traits::kTile>(
            tile(copy_stage, 1), next_right, p.right.row_stride, Traits::kTile, p.right_channels - first_column,
            end - copied);
      }
      next_left += Traits::kDepth;
      next_right += Traits::kDepth;
      copied += Traits::kDepth;
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
  int stage = 0;
  for (int position = begin; position < end; position += Traits::kDepth) {
    ptx::cp_async_wait<Traits::kStages - 2>();
    __syncthreads();  // this step's tiles have arrived, and the last step's are no longer read
    start_next();
    multiply_tiles<Mma, Major::kRow, Major::kColumn, 2>(
        sums, tile(stage, 0), row, tile(stage, on_diagonal ? 0 : 1), column, 0, Traits::kDepth);
    stage = next_stage(stage);
  }

  const int g = lane_index() / 4, t = lane_index() % 4;
  const int64_t rows = p.left_channels, columns = p.right_channels;
  float* products = p.products + (split * p.batch + sample) * rows * columns;
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = first_row + row + 16 * i + g + 8 * half, k = first_column + column + 8 * j + 2 * t;
        if (c < rows) {
          store_adjacent(products + c * columns + k, sums[i][j][2 * half], sums[i][j][2 * half + 1], columns - k);
          if (p.symmetric && !on_diagonal) {
            for (int e = 0; e < 2 && k + e < columns; ++e) {
              products[(k + e) * columns + c] = sums[i][j][2 * half + e];
            }
          }
        }
      }
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2) gram_kernel(const GramParams p) {
  SEGATTN_DYNAMIC_SHARED(unsigned char, shared);
  gram<Traits>(p, shared);
}

}  // namespace segattn::cuda
