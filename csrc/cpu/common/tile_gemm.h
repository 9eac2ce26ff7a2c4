// Register-blocked tile GEMM: C[M x N] (+)= A[M x K] B[K x N] on packed operands in buffers of L1 or L2 size.
// The micro-kernels serve every op of the CPU backend.
//
// Packed element P    of dtype            accumulator
//   float             float32, float16,   float         (without vdpbf16ps, 16-bit inputs are widened when packed)
//                     bfloat16
//   double            float64             double
//   BFloat16Pair      bfloat16            float         two consecutive k in one 32-bit element (AVX-512 BF16 only)
// PackedOf<T> is the packed element of dtype T. The K index of a packed operand counts elements, k_steps<P>(k): k, or
// ceil(k / 2) for pairs (an odd k is padded with zeros in both operands).
//
// Layouts. The micro-kernel keeps kRows<P> x (kColumnVectors<P> * kLanes) sums in registers; vectors run along N.
//   A consists of row panels of kRows rows. The panel of row r starts at element r * K_steps and is [K_steps][rows].
//     The last panel has only the remaining rows: A has no padding.
//   B consists of column panels of panel_columns<P> columns. The panel of column c starts at element c * K_steps and is
//     [K_steps][width]. The last panel is as wide as the remaining vectors, so only the last vector is padded (with
//     zeros). padded_columns<P>(N) is the total width.
//   C is row-major with a row stride (`row_major`; rows hold padded_columns elements), or in the panels of a B operand
//     with K = M (`panels`), so that the result of one product is the B operand of the next (float, double: as it is;
//     BFloat16Pair: after pack_b_from_panels).
//   pack.h packs operands. A need not be packed: `AOperand::strided` takes any (k, row) strides, for instance a tile in
//     C panels read transposed, so that no tile is transposed in memory.
//
// Modes: kStore C = AB; kAdd C += AB; kScaleAdd C = C * column_scale[n] + AB (the rescaling of the online softmax, at
// no extra cost). Sums run over k in order, in blocks of kBlockSteps: results do not depend on the tiling of M and N.
//
//   tile_gemm<P>(a, b, c, M, N, K_steps, mode, column_scale, meanwhile)
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/common/math.h"
#include "cpu/common/prefetch.h"
#include "cpu/common/simd.h"
#include "cpu/common/work_counter.h"

namespace segattn::cpu {

struct BFloat16Pair {
  std::uint32_t bits;  // element k in the low half, k + 1 in the high half
};

#if defined(__AVX512BF16__)
template <class T>
using PackedOf = std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16Pair, AccumulatorOf<T>>;
#else
template <class T>
using PackedOf = AccumulatorOf<T>;
#endif

template <class P>
inline constexpr bool kIsPair = std::is_same_v<P, BFloat16Pair>;

// Registers: 24 accumulators + 3 (NEON 6) vectors of B + 1 broadcast of 32; 12 + 3 + 1 of 16. Without fused
// multiply-add the product takes one more, hence 8 accumulators.
#if defined(__AVX512F__)
template <class P>
inline constexpr int kRows = 8;
template <class P>
inline constexpr int kColumnVectors = 3;
#elif defined(__aarch64__)
template <class P>
inline constexpr int kRows = 4;
template <class P>
inline constexpr int kColumnVectors = 6;
#elif defined(__AVX2__)
template <class P>
inline constexpr int kRows = 4;
template <class P>
inline constexpr int kColumnVectors = 3;
#else
template <class P>
inline constexpr int kRows = 4;
template <class P>
inline constexpr int kColumnVectors = 2;
#endif

// The block of k for which a B panel (48 columns of float: 24 KB) fits a 32 KB L1.
inline constexpr std::int64_t kBlockSteps = 128;

template <class P>
inline constexpr std::int64_t panel_columns = kColumnVectors<P> * kLanes<AccumulatorOf<P>>;

// Channel attention packs A in blocks of panel_columns rows, which must be whole row panels.
static_assert(panel_columns<float> % kRows<float> == 0 && panel_columns<double> % kRows<double> == 0);

template <class P>
constexpr std::int64_t k_steps(std::int64_t k) {
  return kIsPair<P> ? ceil_div(k, 2) : k;
}

template <class P>
constexpr std::int64_t padded_columns(std::int64_t columns) {
  return round_up(columns, kLanes<AccumulatorOf<P>>);
}

// The width of the column panel that starts at `first_column`.
template <class P>
constexpr std::int64_t panel_width(std::int64_t columns, std::int64_t first_column) {
  return std::min(panel_columns<P>, padded_columns<P>(columns) - first_column);
}

template <class P>
struct AOperand {
  const P* data;
  std::int64_t step_stride;  // elements between consecutive k of a row; 0: packed panels
  std::int64_t row_stride;   // elements between consecutive rows

  static AOperand packed(const P* data) { return {data, 0, 1}; }
  static AOperand strided(const P* data, std::int64_t step_stride, std::int64_t row_stride) {
    return {data, step_stride, row_stride};
  }
};

template <class Accumulator>
struct COperand {
  Accumulator* data;
  std::int64_t row_stride;  // 0: panels

  static COperand panels(Accumulator* data) { return {data, 0}; }
  static COperand row_major(Accumulator* data, std::int64_t row_stride) { return {data, row_stride}; }
};

enum class GemmMode { kStore, kAdd, kScaleAdd };

namespace detail {

template <class P>
struct MicroKernelArguments {
  using Accumulator = AccumulatorOf<P>;
  std::int64_t steps;
  const P* a;
  const P* next_a;         // the next row panel, prefetched into L1
  std::int64_t next_step;  // its elements to advance per step
  std::int64_t a_step, a_row;
  const P* b;  // [steps][vectors]
  Accumulator* c;
  std::int64_t c_row;
  GemmMode mode;
  const Accumulator* column_scale;  // [vectors], for kScaleAdd
};

inline void multiply_add(Vec<float>& sum, float a, Vec<float> b) {
  sum = fma(broadcast<Vec<float>>(a), b, sum);
}
inline void multiply_add(Vec<double>& sum, double a, Vec<double> b) {
  sum = fma(broadcast<Vec<double>>(a), b, sum);
}
#if defined(__AVX512BF16__)
inline void multiply_add(Vec<float>& sum, BFloat16Pair a, Vec<float> b) {
  const __m512i pair = _mm512_set1_epi32(static_cast<int>(a.bits));
  sum = bit_cast_vector<Vec<float>>(
      _mm512_dpbf16_ps(bit_cast_vector<__m512>(sum), bit_cast_vector<__m512bh>(pair), bit_cast_vector<__m512bh>(b)));
}
#endif

template <class P, int rows, int vectors>
void micro_kernel(const MicroKernelArguments<P>& arguments) {
  using Accumulator = AccumulatorOf<P>;
  using V = Vec<Accumulator>;
  constexpr int lanes = kLanes<Accumulator>;
  V sum[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      sum[r][v] = V{};
    }
  }
  const P* a = arguments.a;
  const P* b = arguments.b;
  const std::int64_t a_step = arguments.a_step;
  const P* next_a = arguments.next_a;
  const std::int64_t next_step = arguments.next_step;
  const std::int64_t a_row = arguments.a_row;
  // Prefetches C, which is in L2, into L1. The loop below prefetches the next panel of A: a panel fills a page, and the
  // hardware prefetcher stops at the end of a page.
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      __builtin_prefetch(arguments.c + r * arguments.c_row + v * lanes, 1);
    }
  }
  for (std::int64_t k = arguments.steps; k > 0; --k) {
    V b_vectors[vectors];
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      b_vectors[v] = load<V>(b + v * lanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const P element = a[r * a_row];
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) {
        multiply_add(sum[r][v], element, b_vectors[v]);
      }
    }
    __builtin_prefetch(next_a);
    a += a_step;
    next_a += next_step;
    b += vectors * lanes;
  }
#pragma GCC unroll 16
  for (int v = 0; v < vectors; ++v) {
    const V scale = arguments.mode == GemmMode::kScaleAdd ? load<V>(arguments.column_scale + v * lanes)
                                                          : broadcast<V>(Accumulator(1));
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      Accumulator* target = arguments.c + r * arguments.c_row + v * lanes;
      store(target, arguments.mode == GemmMode::kStore ? sum[r][v] : fma(load<V>(target), scale, sum[r][v]));
    }
  }
}

template <class P>
using MicroKernel = void (*)(const MicroKernelArguments<P>&);

template <class P, int... index>
constexpr auto make_micro_kernels(std::integer_sequence<int, index...>) {
  return std::array<MicroKernel<P>, sizeof...(index)>{
      micro_kernel<P, index / kColumnVectors<P> + 1, index % kColumnVectors<P> + 1>...};
}

// [rows - 1][vectors - 1]
template <class P>
inline constexpr auto kMicroKernels =
    make_micro_kernels<P>(std::make_integer_sequence<int, kRows<P> * kColumnVectors<P>>{});

}  // namespace detail

// a: M x K, packed or strided; b: K x N in column panels; c: M x N; column_scale: [padded_columns(N)] for kScaleAdd.
// meanwhile(parts) is called before each of the `parts` micro-kernels, to prefetch what is needed next.
template <class P, class Meanwhile = DoNothing>
void tile_gemm(
    AOperand<P> a, const P* b, COperand<AccumulatorOf<P>> c, std::int64_t m, std::int64_t n, std::int64_t steps,
    GemmMode mode, const AccumulatorOf<P>* column_scale = nullptr, Meanwhile&& meanwhile = {}) {
  using Accumulator = AccumulatorOf<P>;
  constexpr std::int64_t lanes = kLanes<Accumulator>;
  count_multiply_adds(m * padded_columns<P>(n) * steps * (kIsPair<P> ? 2 : 1));
  const std::int64_t parts =
      std::max<std::int64_t>(1, ceil_div(steps, kBlockSteps)) * ceil_div(n, panel_columns<P>) * ceil_div(m, kRows<P>);
  detail::MicroKernelArguments<P> arguments{};
  for (std::int64_t first_step = 0; first_step == 0 || first_step < steps; first_step += kBlockSteps) {
    arguments.steps = std::min(kBlockSteps, steps - first_step);
    arguments.mode = first_step == 0 ? mode : GemmMode::kAdd;
    for (std::int64_t column = 0; column < n; column += panel_columns<P>) {
      const std::int64_t width = panel_width<P>(n, column);
      arguments.b = b + column * steps + first_step * width;
      arguments.c_row = c.row_stride == 0 ? width : c.row_stride;
      arguments.column_scale = column_scale == nullptr ? nullptr : column_scale + column;
      Accumulator* const c_panel = c.data + column * (c.row_stride == 0 ? m : 1);
      for (std::int64_t row = 0; row < m; row += kRows<P>) {
        const std::int64_t rows = std::min<std::int64_t>(kRows<P>, m - row);
        if (a.step_stride == 0) {
          arguments.a = a.data + row * steps + first_step * rows;
          arguments.a_step = rows;
          arguments.a_row = 1;
          arguments.next_a = arguments.a + rows * steps;
          arguments.next_step = rows;
        } else {
          arguments.a = a.data + row * a.row_stride + first_step * a.step_stride;
          arguments.a_step = a.step_stride;
          arguments.a_row = a.row_stride;
          arguments.next_a = arguments.a + rows * a.row_stride;
          arguments.next_step = a.step_stride == 1 ? 0 : rows;  // row-major: only the first cache line of the next rows
        }
        arguments.c = c_panel + row * arguments.c_row;
        meanwhile(parts);
        detail::kMicroKernels<P>[(rows - 1) * kColumnVectors<P> + width / lanes - 1](arguments);
      }
    }
  }
}

}  // namespace segattn::cpu
