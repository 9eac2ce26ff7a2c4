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

// An element of a tile, from which others are reached without the permutation: a step of eight rows leaves it as it is,
// and a step along the columns is an XOR of the chunk. The kernels compute a position once for each lane and tile. The
// elements of a warp's fragments then differ by a constant or by one XOR.
//
// Columns are stepped by a multiple of kPerChunk, and the bits of the distance, in chunks, are zero in the column of
// the position: a warp's columns start at a multiple of their number rounded up to a power of two.
template <class T, int kColumns>
class TilePosition {
  using Tile = SharedTile<T, kColumns>;
  static constexpr int kPermuted = 7;  // the bits of a chunk's index that a permutation can change

  unsigned char* tile_;
  int offset_;

  __device__ __forceinline__ T* moved(int rows, int columns, int flipped) const {
    const int chunks = columns / Tile::kPerChunk;
    const int permuted = (chunks & kPermuted) ^ flipped;
    return reinterpret_cast<T*>(
        tile_ + (offset_ ^ (permuted << 4)) + (rows * Tile::kRowBytes + (chunks & ~kPermuted) * 16));
  }

 public:
  __device__ __forceinline__ TilePosition(const Tile& tile, int row, int column)
      : tile_(tile.data),
        offset_(static_cast<int>(reinterpret_cast<unsigned char*>(tile.at(row, column)) - tile.data)) {}

  // `rows` is a multiple of 8.
  __device__ __forceinline__ T* at(int rows, int columns) const { return moved(rows, columns, 0); }

  // The element four rows further down; the row of the position is at most 3 above a multiple of 8.
  __device__ __forceinline__ T* at_4_below(int rows, int columns) const { return moved(rows + 4, columns, 1); }
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
//
// kRows: `rows` where it is a constant, 0 where it is not. A tile of constant size inside the source is copied without
// bounds and by constant steps.
template <int kThreads, int kRows = 0, class T, int kColumns>
__device__ __forceinline__ void copy_share_async(
    const SharedTile<T, kColumns>& tile, const T* from, int64_t stride, int rows, int rows_inside, int columns_inside) {
  using Tile = SharedTile<T, kColumns>;
  using Share = CopyShare<kThreads, T, kColumns>;
  constexpr int kPerChunk = Tile::kPerChunk;
  if constexpr (kRows > 0) {
    static_assert(kRows % Share::kRowStep == 0 && Share::kRowStep % 8 == 0, "all threads copy rows of one permutation");
    if (kRows <= rows_inside && kColumns <= columns_inside) {
      unsigned char* to = tile.chunk(Share::row(), Share::column());
#pragma unroll
      for (int i = 0; i < kRows / Share::kRowStep; ++i, from += Share::kRowStep * stride) {
        ptx::cp_async_16(to + i * Share::kRowStep * Tile::kRowBytes, from, 16);
      }
      return;
    }
  }
  const int left = columns_inside - Share::column();
  const int inside = left >= kPerChunk ? 16 : left > 0 ? left * static_cast<int>(sizeof(T)) : 0;
  // Not unrolled: the addresses of several rows would take registers that the accumulators need.
#pragma unroll 1
  for (int r = Share::row(); r < rows; r += Share::kRowStep, from += Share::kRowStep * stride) {
    ptx::cp_async_16(tile.chunk(r, Share::column()), from, r < rows_inside ? inside : 0);
  }
}

// Starts the copy of rows [row, row + rows) and columns [column, column + kColumns) of `source`, with zeros past its
// edges. `column` is a multiple of 16 bytes. All kThreads threads of the block call it; the caller commits. kRows as in
// copy_share_async.
template <int kThreads, int kRows = 0, class T, int kColumns>
__device__ __forceinline__ void copy_tile_async(
    const SharedTile<T, kColumns>& tile, const GlobalMatrix<T>& source, int row, int rows, int column) {
  using Share = CopyShare<kThreads, T, kColumns>;
  copy_share_async<kThreads, kRows>(
      tile, source.data + (row + Share::row()) * source.stride + column + Share::column(), source.stride, rows,
      source.rows - row, source.columns - column);
}

}  // namespace segattn::cuda
