// Tensor-core operands, a policy for each arithmetic. A policy loads fragments of A (16 x kStep) and B (kStep x 16, two
// mma wide) from shared tiles in either layout and multiplies them. One kernel template then serves 16-bit, TF32 and
// 3xTF32.
//
//   a_row(tile, m)       tile is [m][k]: its rows are rows of the product
//   a_column(tile, m)    tile is [k][m]: its rows are contracted (channels-first queries, keys)
//   b_column(tile, n)    tile is [n][k]
//   b_row(tile, n)       tile is [k][n]
// give the lane's position in the fragment at k = 0, and load_a_row(a, position, rows, columns) and so on load the
// fragment that is so many rows and columns of the tile further.
//   multiply(d, a, b, half)    d (16 x 8) += a * columns [8 half, 8 half + 8) of b
// Ready is the type of tile elements that need no conversion when they are loaded, where there is one, else Element.
//
// Accumulators have mma's layout, with g = lane / 4 and t = lane % 4:
//   d[0], d[1] = (g, 2t), (g, 2t+1);  d[2], d[3] = (g+8, 2t), (g+8, 2t+1)
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/tile.cuh"

namespace segattn::cuda {

__device__ __forceinline__ int lane_index() {
  return static_cast<int>(threadIdx.x) % 32;
}
__device__ __forceinline__ int warp_index() {
  return static_cast<int>(threadIdx.x) / 32;
}

// Rounds this thread's share of a tile (CopyShare) in place. The thread has waited for its copies.
template <int kThreads, int kColumns>
__device__ __forceinline__ void round_share(const SharedTile<float, kColumns>& tile, int rows) {
  using Share = CopyShare<kThreads, float, kColumns>;
#pragma unroll 1
  for (int r = Share::row(); r < rows; r += Share::kRowStep) {
    float4* chunk = reinterpret_cast<float4*>(tile.chunk(r, Share::column()));
    const float4 x = *chunk;
    *chunk = make_float4(round_to_tf32(x.x), round_to_tf32(x.y), round_to_tf32(x.z), round_to_tf32(x.w));
  }
}

// T = __half or __nv_bfloat16, float32 accumulators
template <class T>
struct Mma16 {
  using Element = T;
  using Ready = T;
  static constexpr int kStep = 16;     // contraction of one mma
  static constexpr int kProducts = 1;  // mma instructions for one product
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[4];
  };

  template <int kColumns>
  using Position = TilePosition<T, kColumns>;

  template <int kColumns>
  static __device__ __forceinline__ Position<kColumns> a_row(const SharedTile<T, kColumns>& tile, int m) {
    const int lane = lane_index();
    return {tile, m + lane % 16, lane / 16 * 8};
  }
  template <int kColumns>
  static __device__ __forceinline__ Position<kColumns> a_column(const SharedTile<T, kColumns>& tile, int m) {
    const int lane = lane_index();
    return {tile, lane % 8 + lane / 16 * 8, m + lane / 8 % 2 * 8};
  }
  template <int kColumns>
  static __device__ __forceinline__ Position<kColumns> b_column(const SharedTile<T, kColumns>& tile, int n) {
    const int lane = lane_index();
    return {tile, n + lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8};
  }
  template <int kColumns>
  static __device__ __forceinline__ Position<kColumns> b_row(const SharedTile<T, kColumns>& tile, int n) {
    const int lane = lane_index();
    return {tile, lane % 16, n + lane / 16 * 8};
  }

  template <int kColumns>
  static __device__ __forceinline__ void load_a_row(A& a, const Position<kColumns>& position, int rows, int columns) {
    ptx::ldmatrix_x4(a.r, position.at(rows, columns));
  }
  template <int kColumns>
  static __device__ __forceinline__ void load_a_column(
      A& a, const Position<kColumns>& position, int rows, int columns) {
    ptx::ldmatrix_x4_trans(a.r, position.at(rows, columns));
  }
  template <int kColumns>
  static __device__ __forceinline__ void load_b_column(
      B& b, const Position<kColumns>& position, int rows, int columns) {
    ptx::ldmatrix_x4(b.r, position.at(rows, columns));
  }
  template <int kColumns>
  static __device__ __forceinline__ void load_b_row(B& b, const Position<kColumns>& position, int rows, int columns) {
    ptx::ldmatrix_x4_trans(b.r, position.at(rows, columns));
  }

  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b, int half) {
    const uint32_t column[2] = {b.r[2 * half], b.r[2 * half + 1]};
    ptx::mma_m16n8k16<T>(d, a.r, column);
  }
};

// float32 elements. kProducts = 1: operands are rounded to TF32 (10 mantissa bits). kProducts = 3: each operand is
// split into two TF32 numbers, and the three largest of the four products are added, smallest first: 21 bits.
//
// Tensor cores round every sum towards zero, so the errors of a long contraction add up in one accumulator: 1e-4 of the
// result after 9,409 products, a quarter of TF32's own rounding but 50 times the error allowed for float32. With three
// products, every step therefore starts from zero, and float32 additions that round to nearest add it to the sum.
template <int kProducts_>
struct MmaTf32 {
  static_assert(kProducts_ == 1 || kProducts_ == 3, "one product rounds to TF32, three keep float32's accuracy");
  using Element = float;
  using Ready = std::conditional_t<kProducts_ == 1, Tf32, float>;
  static constexpr int kStep = 8;
  static constexpr int kProducts = kProducts_;
  static constexpr int kParts = kProducts == 3 ? 2 : 1;
  struct A {
    uint32_t r[kParts][4];
  };
  struct B {
    uint32_t r[kParts][4];
  };

  // T: the type of the words, float or Tf32. Of three products, the first part is rounded like to_tf32, but without its
  // test for NaN: a NaN may become 0 there, and is kept by the second part. Tensor cores truncate that part to TF32.
  template <class T = float>
  static __device__ __forceinline__ void split(uint32_t (&parts)[kParts][4], const uint32_t (&words)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = __uint_as_float(words[i]);
      if constexpr (kParts == 2) {
        parts[0][i] = (words[i] + 0x1000u) & ~0x1fffu;
        parts[1][i] = __float_as_uint(x - __uint_as_float(parts[0][i]));
      } else {
        parts[0][i] = std::is_same_v<T, Tf32> ? words[i] : ptx::to_tf32(x);
      }
    }
  }

  template <class T>
  static __device__ __forceinline__ uint32_t word(const T* element) {
    return __float_as_uint(to_accumulator(*element));
  }

  template <class T, int kColumns>
  static __device__ __forceinline__ TilePosition<T, kColumns> a_row(const SharedTile<T, kColumns>& tile, int m) {
    const int lane = lane_index();
    return {tile, m + lane % 16, lane / 16 * 4};
  }
  template <class T, int kColumns>
  static __device__ __forceinline__ TilePosition<T, kColumns> a_column(const SharedTile<T, kColumns>& tile, int m) {
    const int lane = lane_index();
    return {tile, lane % 4, m + lane / 4};
  }
  template <class T, int kColumns>
  static __device__ __forceinline__ TilePosition<T, kColumns> b_column(const SharedTile<T, kColumns>& tile, int n) {
    const int lane = lane_index();
    return {tile, n + lane % 8 + lane / 16 * 8, lane / 8 % 2 * 4};
  }
  template <class T, int kColumns>
  static __device__ __forceinline__ TilePosition<T, kColumns> b_row(const SharedTile<T, kColumns>& tile, int n) {
    const int lane = lane_index();
    return {tile, lane % 4, n + lane / 4};
  }

  template <class T, int kColumns>
  static __device__ __forceinline__ void load_a_row(
      A& a, const TilePosition<T, kColumns>& position, int rows, int columns) {
    uint32_t words[4];
    ptx::ldmatrix_x4(words, position.at(rows, columns));
    split<T>(a.r, words);
  }
  template <class T, int kColumns>
  static __device__ __forceinline__ void load_a_column(
      A& a, const TilePosition<T, kColumns>& position, int rows, int columns) {
    const uint32_t words[4] = {
        word(position.at(rows, columns)), word(position.at(rows, columns + 8)),
        word(position.at_4_below(rows, columns)), word(position.at_4_below(rows, columns + 8))};
    split<T>(a.r, words);
  }
  template <class T, int kColumns>
  static __device__ __forceinline__ void load_b_column(
      B& b, const TilePosition<T, kColumns>& position, int rows, int columns) {
    uint32_t words[4];
    ptx::ldmatrix_x4(words, position.at(rows, columns));
    split<T>(b.r, words);
  }
  template <class T, int kColumns>
  static __device__ __forceinline__ void load_b_row(
      B& b, const TilePosition<T, kColumns>& position, int rows, int columns) {
    const uint32_t words[4] = {
        word(position.at(rows, columns)), word(position.at_4_below(rows, columns)),
        word(position.at(rows, columns + 8)), word(position.at_4_below(rows, columns + 8))};
    split<T>(b.r, words);
  }

  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b, int half) {
    const uint32_t high[2] = {b.r[0][2 * half], b.r[0][2 * half + 1]};
    if constexpr (kProducts == 3) {
      const uint32_t low[2] = {b.r[1][2 * half], b.r[1][2 * half + 1]};
      float sum[4] = {};
      ptx::mma_m16n8k8_tf32(sum, a.r[1], high);
      ptx::mma_m16n8k8_tf32(sum, a.r[0], low);
      ptx::mma_m16n8k8_tf32(sum, a.r[0], high);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        d[i] += sum[i];
      }
    } else {
      ptx::mma_m16n8k8_tf32(d, a.r[0], high);
    }
  }
};

// The storage order of a tile's matrix.
enum class Major { kRow, kColumn };

// d[kM][kN] (16 kM x 8 kN, one warp) += A B over contraction [k, k_end), both operands from tiles; kN is even.
// Row-major tiles are [m][k] and [k][n], column-major ones [k][m] and [n][k]. kUnroll: the number of mma steps whose
// fragments may be loaded ahead, registers permitting.
template <class Mma, Major kMajorA, Major kMajorB, int kUnroll, int kM, int kN, class TileA, class TileB>
__device__ __forceinline__ void multiply_tiles(
    float (&d)[kM][kN][4], const TileA& a_tile, int m, const TileB& b_tile, int n, int k, int k_end) {
  static_assert(kN % 2 == 0, "B fragments are two mma wide");
  // A 3xTF32 fragment takes twice the registers, and every product in flight has its own sums. 3xTF32 therefore holds
  // the fragments of A, of which there are fewer, and one of B; its three mma per product hide the loads.
  constexpr bool kSingle = Mma::kProducts == 3 && kN > 2;
  constexpr int kFragments = kSingle ? 1 : kN / 2;
  constexpr int kRowFragments = kSingle ? kM : 1;
  const auto a_position = [&] {
    if constexpr (kMajorA == Major::kRow) {
      return Mma::a_row(a_tile, m);
    } else {
      return Mma::a_column(a_tile, m);
    }
  }();
  const auto b_position = [&] {
    if constexpr (kMajorB == Major::kRow) {
      return Mma::b_row(b_tile, n);
    } else {
      return Mma::b_column(b_tile, n);
    }
  }();
  const auto load_b = [&](typename Mma::B& b, int j) {
    if constexpr (kMajorB == Major::kRow) {
      Mma::load_b_row(b, b_position, k, 16 * j);
    } else {
      Mma::load_b_column(b, b_position, 16 * j, k);
    }
  };
  const auto load_a = [&](typename Mma::A& a, int i) {
    if constexpr (kMajorA == Major::kRow) {
      Mma::load_a_row(a, a_position, 16 * i, k);
    } else {
      Mma::load_a_column(a, a_position, k, 16 * i);
    }
  };
  const auto multiply = [&](const typename Mma::A& a, const typename Mma::B& b, int i, int j) {
    Mma::multiply(d[i][2 * j], a, b, 0);
    Mma::multiply(d[i][2 * j + 1], a, b, 1);
  };
#pragma unroll kUnroll
  for (; k < k_end; k += Mma::kStep) {
    typename Mma::A a[kRowFragments];
    typename Mma::B b[kFragments];
    if constexpr (kSingle) {
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        load_a(a[i], i);
      }
#pragma unroll
      for (int j = 0; j < kN / 2; ++j) {
        load_b(b[0], j);
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          multiply(a[i], b[0], i, j);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < kN / 2; ++j) {
        load_b(b[j], j);
      }
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        load_a(a[0], i);
#pragma unroll
        for (int j = 0; j < kN / 2; ++j) {
          multiply(a[0], b[j], i, j);
        }
      }
    }
  }
}

}  // namespace segattn::cuda
