// How a warp multiplies pieces of two lines at once: tensor cores for 16-bit, TF32 and 3xTF32, fused multiply-adds for
// everything else. All share one layout of the accumulators, mma's: g = lane / 4, t = lane % 4; d[0], d[1] = (g, 2t),
// (g, 2t + 1); d[2], d[3] = (g + 8, 2t), (g + 8, 2t + 1).
//
// Feature tiles are [plane][channel][position]. 16-bit elements of two neighbouring lines share a 32-bit word, the even
// line in the low half: a column strip then needs no transposing, since a load of two words gives both lines' pairs of
// neighbouring positions. A plane is such a pair of lines, or a single line of wider elements. Map tiles are
// [line][query][key].
//
// Which element of the contraction takes which place in a fragment is free as long as both operands agree. Contracted
// channels are taken t, t + 4 where mma says 2t, 2t + 1, and contracted positions of 32-bit elements 2t, 2t + 1 where it
// says t, t + 4: with rows of 8 (mod 16) words no load meets a bank conflict.
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

// One warp's view of two lines' features in shared memory: row c of line l at words(l) + c * pitch.
template <class T, int kPitch>
struct PairTile {
  const LineWord<T>* words;  // of the pair's first plane
  int plane_words;           // from plane to plane; one plane for 16-bit types

  __device__ __forceinline__ const LineWord<T>* at(int line, int channel, int position) const {
    return words + (kLinesPerPlane<T> == 1 ? line * plane_words : 0) + channel * kPitch + position;
  }
};

// Tensor cores, T = __half or __nv_bfloat16.
template <class T>
struct LineMma16 {
  using Element = T;
  using Real = float;
  static constexpr bool kTensorCores = true;
  static constexpr bool kRegisterBound = false;  // for registers
  static constexpr int kStep = 16;               // contraction of one product
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

  // rows: 16 channels from c; contraction: positions from k
  template <class Tile>
  static __device__ __forceinline__ void load_a_channels(A (&a)[2], const Tile& tile, int c, int k) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint2 w = *reinterpret_cast<const uint2*>(tile.at(0, c + g + i % 2 * 8, k + 2 * t + i / 2 * 8));
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

  // contraction: keys (columns of the map) from k; columns of the product: 16 queries from q, those past last_query
  // repeat it
  static __device__ __forceinline__ void load_b_queries(B& b, const T* map, int pitch, int k, int q, int last_query) {
    const int lane = lane_index();
    ptx::ldmatrix_x4(b.r, map + min(q + lane % 8 + lane / 16 * 8, last_query) * pitch + k + lane / 8 % 2 * 8);
  }

  // contraction: queries (rows of the map) from q, where those past last_query meet zeros; columns: 16 keys from k
  static __device__ __forceinline__ void load_b_keys(B& b, const T* map, int pitch, int q, int k, int last_query) {
    const int lane = lane_index();
    ptx::ldmatrix_x4_trans(b.r, map + min(q + lane % 16, last_query) * pitch + k + lane / 16 * 8);
  }

  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b, int half) {
    const uint32_t column[2] = {b.r[2 * half], b.r[2 * half + 1]};
    ptx::mma_m16n8k16<T>(d, a.r, column);
  }
};

// Tensor cores for float32: operands rounded to TF32 (kProducts = 1), or float32's accuracy from three products.
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
  static __device__ __forceinline__ void load_a_channels(A (&a)[2], const Tile& tile, int c, int k) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      const float2 upper = *reinterpret_cast<const float2*>(tile.at(line, c + g, k + 2 * t));
      const float2 lower = *reinterpret_cast<const float2*>(tile.at(line, c + g + 8, k + 2 * t));
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

  static __device__ __forceinline__ void load_b_queries(
      B& b, const float* map, int pitch, int k, int q, int last_query) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const float2 left = *reinterpret_cast<const float2*>(map + min(q + g, last_query) * pitch + k + 2 * t);
    const float2 right = *reinterpret_cast<const float2*>(map + min(q + g + 8, last_query) * pitch + k + 2 * t);
    const uint32_t words[4] = {
        __float_as_uint(left.x), __float_as_uint(left.y), __float_as_uint(right.x), __float_as_uint(right.y)};
    Mma::split(b.r, words);
  }

  static __device__ __forceinline__ void load_b_keys(B& b, const float* map, int pitch, int q, int k, int last_query) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = __float_as_uint(map[min(q + 2 * t + i % 2, last_query) * pitch + k + g + i / 2 * 8]);
    }
    Mma::split(b.r, words);
  }

  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b, int half) {
    Mma::multiply(d, a, b, half);
  }
};

// Fused multiply-adds in the accumulator's type: float64 everywhere, all types on processors before sm_80.
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
    Real r[2][2][kStep];  // columns 2t and 2t + 1, of either half
  };

  static __device__ __forceinline__ Real element(const LineWord<T>* word, int line) {
    if constexpr (kLinesPerPlane<T> == 2) {
      return to_accumulator(reinterpret_cast<const T*>(word)[line]);
    } else {
      return to_accumulator(*word);
    }
  }

  template <class Tile>
  static __device__ __forceinline__ void load_a_channels(A (&a)[2], const Tile& tile, int c, int k) {
    const int g = lane_index() / 4;
#pragma unroll
    for (int line = 0; line < 2; ++line) {
#pragma unroll
      for (int i = 0; i < 2 * kStep; ++i) {
        a[line].r[i / kStep][i % kStep] = element(tile.at(line, c + g + i / kStep * 8, k + i % kStep), line);
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

  static __device__ __forceinline__ void load_b_queries(B& b, const T* map, int pitch, int k, int q, int last_query) {
    const int t = lane_index() % 4;
#pragma unroll
    for (int column = 0; column < 4; ++column) {
      const T* row = map + min(q + 2 * t + column % 2 + column / 2 * 8, last_query) * pitch + k;
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        b.r[column / 2][column % 2][i] = to_accumulator(row[i]);
      }
    }
  }

  static __device__ __forceinline__ void load_b_keys(B& b, const T* map, int pitch, int q, int k, int last_query) {
    const int t = lane_index() % 4;
#pragma unroll
    for (int column = 0; column < 4; ++column) {
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        b.r[column / 2][column % 2][i] =
            to_accumulator(map[min(q + i, last_query) * pitch + k + 2 * t + column % 2 + column / 2 * 8]);
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

// Whether the architecture being compiled runs it: the host code asks for fused multiply-adds in float64 and where there
// are no tensor cores for these types.
template <class Arithmetic>
constexpr bool kLineCompiled =
#ifdef __CUDA_ARCH__
    Arithmetic::kTensorCores ? __CUDA_ARCH__ >= 800 : __CUDA_ARCH__ < 800 || sizeof(typename Arithmetic::Real) == 8;
#else
    true;
#endif

}  // namespace segattn::cuda
