// Tiles: pieces of a channels-first matrix in shared memory, laid out so that neither the tensor-core loads nor the
// asynchronous copies meet a bank conflict, and the copies that fill them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ptx.cuh"

namespace segattn {

// A matrix in global memory whose rows start on 16 bytes: a feature map of one sample, a row a channel.
template <class T>
struct GlobalMatrix {
  const T* data;    // [rows][columns], row r at data + r * stride
  int64_t stride;   // elements from row to row
  int rows;         // channels
  int columns;      // positions
};

// [any number of rows][kColumns] of T in shared memory. The 16-byte chunks of a row are permuted by an exclusive or
// that depends on the row, so that these touch every bank once:
//   - eight consecutive rows of one chunk (one matrix of ldmatrix, plain or transposed, and stores of accumulators),
//   - rows 4i..4i+3 of eight consecutive 32-bit words (TF32 fragments whose contraction runs down the rows),
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

  // Two rows of 64 bytes share the 32 banks, hence the row pair counts there. The low bit of the row (pair) moves the
  // chunk by two: TF32 fragments take two neighbouring chunks of a row.
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

// Starts the copy of rows [row, row + rows) and columns [column, column + kColumns) of `source`, zeros beyond its
// edges. column is a multiple of 16 bytes. All kThreads threads of the block call it; the caller commits.
template <int kThreads, class T, int kColumns>
__device__ __forceinline__ void copy_tile_async(
    const SharedTile<T, kColumns>& tile, const GlobalMatrix<T>& source, int row, int rows, int column) {
  using Tile = SharedTile<T, kColumns>;
  static_assert(kThreads % Tile::kChunks == 0, "a thread copies the same chunk of every row it takes");
  constexpr int kRowStep = kThreads / Tile::kChunks;
  const int chunk = static_cast<int>(threadIdx.x) % Tile::kChunks;
  const int first_row = static_cast<int>(threadIdx.x) / Tile::kChunks;
  const int first_column = column + chunk * Tile::kPerChunk;
  const int left = source.columns - first_column;
  const int inside = left >= Tile::kPerChunk ? 16 : left > 0 ? left * static_cast<int>(sizeof(T)) : 0;
  const T* from = source.data + (row + first_row) * source.stride + first_column;
  const int64_t step = kRowStep * source.stride;
#pragma unroll 4
  for (int r = first_row; r < rows; r += kRowStep, from += step) {
    const int bytes = row + r < source.rows ? inside : 0;
    // where nothing is read the address still has to be a valid one
    ptx::cp_async_16(tile.chunk(r, chunk * Tile::kPerChunk), bytes ? from : source.data, bytes);
  }
}

} // namespace segattn
