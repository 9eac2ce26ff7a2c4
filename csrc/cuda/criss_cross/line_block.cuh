// What the blocks of all criss-cross kernels share: their lines, their owned positions, and the products of feature
// tiles staged in shared memory. A block has up to four pairs of neighbouring lines (rows or columns). The lines of an
// image are independent except for the logsumexp that rows and columns share.
#pragma once

#include <cmath>
#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/common/launch.cuh"
#include "cuda/common/math.h"
#include "cuda/criss_cross/line_tiles.cuh"

namespace segattn::cuda {

__device__ __forceinline__ float line_exp(float x) {
  return ptx::exp2_approx(x * kLog2E);
}
__device__ __forceinline__ double line_exp(double x) {
  return exp(x);
}
// exp(x - low) for a low near 0
__device__ __forceinline__ float line_exp(float x, float low) {
  return ptx::exp2_approx(fmaf(x, kLog2E, -low * kLog2E));
}
__device__ __forceinline__ double line_exp(double x, double low) {
  return exp(x - low);
}

// scale * product - shift with one rounding. All kernels use it: a large energy that some round and others do not gives
// different weights.
__device__ __forceinline__ float shifted_energy(float product, float scale, float shift) {
  return fmaf(product, scale, -shift);
}
__device__ __forceinline__ double shifted_energy(double product, double scale, double shift) {
  return fma(product, scale, -shift);
}

template <class Real>
struct Logsumexp {
  Real value;
  Real low;  // the exact logsumexp minus value
};

// max_energy + log(sum)
template <class Real>
__device__ __forceinline__ Logsumexp<Real> split_logsumexp(Real max_energy, Real sum) {
  const Real log_sum = log(sum), value = max_energy + log_sum, added = value - max_energy;
  const Real low = (max_energy - (value - added)) + (log_sum - added);
  return {value, fabs(value) < static_cast<Real>(INFINITY) ? low : Real(0)};
}

// Keeps the compiler from interleaving float64 exponentials, which would spill registers.
__device__ __forceinline__ void serialize(float&) {}
__device__ __forceinline__ void serialize(double& sum) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+d"(sum));
#else
  static_cast<void>(sum);
#endif
}

template <class Arithmetic, class Shape_>
struct LineBlock {
  using Shape = Shape_;
  using T = typename Arithmetic::Element;
  using Word = LineWord<T>;
  using Real = typename Arithmetic::Real;
  using Tile = PairTile<T, Shape::kPitch>;
  static constexpr int kTile = Shape::kTile;
  using Products = Real[2][kTile / 8][4];  // of a warp's 16 queries and a tile of keys: [line][8 keys][element]

  const Lines& lines;
  Word* staging;  // 2^plane_bits planes of kLineChannels, or two tiles of kProductChannels
  LineWindow window;
  int owned_begin;

  __device__ __forceinline__ LineBlock(const Lines& lines_, Word* staging_, int channel_groups)
      : lines(lines_), staging(staging_) {
    int block = static_cast<int>(blockIdx.x) / channel_groups;
    owned_begin = rematerialize(block % lines.owned_blocks * lines.owned);
    block /= lines.owned_blocks;
    window.first_line = block % lines.line_blocks * 2 * lines.pairs;
    window.line_end = lines.count;
    window.plane_bits = __ffs(lines.pairs) - (kLinesPerPlane<T> == 2);
    window.sample = block / lines.line_blocks;
  }

  // the warp's pair of lines, and its rank among the warps of that pair
  static __device__ __forceinline__ int pair() { return hidden(warp_index()) / Shape::kWarps; }
  static __device__ __forceinline__ int rank() { return hidden(warp_index()) % Shape::kWarps; }
  static __device__ __forceinline__ int lane() { return hidden(lane_index()) % 32; }
  // g and t of line_mma.cuh
  static __device__ __forceinline__ int lane_row() { return hidden(lane_index()) / 4; }
  static __device__ __forceinline__ int lane_column() { return hidden(lane_index()) % 4; }
  __device__ __forceinline__ int owned_end() const {
    return min(rematerialize(owned_begin) + lines.owned, lines.length);
  }
  __device__ __forceinline__ int plane() const { return pair() * 2 / kLinesPerPlane<T>; }
  __device__ __forceinline__ int first_line() const { return window.first_line + 2 * pair(); }
  __device__ __forceinline__ Tile tile(const Word* words, int channels) const {
    const int words_per_plane = plane_words<Shape>(window.plane_bits, channels);
    return {words + plane() * words_per_plane, words_per_plane};
  }

  // the second of two staged tiles of kProductChannels
  __device__ __forceinline__ Word* right_staging() const {
    return staging + (plane_words<Shape>(window.plane_bits, kProductChannels) << window.plane_bits);
  }

  // d += left . right for the warp's queries and a tile of keys, over the kProductChannels staged channels
  __device__ __forceinline__ void multiply_staged(Products& d, int queries, int keys) const {
    const Tile left = tile(staging, kProductChannels);
    const Tile right = tile(right_staging(), kProductChannels);
    if (16 * rank() >= queries) {
      return;
    }
#pragma unroll
    for (int c = 0; c < kProductChannels; c += Arithmetic::kStep) {
      typename Arithmetic::A a[2];
      Arithmetic::load_a_positions(a, left, 16 * rank(), c);
#pragma unroll
      for (int j = 0; j < kTile / 16; ++j) {
        if (16 * j < keys) {
          typename Arithmetic::B b[2];
          Arithmetic::load_b_positions(b, right, c, 16 * j);
#pragma unroll
          for (int line = 0; line < 2; ++line) {
            Arithmetic::multiply(d[line][2 * j], a[line], b[line], 0);
            Arithmetic::multiply(d[line][2 * j + 1], a[line], b[line], 1);
          }
        }
      }
    }
  }

  // Stages kProductChannels channels of left from first_query on, and of right from first_key on.
  __device__ __forceinline__ void load_product(
      const LineFeatures& left, const LineFeatures& right, int channel, int first_query, int first_key) const {
    __syncthreads();
    load_line_tile<T, Shape, kProductChannels>(staging, left, window, channel, first_query, lines.length);
    load_line_tile<T, Shape, kProductChannels>(right_staging(), right, window, channel, first_key, lines.length);
    __syncthreads();
  }

  static __device__ __forceinline__ void clear(Products& d) {
#pragma unroll
    for (int i = 0; i < 2 * (kTile / 8) * 4; ++i) {
      d[i / (kTile / 2)][i / 4 % (kTile / 8)][i % 4] = 0;
    }
  }

  // d = left(:, q) . right(:, k) for the warp's 16 queries from first_query + 16 rank and a tile of keys from first_key
  __device__ __forceinline__ void multiply_features(
      Products& d, const LineFeatures& left, const LineFeatures& right, int first_query, int first_key) const {
    clear(d);
    for (int channel = 0; channel < left.channels; channel += kProductChannels) {
      load_product(left, right, channel, first_query, first_key);
      multiply_staged(d, lines.length - first_query, lines.length - first_key);
    }
  }

  // Sets the elements of the keys that a query does not attend to: those past the end, and its own where it does not
  // count. d: as from multiply_features. Queries that do not exist are not told apart.
  __device__ __forceinline__ void mask(Products& d, int first_query, int first_key, Real value) const {
    const int column = 2 * lane_column();
    if (first_key + kTile > lines.length) {
      const int left = lines.length - first_key - column;
      for_elements([&](int line, int j, int half, int e) {
        Real& x = d[line][j][2 * half + e];
        x = 8 * j + e < left ? x : value;
      });
    }
    const int first_own = first_query + 16 * rank() - first_key;  // the first query's own position, in the tile
    if (lines.skips_self && first_own > -16 && first_own < kTile) {
      const int own = first_own + lane_row() - column;
      for_elements([&](int line, int j, int half, int e) {
        Real& x = d[line][j][2 * half + e];
        x = own == 8 * (j - half) + e ? value : x;
      });
    }
  }

  __device__ __forceinline__ int64_t scalar_offset(const LineScalars& s, int line, int position) const {
    return window.sample * s.batch_stride + (first_line() + line) * s.line_stride + position * s.position_stride;
  }
  __device__ __forceinline__ Real* scalar(const LineScalars& s, int line, int position) const {
    return static_cast<Real*>(s.data) + scalar_offset(s, line, position);
  }
  __device__ __forceinline__ Logsumexp<Real> logsumexp(const LineLogsumexp& l, int line, int position) const {
    const int64_t offset = scalar_offset(l, line, position);
    return {
        static_cast<const Real*>(l.data)[offset], l.low == nullptr ? Real(0) : static_cast<const Real*>(l.low)[offset]};
  }
  __device__ __forceinline__ void store_logsumexp(
      const LineLogsumexp& l, int line, int position, const Logsumexp<Real>& logsumexp) const {
    const int64_t offset = scalar_offset(l, line, position);
    static_cast<Real*>(l.data)[offset] = logsumexp.value;
    static_cast<Real*>(l.low)[offset] = logsumexp.low;
  }

  // The keys that a query attends to.
  struct Keys {
    int end;   // 0: none
    int self;  // the query's own position where it does not count, -1 otherwise
    __device__ __forceinline__ bool contain(int k) const { return k < end && k != self; }
  };

  // Those of query q in the given line of the pair; none beyond the edges.
  __device__ __forceinline__ Keys attended(int line, int q) const {
    const bool exists = q < lines.length && first_line() + line < window.line_end;
    return {exists ? lines.length : 0, lines.skips_self ? q : -1};
  }

 private:
  // visit(line, 8 keys, half, element) for all elements of a lane's products
  template <class Visit>
  static __device__ __forceinline__ void for_elements(const Visit& visit) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      visit(i % 2, i / 8, i / 2 % 2, i / 4 % 2);
    }
  }

  // x >= 0, rematerialized. Unsigned: dividing an int by a power of two takes three instructions more.
  static __device__ __forceinline__ unsigned hidden(int x) { return static_cast<unsigned>(rematerialize(x)); }
};

}  // namespace segattn::cuda
