// Products of many small matrices at once, one per lane: C(m, n) = sum over k of A(m, k) B(n, k), where an element is a
// vector V whose lanes belong to adjacent columns of a feature map. Vectors load what is adjacent in memory: nothing is
// transposed, and no element is broadcast.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "cpu/common/prefetch.h"
#include "cpu/common/range.h"
#include "cpu/common/simd.h"
#include "cpu/common/work_counter.h"

namespace segattn::cpu {

// Element (i, k): the vector at data + i * row + k * step.
template <class A>
struct LaneOperand {
  const A* data;
  std::int64_t row, step;
};

// Element (m, n): the vector at data + m * row + n * column.
template <class A>
struct LaneResult {
  A* data;
  std::int64_t row, column;
};

enum class Accumulate { kNo, kYes };

// 24 sums + 4 vectors of B + 1 of A in 32 registers; 9 + 3 + 1 in 16.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kLaneRows = 6;
inline constexpr int kLaneColumns = 4;
#else
inline constexpr int kLaneRows = 3;
inline constexpr int kLaneColumns = 3;
#endif

// Target steps of a block of k: 6 x 32 vectors of A (12 KB) stay in L1 while B streams past.
inline constexpr std::int64_t kLaneSteps = 32;

namespace detail {

template <class V, int rows, int columns, class A = ElementOf<V>>
void lane_kernel(LaneOperand<A> a, LaneOperand<A> b, std::int64_t steps, LaneResult<A> c, Accumulate accumulate) {
  V sums[rows][columns] = {};
  if (accumulate == Accumulate::kYes) {
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < columns; ++j) {
        sums[i][j] = load<V>(c.data + i * c.row + j * c.column);
      }
    }
  }
  for (std::int64_t k = 0; k < steps; ++k) {
    V vectors[columns];
#pragma GCC unroll 8
    for (int j = 0; j < columns; ++j) {
      vectors[j] = load<V>(b.data + j * b.row);
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const V vector = load<V>(a.data + i * a.row);
#pragma GCC unroll 8
      for (int j = 0; j < columns; ++j) {
        sums[i][j] = fma(vector, vectors[j], sums[i][j]);
      }
    }
    a.data += a.step;
    b.data += b.step;
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < columns; ++j) {
      store(c.data + i * c.row + j * c.column, sums[i][j]);
    }
  }
}

template <class A>
using LaneKernel = void (*)(LaneOperand<A>, LaneOperand<A>, std::int64_t, LaneResult<A>, Accumulate);

template <class V, int... index>
constexpr auto make_lane_kernels(std::integer_sequence<int, index...>) {
  return std::array<LaneKernel<ElementOf<V>>, sizeof...(index)>{
      lane_kernel<V, index / kLaneColumns + 1, index % kLaneColumns + 1>...};
}

template <class V>
inline constexpr auto kLaneKernels = make_lane_kernels<V>(std::make_integer_sequence<int, kLaneRows * kLaneColumns>{});

}  // namespace detail

// C (m x n) = A (m x steps) B^T (steps x n), or C += with Accumulate::kYes. The order of a sum depends on `steps`
// alone. meanwhile(parts) is called before each of the product's `parts` parts, to prefetch what is needed next.
template <class V, class Meanwhile = DoNothing, class A = ElementOf<V>>
void lane_product(
    const LaneOperand<A>& a, std::int64_t m, const LaneOperand<A>& b, std::int64_t n, std::int64_t steps,
    const LaneResult<A>& c, Accumulate accumulate, Meanwhile&& meanwhile = {}) {
  count_multiply_adds(m * n * steps * kWidthOf<V>);
  // The nearest number of blocks, not the ceiling: few steps beyond a block join it.
  const std::int64_t blocks = std::max<std::int64_t>(1, (steps + kLaneSteps / 2 - 1) / kLaneSteps);
  const std::int64_t parts = blocks * ceil_div(m, kLaneRows) * ceil_div(n, kLaneColumns);
  for (std::int64_t block = 0; block < blocks; ++block) {
    const Range k = part_of(steps, 1, block, blocks);
    const Accumulate block_accumulate = block > 0 ? Accumulate::kYes : accumulate;
    for (std::int64_t i = 0; i < m; i += kLaneRows) {
      const std::int64_t rows = std::min<std::int64_t>(kLaneRows, m - i);
      for (std::int64_t j = 0; j < n; j += kLaneColumns) {
        const std::int64_t columns = std::min<std::int64_t>(kLaneColumns, n - j);
        meanwhile(parts);
        detail::kLaneKernels<V>[(rows - 1) * kLaneColumns + columns - 1](
            {a.data + i * a.row + k.begin * a.step, a.row, a.step},
            {b.data + j * b.row + k.begin * b.step, b.row, b.step}, k.size(),
            {c.data + i * c.row + j * c.column, c.row, c.column}, block_accumulate);
      }
    }
  }
}

}  // namespace segattn::cpu
