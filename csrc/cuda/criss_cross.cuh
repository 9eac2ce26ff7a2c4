// Criss-cross attention: the kernels. A block takes up to four pairs of neighbouring lines (rows, or columns), four warps
// a pair. One image's lines are independent but for the log-sum-exp that rows and columns share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "criss_cross_tiles.cuh"
#include "launch.cuh"

namespace segattn {

__device__ __forceinline__ float line_exp(float x) { return ptx::exp2_approx(x * 1.4426950408889634f); }
__device__ __forceinline__ double line_exp(double x) { return exp(x); }

// Keeps the compiler from working on several of float64's long exponentials at once, for which there are no registers.
__device__ __forceinline__ void one_by_one(float&) {}
__device__ __forceinline__ void one_by_one(double& sum) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+d"(sum));
#else
  static_cast<void>(sum);
#endif
}

__host__ __device__ constexpr int round_up_16(int x) { return (x + 15) / 16 * 16; }

// What every kernel of the family shares: who this thread is, where its block is, the staging memory.
template <class Arithmetic>
struct LineBlock {
  using T = typename Arithmetic::Element;
  using Word = LineWord<T>;
  using Real = typename Arithmetic::Real;
  using Tile = PairTile<T, kLinePitch>;

  const Lines& lines;
  Word* stage; // planes * (kLineChannels * kLinePitch + padding) words, or two tiles of half as many channels
  LineWindow window;
  int owned_begin;

  __device__ __forceinline__ LineBlock(const Lines& lines_, Word* stage_, int channel_groups)
      : lines(lines_), stage(stage_) {
    int block = static_cast<int>(blockIdx.x) / channel_groups;
    owned_begin = block % lines.owned_blocks * lines.owned;
    block /= lines.owned_blocks;
    window.first_line = block % lines.line_blocks * 2 * lines.pairs;
    window.line_end = lines.count;
    window.planes = lines.pairs * 2 / kLinesPerPlane<T>;
    window.sample = block / lines.line_blocks;
  }

  // this warp's pair of lines, and its number among the pair's warps
  static __device__ __forceinline__ int pair() { return opaque(warp_index()) / kWarpsPerPair; }
  static __device__ __forceinline__ int quarter() { return opaque(warp_index()) % kWarpsPerPair; }
  __device__ __forceinline__ int owned_end() const { return min(owned_begin + lines.owned, lines.length); }
  __device__ __forceinline__ int plane() const { return pair() * 2 / kLinesPerPlane<T>; }
  __device__ __forceinline__ int first_line() const { return window.first_line + 2 * pair(); }
  __device__ __forceinline__ Tile tile(const Word* words, int channels) const {
    const int words_per_plane = plane_words(window.planes, channels);
    return {words + plane() * words_per_plane, words_per_plane};
  }

  // d[line][8-column tile] = left(:, q) . right(:, k) for the warp's 16 queries from first_query + 16 quarter and the
  // 64 keys from first_key
  __device__ __forceinline__ void multiply_features(
      Real (&d)[2][kLineTile / 8][4], const LineFeatures& left, const LineFeatures& right, int first_query,
      int first_key) const {
#pragma unroll
    for (int line = 0; line < 2; ++line) {
#pragma unroll
      for (int j = 0; j < kLineTile / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          d[line][j][e] = 0;
        }
      }
    }
    Word* right_words = stage + window.planes * plane_words(window.planes, kProductChannels);
    const Tile left_tile = tile(stage, kProductChannels), right_tile = tile(right_words, kProductChannels);
    const int queries = min(lines.length - first_query, kLineTile);
    const int keys = min(lines.length - first_key, kLineTile);
    for (int channel = 0; channel < left.channels; channel += kProductChannels) {
      __syncthreads();
      load_line_tile<T, kProductChannels>(stage, left, window, channel, first_query, lines.length);
      load_line_tile<T, kProductChannels>(right_words, right, window, channel, first_key, lines.length);
      __syncthreads();
      if (16 * quarter() >= queries) {
        continue;
      }
#pragma unroll
      for (int c = 0; c < kProductChannels; c += Arithmetic::kStep) {
        typename Arithmetic::A a[2];
        Arithmetic::load_a_positions(a, left_tile, 16 * quarter(), c);
#pragma unroll
        for (int j = 0; j < kLineTile / 16; ++j) {
          if (16 * j < keys) {
            typename Arithmetic::B b[2];
            Arithmetic::load_b_positions(b, right_tile, c, 16 * j);
#pragma unroll
            for (int line = 0; line < 2; ++line) {
              Arithmetic::multiply(d[line][2 * j], a[line], b[line], 0);
              Arithmetic::multiply(d[line][2 * j + 1], a[line], b[line], 1);
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ Real* scalar(const LineScalars& s, int line, int position) const {
    return static_cast<Real*>(s.data) + window.sample * s.batch_stride + (first_line() + line) * s.line_stride +
        position * s.position_stride;
  }

  // whether query q of the pair's line sees key k in this line
  __device__ __forceinline__ bool sees(int line, int q, int k) const {
    return q < lines.length && k < lines.length && first_line() + line < window.line_end &&
        !(lines.skips_self && q == k);
  }
};

// Every thread keeps maximum and sum over its own keys and the four lanes of a row merge at the end.
template <class Arithmetic>
__device__ __forceinline__ void line_statistics(
    const LineStatisticsParams& p, LineWord<typename Arithmetic::Element>* shared) {
  using Real = typename Arithmetic::Real;
  const LineBlock<Arithmetic> block(p.lines, shared, 1);
  Real highest[2][2], sum[2][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    highest[i / 2][i % 2] = -INFINITY;
    sum[i / 2][i % 2] = 0;
  }
  const int lane = opaque(lane_index()), first_row = block.owned_begin + 16 * block.quarter() + lane / 4;
  for (int first_key = 0; first_key < p.lines.length; first_key += kLineTile) {
    Real d[2][kLineTile / 8][4];
    block.multiply_features(d, p.query, p.key, block.owned_begin, first_key);
#pragma unroll
    for (int line = 0; line < 2; ++line) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Real top = highest[line][half];
#pragma unroll
        for (int j = 0; j < kLineTile / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            Real& x = d[line][j][2 * half + e];
            const int key = first_key + 8 * j + 2 * (lane % 4) + e;
            x = block.sees(line, first_row + 8 * half, key) ? x * static_cast<Real>(p.scale)
                                                            : -static_cast<Real>(INFINITY);
            top = fmax(top, x);
          }
        }
        const Real shift = top == -static_cast<Real>(INFINITY) ? Real(0) : top;
        Real total = sum[line][half] * line_exp(highest[line][half] - shift);
#pragma unroll
        for (int j = 0; j < kLineTile / 8; ++j) {
          total += line_exp(d[line][j][2 * half] - shift) + line_exp(d[line][j][2 * half + 1] - shift);
          one_by_one(total);
        }
        highest[line][half] = top;
        sum[line][half] = total;
      }
    }
  }
#pragma unroll
  for (int line = 0; line < 2; ++line) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Real top = highest[line][half];
      top = fmax(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmax(top, __shfl_xor_sync(0xffffffffu, top, 2));
      const Real shift = top == -static_cast<Real>(INFINITY) ? Real(0) : top;
      Real total = sum[line][half] * line_exp(highest[line][half] - shift);
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const int query = first_row + 8 * half;
      if (lane % 4 == 0 && query < block.owned_end() && block.first_line() + line < block.window.line_end) {
        Real* result = block.scalar(p.logsumexp, line, query);
        if (!p.lines.skips_self) {
          *result = shift + log(total);
        } else { // the column without the query itself: may be empty, total 0
          const Real row = *result, common = fmax(row, top);
          *result = common + log(line_exp(row - common) + total * line_exp(shift - common));
        }
      }
    }
  }
}

template <class Arithmetic>
__device__ __forceinline__ void line_product(
    const LineProductParams& p, LineWord<typename Arithmetic::Element>* shared) {
  using T = typename Arithmetic::Element;
  using Real = typename Arithmetic::Real;
  const LineBlock<Arithmetic> block(p.lines, shared, 1);
  const int g = lane_index() / 4, t = lane_index() % 4;
  for (int first_key = 0; first_key < p.lines.length; first_key += kLineTile) {
    Real d[2][kLineTile / 8][4];
    block.multiply_features(d, p.query_side, p.key_side, block.owned_begin, first_key);
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      T* out = static_cast<T*>(p.map.data) + block.window.sample * p.map.batch_stride +
          (block.first_line() + line) * p.map.line_stride;
#pragma unroll
      for (int i = 0; i < kLineTile / 2; ++i) {
        const int j = i / 4, e = i % 4;
        const int query = block.owned_begin + 16 * block.quarter() + g + e / 2 * 8;
        const int key = first_key + 8 * j + 2 * t + e % 2;
        if (query < block.owned_end() && block.sees(line, query, key)) {
          const int channel = p.map.first + key - (p.lines.skips_self && key > query);
          out[channel * p.map.channel_stride + query * p.map.position_stride] = from_accumulator<T>(d[line][j][e]);
        }
      }
    }
  }
}

template <class Arithmetic>
__global__ void __launch_bounds__(kMaxLineThreads<Arithmetic>) line_statistics_kernel(const LineStatisticsParams p) {
  if constexpr (kLineCompiled<Arithmetic>) {
    SEGATTN_DYNAMIC_SHARED(LineWord<typename Arithmetic::Element>, shared);
    line_statistics<Arithmetic>(p, shared);
  }
}

template <class Arithmetic>
__global__ void __launch_bounds__(kMaxLineThreads<Arithmetic>) line_product_kernel(const LineProductParams p) {
  if constexpr (kLineCompiled<Arithmetic>) {
    SEGATTN_DYNAMIC_SHARED(LineWord<typename Arithmetic::Element>, shared);
    line_product<Arithmetic>(p, shared);
  }
}

} // namespace segattn
