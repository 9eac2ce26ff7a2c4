// Packing for tile_gemm.h: tensors in memory (any dtype) <-> packed A and B operands and C panels.
//
// Operand element (row, k) of A, (k, column) of B. The name says which index is contiguous in memory; `ld` is the
// distance, in elements, between consecutive values of the other:
//   pack_a_from_rows    (dst, src, ld, m, k)   A(row, k)    = src[row * ld + k]      transposes
//   pack_a_from_steps   (dst, src, ld, m, k)   A(row, k)    = src[k * ld + row]      copies
//   pack_b_from_steps   (dst, src, ld, n, k)   B(k, column) = src[k * ld + column]   copies
//   pack_b_from_columns (dst, src, ld, n, k)   B(k, column) = src[column * ld + k]   transposes
// k is the extent without padding. dst has packed_a_size<P>(m, k) or packed_b_size<P>(n, k) elements. B's padding
// columns and the second half of an odd last BFloat16Pair become zeros.
//
// C panels (accumulator type, as tile_gemm writes them):
//   pack_b_from_panels<P>(dst, panels, m, n)        BFloat16Pair: C as the B operand of a product over its m rows
//   b_operand_of_panels<P>(dst, panels, m, n)       that operand: dst, packed; float, double: the panels themselves
//   store_panels(dst, ld, panels, m, n, residual)   dst[row * ld + column] = C(row, column), + residual, like dst
//   store_panels_transposed(dst, ld, panels, m, n)  dst[column * ld + row] = C(row, column)
//   for_each_panel_vector(panels, m, n, use)        use(row, column, vector, count) for every vector of C
//   transpose_2d(dst, dst_ld, src, src_ld, rows, columns)   dst[column * dst_ld + row] = src[row * src_ld + column]
#pragma once

#include "cpu/common/tile_gemm.h"

namespace segattn::cpu {

template <class P>
constexpr std::int64_t packed_a_size(std::int64_t m, std::int64_t k) {
  return m * k_steps<P>(k);
}

template <class P>
constexpr std::int64_t packed_b_size(std::int64_t n, std::int64_t k) {
  return padded_columns<P>(n) * k_steps<P>(k);
}

// Elements of an m x n C operand in panels.
template <class P>
constexpr std::int64_t panels_size(std::int64_t m, std::int64_t n) {
  return padded_columns<P>(n) * m;
}

namespace detail {

// The operand that is packed: they differ in the extent and the padding of their panels.
enum class Operand { kA, kB };

template <class P>
using LaneOf = std::conditional_t<kIsPair<P>, std::uint32_t, P>;

// `count` (<= n) rows or columns of one k step, contiguous in memory. `next`: the same of the following k (pairs only),
// null at an odd end.
template <class P, int n, class T>
inline VecN<LaneOf<P>, n> load_across(const T* source, const T* next, std::int64_t count) {
  if constexpr (kIsPair<P>) {
    using U16 = VecN<std::uint16_t, n>;
    using U32 = VecN<std::uint32_t, n>;
    const auto bits = [count](const T* elements) {
      const auto* raw = reinterpret_cast<const std::uint16_t*>(elements);
      return __builtin_convertvector(count == n ? load<U16>(raw) : load_partial<U16>(raw, count), U32);
    };
    const U32 low = bits(source);
    return next == nullptr ? low : low | (bits(next) << 16);
  } else {
    return count == n ? widen<n>(source) : widen_partial<n>(source, count);
  }
}

// n consecutive k steps of one row or column, contiguous in memory; `count` elements exist.
template <class P, int n, class T>
inline VecN<LaneOf<P>, n> load_along(const T* source, std::int64_t count) {
  if constexpr (kIsPair<P>) {
    using U32 = VecN<std::uint32_t, n>;
    if (count >= 2 * n) {
      return load<U32>(source);
    }
    U32 result{};
    std::memcpy(&result, source, static_cast<std::size_t>(count) * sizeof(T));
    return result;
  } else {
    return count >= n ? widen<n>(source) : widen_partial<n>(source, count);
  }
}

// Rows or columns of the panel that starts at `first`: A does not pad, B pads to whole vectors.
template <class P, Operand operand>
constexpr std::int64_t width_of_panel(std::int64_t extent, std::int64_t first) {
  if constexpr (operand == Operand::kB) {
    return panel_width<P>(extent, first);
  } else {
    return std::min<std::int64_t>(kRows<P>, extent - first);
  }
}

template <class P, Operand operand>
inline constexpr std::int64_t panel_extent = operand == Operand::kB ? panel_columns<P> : kRows<P>;

template <class P, Operand operand>
inline constexpr int pack_lanes = operand == Operand::kB ? kLanes<AccumulatorOf<P>> : kRows<P>;

// Memory contiguous across the panel. Steps are processed in blocks, so that the cache lines of source and panel are
// used completely while they are in L1.
template <class P, Operand operand, class T>
void pack_across(P* target, const T* source, std::int64_t ld, std::int64_t extent, std::int64_t k) {
  constexpr int n = pack_lanes<P, operand>;
  constexpr std::int64_t per_step = kIsPair<P> ? 2 : 1;
  constexpr std::int64_t block = 16;
  count_packed(extent * k);
  const std::int64_t steps = k_steps<P>(k);
  for (std::int64_t first_step = 0; first_step < steps; first_step += block) {
    const std::int64_t last_step = std::min(steps, first_step + block);
    for (std::int64_t first = 0; first < extent; first += panel_extent<P, operand>) {
      const std::int64_t width = width_of_panel<P, operand>(extent, first);
      for (std::int64_t step = first_step; step < last_step; ++step) {
        const T* row = source + step * per_step * ld + first;
        const T* next = kIsPair<P> && step * 2 + 1 < k ? row + ld : nullptr;
        P* panel = target + first * steps + step * width;
        for (std::int64_t i = 0; i < width; i += n) {
          const std::int64_t count = std::min<std::int64_t>(n, extent - first - i);
          const auto lanes = load_across<P, n>(row + i, next == nullptr ? nullptr : next + i, count);
          if (width - i >= n) {
            store(panel + i, lanes);
          } else {
            std::memcpy(static_cast<void*>(panel + i), &lanes, static_cast<std::size_t>(width - i) * sizeof(P));
          }
        }
      }
    }
  }
}

// Memory contiguous along k: n x n blocks are transposed in registers.
template <class P, Operand operand, class T>
void pack_along(P* target, const T* source, std::int64_t ld, std::int64_t extent, std::int64_t k) {
  constexpr int n = pack_lanes<P, operand>;
  constexpr std::int64_t per_step = kIsPair<P> ? 2 : 1;
  using V = VecN<LaneOf<P>, n>;
  count_packed(extent * k);
  const std::int64_t steps = k_steps<P>(k);
  for (std::int64_t first = 0; first < extent; first += panel_extent<P, operand>) {
    const std::int64_t width = width_of_panel<P, operand>(extent, first);
    for (std::int64_t i = 0; i < width; i += n) {
      const std::int64_t rows = std::min<std::int64_t>(n, extent - first - i);
      const std::int64_t stored = std::min<std::int64_t>(n, width - i);
      const T* block = source + (first + i) * ld;
      for (std::int64_t step = 0; step < steps; step += n) {
        V lanes[n];
        if (rows == n) {
#pragma GCC unroll 16
          for (int r = 0; r < n; ++r) {
            lanes[r] = load_along<P, n>(block + r * ld + step * per_step, k - step * per_step);
          }
        } else {
#pragma GCC unroll 16
          for (int r = 0; r < n; ++r) {
            lanes[r] = r < rows ? load_along<P, n>(block + r * ld + step * per_step, k - step * per_step) : V{};
          }
        }
        transpose(lanes);
        P* panel = target + first * steps + step * width + i;
        const std::int64_t count = std::min<std::int64_t>(n, steps - step);
        if (count == n && stored == n) {
#pragma GCC unroll 16
          for (int s = 0; s < n; ++s) {
            store(panel + s * width, lanes[s]);
          }
        } else {
          P buffer[n][n];
#pragma GCC unroll 16
          for (int s = 0; s < n; ++s) {
            store(buffer[s], lanes[s]);
          }
          for (std::int64_t s = 0; s < count; ++s) {
            std::memcpy(panel + s * width, buffer[s], static_cast<std::size_t>(stored) * sizeof(P));
          }
        }
      }
    }
  }
}

}  // namespace detail

// Calls use(row, column, vector, count) for every vector of C panels (m x n): C(row, column ...), `count` columns
// without padding.
template <class Accumulator, class Use>
void for_each_panel_vector(const Accumulator* panels, std::int64_t m, std::int64_t n, const Use& use) {
  using V = Vec<Accumulator>;
  constexpr std::int64_t lanes = kLanes<Accumulator>;
  for (std::int64_t first = 0; first < n; first += panel_columns<Accumulator>) {
    const std::int64_t width = panel_width<Accumulator>(n, first);
    const Accumulator* panel = panels + first * m;
    for (std::int64_t row = 0; row < m; ++row) {
      for (std::int64_t i = 0; i < width; i += lanes) {
        use(row, first + i, load<V>(panel + row * width + i), std::min(lanes, n - first - i));
      }
    }
  }
}

template <class P, class T>
void pack_a_from_rows(P* target, const T* source, std::int64_t ld, std::int64_t m, std::int64_t k) {
  detail::pack_along<P, detail::Operand::kA>(target, source, ld, m, k);
}

template <class P, class T>
void pack_a_from_steps(P* target, const T* source, std::int64_t ld, std::int64_t m, std::int64_t k) {
  detail::pack_across<P, detail::Operand::kA>(target, source, ld, m, k);
}

template <class P, class T>
void pack_b_from_steps(P* target, const T* source, std::int64_t ld, std::int64_t n, std::int64_t k) {
  detail::pack_across<P, detail::Operand::kB>(target, source, ld, n, k);
}

template <class P, class T>
void pack_b_from_columns(P* target, const T* source, std::int64_t ld, std::int64_t n, std::int64_t k) {
  detail::pack_along<P, detail::Operand::kB>(target, source, ld, n, k);
}

// Rounds rows 2s and 2s + 1 of C panels to the pairs of step s; lanes do not move.
template <class P>
void pack_b_from_panels(P* target, const float* panels, std::int64_t m, std::int64_t n) {
  static_assert(kIsPair<P>, "C panels of float and double are B operands already");
  constexpr int lanes = kLanes<float>;
  const std::int64_t steps = k_steps<P>(m);
  for (std::int64_t first = 0; first < n; first += panel_columns<P>) {
    const std::int64_t width = panel_width<P>(n, first);
    for (std::int64_t step = 0; step < steps; ++step) {
      const float* row = panels + first * m + 2 * step * width;
      P* out = target + first * steps + step * width;
      for (std::int64_t i = 0; i < width; i += lanes) {
        auto bits = bfloat16_bits<lanes>(load<Vec<float>>(row + i));
        if (2 * step + 1 < m) {
          bits |= bfloat16_bits<lanes>(load<Vec<float>>(row + width + i)) << 16;
        }
        store(out + i, bits);
      }
    }
  }
}

template <class P>
const P* b_operand_of_panels(P* target, const AccumulatorOf<P>* panels, std::int64_t m, std::int64_t n) {
  if constexpr (kIsPair<P>) {
    pack_b_from_panels<P>(target, panels, m, n);
    return target;
  } else {
    return panels;
  }
}

template <class T>
void store_panels(
    T* target, std::int64_t ld, const AccumulatorOf<T>* panels, std::int64_t m, std::int64_t n,
    const T* residual = nullptr) {
  for_each_panel_vector(panels, m, n, [&](std::int64_t row, std::int64_t column, auto vector, std::int64_t count) {
    if (residual != nullptr) {
      vector += read_vector(residual + row * ld + column, count);
    }
    write_vector(target + row * ld + column, vector, count);
  });
}

template <class T>
void store_panels_transposed(
    T* target, std::int64_t ld, const AccumulatorOf<T>* panels, std::int64_t m, std::int64_t n) {
  using A = AccumulatorOf<T>;
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>;
  for (std::int64_t first = 0; first < n; first += panel_columns<A>) {
    const std::int64_t width = panel_width<A>(n, first);
    for (std::int64_t i = 0; i < width; i += lanes) {
      const std::int64_t columns = std::min<std::int64_t>(lanes, n - first - i);
      for (std::int64_t row = 0; row < m; row += lanes) {
        const std::int64_t rows = std::min<std::int64_t>(lanes, m - row);
        const A* const block = panels + first * m + row * width + i;
        V vectors[lanes];
#pragma GCC unroll 16
        for (int r = 0; r < lanes; ++r) {
          vectors[r] = r < rows ? load<V>(block + r * width) : V{};
        }
        transpose(vectors);
        A buffer[lanes][lanes];
#pragma GCC unroll 16
        for (int c = 0; c < lanes; ++c) {
          store(buffer[c], vectors[c]);
        }
        for (std::int64_t c = 0; c < columns; ++c) {
          write_vector(target + (first + i + c) * ld + row, load<V>(buffer[c]), rows);
        }
      }
    }
  }
}

template <class T>
void transpose_2d(
    T* target, std::int64_t target_ld, const T* source, std::int64_t source_ld, std::int64_t rows,
    std::int64_t columns) {
  using Lane = std::conditional_t<sizeof(T) == 2, std::uint16_t, std::conditional_t<sizeof(T) == 4, float, double>>;
  constexpr int n = kVectorBytes / 8 < 8 ? 4 : 8;
  using V = VecN<Lane, n>;
  for (std::int64_t row = 0; row < rows; row += n) {
    for (std::int64_t column = 0; column < columns; column += n) {
      const T* from = source + row * source_ld + column;
      T* to = target + column * target_ld + row;
      if (row + n <= rows && column + n <= columns) {
        V lanes[n];
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) {
          lanes[i] = load<V>(from + i * source_ld);
        }
        transpose(lanes);
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) {
          store(to + i * target_ld, lanes[i]);
        }
      } else {
        for (std::int64_t i = 0; i < std::min<std::int64_t>(n, rows - row); ++i) {
          for (std::int64_t j = 0; j < std::min<std::int64_t>(n, columns - column); ++j) {
            to[j * target_ld + i] = from[i * source_ld + j];
          }
        }
      }
    }
  }
}

}  // namespace segattn::cpu
