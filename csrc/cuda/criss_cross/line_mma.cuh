// Arithmetic policies of the criss-cross kernels. A warp multiplies tiles of two lines at once: with tensor cores for
// 16-bit types, TF32 and 3xTF32, with fused multiply-adds otherwise. All use mma's accumulator layout, with
// g = lane / 4 and t = lane % 4: d[0], d[1] = (g, 2t), (g, 2t + 1); d[2], d[3] = (g + 8, 2t), (g + 8, 2t + 1).
//
// Feature tiles are [plane][channel][position]. 16-bit elements of two neighbouring lines share a 32-bit word, the even
// line in the low half. Column strips then need no transpose: a load of two words holds two neighbouring positions of
// both lines. A plane is such a pair of lines, or one line of wider elements. Weight tiles are [line][query][key].
//
// The order of the contraction within a fragment is free as long as both operands agree. Contracted channels are loaded
// as t, t + 4 where mma defines 2t, 2t + 1, and contracted positions of 32-bit elements as 2t, 2t + 1 where it defines
// t, t + 4. With rows of 8 (mod 16) words no load has bank conflicts.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/ptx.cuh"

namespace segattn::cuda {

template <class T>
struct LineWordOf {
  using type = T;
};
template <>
struct LineWordOf<__half> {
  using type = uint32_t;
};
template <>
struct LineWordOf<__nv_bfloat16> {
  using type = uint32_t;
};
template <class T>
using LineWord = typename LineWordOf<T>::type;

template <class T>
constexpr int kLinesPerPlane = sizeof(T) == 2 ? 2 : 1;

// The feature tiles of a warp's two lines in shared memory.
template <class T, int kPitch>
struct PairTile {
  const LineWord<T>* words;  // the pair's first plane
  int plane_words;           // distance of two planes; in 16-bit types the pair is one plane

  __device__ __forceinline__ const LineWord<T>* at(int line, int channel, int position) const {
    return words + (kLinesPerPlane<T> == 1 ? line * plane_words : 0) + channel * kPitch + position;
  }
  // the tile from the given channel and position on
  __device__ __forceinline__ PairTile from(int channel, int position) const {
    return {at(0, channel, position), plane_words};
  }
};

// Tensor cores, T = __half or __nv_bfloat16.
template <class T>
struct LineMma16 {
  using Element = T;
  using Real = float;
  static constexpr bool kTensorCores = true;
  static constexpr bool kRegisterBound = false;
  static constexpr int kStep = 16;  // contraction of one product
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[4];  // 16 columns
  };

  static __device__ __forceinline__ void split(uint32_t first, uint32_t second, uint32_t& even, uint32_t& odd) {
    even = __byte_perm(first, second, 0x5410);
    odd = __byte_perm(first, second, 0x7632);
  }

  // rows: 16 channels from c; contraction: the first positions of `lane_tile`, from a_channels
  template <class Tile>
  static __device__ __forceinline__ Tile a_channels(const Tile& tile, int lane) {
    return tile.from(lane / 4, lane % 4 * 2);
  }
  template <class Tile>
  static __device__ __forceinline__ void load_a_channels(A (&a)[2], const Tile& lane_tile, int c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint2 w = *reinterpret_cast<const uint2*>(lane_tile.at(0, c + i % 2 * 8, i / 2 * 8));
      split(w.x, w.y, a[0].r[i], a[1].r[i]);
    }
  }

  // rows: 16 positions from p; contraction: channels from c
  template <class Tile>
  static __device__ __forceinline__ void load_a_positions(A (&a)[2], const Tile& tile, int p, int c) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int channel = c + t + i / 2 * 8, position = p + g + i % 2 * 8;
      split(*tile.at(0, channel, position), *tile.at(0, channel + 4, position), a[0].r[i], a[1].r[i]);
    }
  }

  // contraction: channels from c; columns: 16 positions from p
  template <class Tile>
  static __device__ __forceinline__ void load_b_positions(B (&b)[2], const Tile& tile, int c, int p) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int channel = c + t + i % 2 * 8, position = p + g + i / 2 * 8;
      split(*tile.at(0, channel, position), *tile.at(0, channel + 4, position), b[0].r[i], b[1].r[i]);
    }
  }

  // The lane's elements of a line's weights: kWeightRows offsets, computed once for several fragments.
  static constexpr int kWeightRows = 1;

  // columns of the product: 16 queries from q, clamped to last_query; contraction: the first keys of `weights`
  static __device__ __forceinline__ void query_rows(
      int (&rows)[kWeightRows], int lane, int pitch, int q, int last_query) {
    rows[0] = min(q + lane % 8 + lane / 16 * 8, last_query) * pitch + lane / 8 % 2 * 8;
  }
  static __device__ __forceinline__ void load_b_queries(B& b, const T* weights, const int (&rows)[kWeightRows]) {
    ptx::ldmatrix_x4(b.r, weights + rows[0]);
  }

  // contraction: queries from q, clamped to last_query: the values of those past it are zero; columns of the product:
  // the first 16 keys of `weights`
  static __device__ __forceinline__ void key_rows(
      int (&rows)[kWeightRows], int lane, int pitch, int q, int last_query) {
    rows[0] = min(q + lane % 16, last_query) * pitch + lane / 16 * 8;
  }
  static __device__ __forceinline__ void load_b_keys(B& b, const T* weights, const int (&rows)[kWeightRows]) {
    ptx::ldmatrix_x4_trans(b.r, weights + rows[0]);
  }

  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b, int half) {
    const uint32_t column[2] = {b.r[2 * half], b.r[2 * half + 1]};
    ptx::mma_m16n8k16<T>(d, a.r, column);
  }
};

// Tensor cores, float32: one product of operands rounded to TF32, or three products with the accuracy of float32.
template <int kProducts>
struct LineTf32 {
  using Element = float;
  using Real = float;
  using Mma = MmaTf32<kProducts>;
  static constexpr bool kTensorCores = true;
  static constexpr bool kRegisterBound = kProducts == 3;
  static constexpr int kStep = 8;
  using A = typename Mma::A;
  using B = typename Mma::B;

  template <class Tile>
  static __device__ __forceinline__ Tile a_channels(const Tile& tile, int lane) {
    return tile.from(lane / 4, lane % 4 * 2);
  }
  template <class Tile>
  static __device__ __forceinline__ void load_a_channels(A (&a)[2], const Tile& lane_tile, int c) {
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      const float2 upper = *reinterpret_cast<const float2*>(lane_tile.at(line, c, 0));
      const float2 lower = *reinterpret_cast<const float2*>(lane_tile.at(line, c + 8, 0));
      const uint32_t words[4] = {
          __float_as_uint(upper.x), __float_as_uint(lower.x), __float_as_uint(upper.y), __float_as_uint(lower.y)};
      Mma::split(a[line].r, words);
    }
  }

  template <class Tile>
  static __device__ __forceinline__ void load_a_positions(A (&a)[2], const Tile& tile, int p, int c) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = __float_as_uint(*tile.at(line, c + t + i / 2 * 4, p + g + i % 2 * 8));
      }
      Mma::split(a[line].r, words);
    }
  }

  template <class Tile>
  static __device__ __forceinline__ void load_b_positions(B (&b)[2], const Tile& tile, int c, int p) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = __float_as_uint(*tile.at(line, c + t + i % 2 * 4, p + g + i / 2 * 8));
      }
      Mma::split(b[line].r, words);
    }
  }

  static constexpr int kWeightRows = 2;

  static __device__ __forceinline__ void query_rows(
      int (&rows)[kWeightRows], int lane, int pitch, int q, int last_query) {
    const int g = lane / 4, t = lane % 4;
    rows[0] = min(q + g, last_query) * pitch + 2 * t;
    rows[1] = min(q + g + 8, last_query) * pitch + 2 * t;
  }
  static __device__ __forceinline__ void load_b_queries(B& b, const float* weights, const int (&rows)[kWeightRows]) {
    const float2 left = *reinterpret_cast<const float2*>(weights + rows[0]);
    const float2 right = *reinterpret_cast<const float2*>(weights + rows[1]);
    const uint32_t words[4] = {
        __float_as_uint(left.x), __float_as_uint(left.y), __float_as_uint(right.x), __float_as_uint(right.y)};
    Mma::split(b.r, words);
  }

  static __device__ __forceinline__ void key_rows(
      int (&rows)[kWeightRows], int lane, int pitch, int q, int last_query) {
    const int g = lane / 4, t = lane % 4;
    rows[0] = min(q + 2 * t, last_query) * pitch + g;
    rows[1] = min(q + 2 * t + 1, last_query) * pitch + g;
  }
  static __device__ __forceinline__ void load_b_keys(B& b, const float* weights, const int (&rows)[kWeightRows]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = __float_as_uint(weights[rows[i % 2] + i / 2 * 8]);
    }
    Mma::split(b.r, words);
  }

  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b, int half) {
    Mma::multiply(d, a, b, half);
  }
};

// Fused multiply-adds in the accumulator type: float64 on every device, all types on devices before sm_80.
template <class T>
struct LineSimt {
  using Element = T;
  using Real = Accumulator<T>;
  static constexpr bool kTensorCores = false;
  static constexpr bool kRegisterBound = sizeof(Real) == 8;
  static constexpr int kStep = 1;
  struct A {
    Real r[2][kStep];  // rows g and g + 8
  };
  struct B {
    Real r[2][2][kStep];  // columns 2t and 2t + 1 of either half
  };

  static __device__ __forceinline__ Real element(const LineWord<T>* word, int line) {
    if constexpr (kLinesPerPlane<T> == 2) {
      return to_accumulator(reinterpret_cast<const T*>(word)[line]);
    } else {
      return to_accumulator(*word);
    }
  }

  template <class Tile>
  static __device__ __forceinline__ Tile a_channels(const Tile& tile, int lane) {
    return tile.from(lane / 4, 0);
  }
  template <class Tile>
  static __device__ __forceinline__ void load_a_channels(A (&a)[2], const Tile& lane_tile, int c) {
#pragma unroll
    for (int line = 0; line < 2; ++line) {
#pragma unroll
      for (int i = 0; i < 2 * kStep; ++i) {
        a[line].r[i / kStep][i % kStep] = element(lane_tile.at(line, c + i / kStep * 8, i % kStep), line);
      }
    }
  }

  template <class Tile>
  static __device__ __forceinline__ void load_a_positions(A (&a)[2], const Tile& tile, int p, int c) {
    const int g = lane_index() / 4;
#pragma unroll
    for (int line = 0; line < 2; ++line) {
#pragma unroll
      for (int i = 0; i < 2 * kStep; ++i) {
        a[line].r[i / kStep][i % kStep] = element(tile.at(line, c + i % kStep, p + g + i / kStep * 8), line);
      }
    }
  }

  template <class Tile>
  static __device__ __forceinline__ void load_b_positions(B (&b)[2], const Tile& tile, int c, int p) {
    const int t = lane_index() % 4;
#pragma unroll
    for (int line = 0; line < 2; ++line) {
#pragma unroll
      for (int column = 0; column < 4; ++column) {
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          b[line].r[column / 2][column % 2][i] =
              element(tile.at(line, c + i, p + 2 * t + column % 2 + column / 2 * 8), line);
        }
      }
    }
  }

  static constexpr int kWeightRows = 4;

  static __device__ __forceinline__ void query_rows(
      int (&rows)[kWeightRows], int lane, int pitch, int q, int last_query) {
    const int t = lane % 4;
#pragma unroll
    for (int column = 0; column < 4; ++column) {
      rows[column] = min(q + 2 * t + column % 2 + column / 2 * 8, last_query) * pitch;
    }
  }
  static __device__ __forceinline__ void load_b_queries(B& b, const T* weights, const int (&rows)[kWeightRows]) {
#pragma unroll
    for (int column = 0; column < 4; ++column) {
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        b.r[column / 2][column % 2][i] = to_accumulator(weights[rows[column] + i]);
      }
    }
  }

  static __device__ __forceinline__ void key_rows(
      int (&rows)[kWeightRows], int lane, int pitch, int q, int last_query) {
    const int t = lane % 4;
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      rows[i] = min(q + i, last_query) * pitch + 2 * t;
    }
  }
  static __device__ __forceinline__ void load_b_keys(B& b, const T* weights, const int (&rows)[kWeightRows]) {
#pragma unroll
    for (int column = 0; column < 4; ++column) {
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        b.r[column / 2][column % 2][i] = to_accumulator(weights[rows[i] + column % 2 + column / 2 * 8]);
      }
    }
  }

  static __device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
  static __device__ __forceinline__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

  static __device__ __forceinline__ void multiply(Real (&d)[4], const A& a, const B& b, int half) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        d[e] = fused(a.r[e / 2][i], b.r[half][e % 2][i], d[e]);
      }
    }
  }
};

// Whether kernels with this arithmetic have a body on the architecture being compiled. The host code launches fused
// multiply-adds only for float64 and before sm_80 (choose_arithmetic).
template <class Arithmetic>
constexpr bool kLineCompiled =
#ifdef __CUDA_ARCH__
    Arithmetic::kTensorCores ? __CUDA_ARCH__ >= 800 : __CUDA_ARCH__ < 800 || sizeof(typename Arithmetic::Real) == 8;
#else
    true;
#endif

}  // namespace segattn::cuda
