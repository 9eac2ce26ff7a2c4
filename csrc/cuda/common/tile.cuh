// Tiles of channels-first matrices in shared memory, and the copies that fill them. Neither the tensor-core loads nor
// the asynchronous copies have bank conflicts.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/common/ptx.cuh"

namespace segattn::cuda {

// A matrix in global memory whose rows start on 16 bytes: the feature map of one sample, a row for each channel.
template <class T>
struct GlobalMatrix {
  const T* data;   // [rows][columns], row r at data + r * stride
  int64_t stride;  // elements from row to row
  int rows;        // channels
  int columns;     // positions
};

// [any number of rows][kColumns] of T in shared memory. The 16-byte chunks of a row are swizzled: an XOR with a
// function of the row permutes them. The following accesses then touch every bank once:
//   - eight consecutive rows of one chunk (one matrix of ldmatrix, plain or transposed, and stores of accumulators),
//   - rows 4i..4i+3 of eight consecutive 32-bit words (TF32 fragments that contract down the rows),
//   - a row's consecutive chunks (asynchronous copies).
template <class T, int kColumns>
struct SharedTile {
  static constexpr int kRowBytes = kColumns * static_cast<int>(sizeof(T));
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));
  static_assert(kRowBytes == 64 || kRowBytes % 128 == 0, "the permutation is written for rows of 64 or n * 128 bytes");

  unsigned char* data;

  __device__ __forceinline__ explicit SharedTile(void* shared) : data(static_cast<unsigned char*>(shared)) {}

  static constexpr int bytes(int rows) { return rows * kRowBytes; }

  // Two rows of 64 bytes span the 32 banks, so there the index of the row pair selects the permutation. The low bit of
  // the row (pair) moves a chunk by two, because TF32 fragments read two adjacent chunks of a row.
  static __device__ __forceinline__ int permutation(int row) {
    if constexpr (kRowBytes == 64) {
      return ((row & 2) | ((row >> 2) & 1));
    } else {
      return ((row & 3) << 1) | ((row >> 2) & 1);
    }
  }

  // column is a multiple of kPerChunk
  __device__ __forceinline__ unsigned char* chunk(int row, int column) const {
    return data + row * kRowBytes + (((column / kPerChunk) ^ permutation(row)) << 4);
  }

  __device__ __forceinline__ T* at(int row, int column) const {
    return reinterpret_cast<T*>(chunk(row, column & ~(kPerChunk - 1))) + (column & (kPerChunk - 1));
  }
};

// A thread's share of a tile that a block of kThreads copies: the same 16-byte chunk of every kRowStep-th row, starting
// at (row(), column()).
template <int kThreads, class T, int kColumns>
struct CopyShare {
  using Tile = SharedTile<T, kColumns>;
  static_assert(kThreads % Tile::kChunks == 0, "a thread copies the same chunk of each of its rows");
  static constexpr int kRowStep = kThreads / Tile::kChunks;
  static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / Tile::kChunks; }
  static __device__ __forceinline__ int column() {
    return static_cast<int>(threadIdx.x) % Tile::kChunks * Tile::kPerChunk;
  }
};

// Starts this thread's share of a copy of `rows` rows. `from` is the source's element at this thread's CopyShare. The
// source has `rows_inside` rows and `columns_inside` columns from the tile's corner on; the copy writes zeros past
// them. Nothing is read there, so the address need only be aligned.
template <int kThreads, class T, int kColumns>
__device__ __forceinline__ void copy_share_async(
    const SharedTile<T, kColumns>& tile, const T* from, int64_t stride, int rows, int rows_inside, int columns_inside) {
  using Share = CopyShare<kThreads, T, kColumns>;
  constexpr int kPerChunk = SharedTile<T, kColumns>::kPerChunk;
  const int left = columns_inside - Share::column();
  const int inside = left >= kPerChunk ? 16 : left > 0 ? left * static_cast<int>(sizeof(T)) : 0;
  // Not unrolled: the addresses of several rows would take registers that the accumulators need.
#pragma unroll 1
  for (int r = Share::row(); r < rows; r += Share::kRowStep, from += Share::kRowStep * stride) {
    ptx::cp_async_16(tile.chunk(r, Share::column()), from, r < rows_inside ? inside : 0);
  }
}

// Starts the copy of rows [row, row + rows) and columns [column, column + kColumns) of `source`, with zeros past its
// edges. `column` is a multiple of 16 bytes. All kThreads threads of the block call it; the caller commits.
template <int kThreads, class T, int kColumns>
__device__ __forceinline__ void copy_tile_async(
    const SharedTile<T, kColumns>& tile, const GlobalMatrix<T>& source, int row, int rows, int column) {
  using Share = CopyShare<kThreads, T, kColumns>;
  copy_share_async<kThreads>(
      tile, source.data + (row + Share::row()) * source.stride + column + Share::column(), source.stride, rows,
      source.rows - row, source.columns - column);
}

}  // namespace segattn::cuda
