// The lines of a feature map (channels, H, W) that criss-cross attention works along: a row, or a tile of adjacent
// columns. Both offer the same operations, so that every kernel is written once, but for the fused forward, whose columns
// need no transposing (criss_cross_columns.h):
//
//   pack_positions_a(target, stride, map, first, count, channels)   A(row = position, k = channel)
//   pack_positions_b(...)                                           B(k = channel, column = position)
//   pack_channels_a(...)                                            A(row = channel, k = position)
//       operands for positions [first, first + count) of every line, from channels [0, channels) of `map`; the lines'
//       operands are `stride` elements apart. pack.h has the layouts.
//   for_each_vector(panels, stride, channels, first, count, use)
//       use(channel, position, vector, n) for the C panels (channels x positions) of every line: `vector` holds n
//       elements of a channel from `position` of the map on
//   pack_weights, pack_weights_transposed, store_weights
//       the same for weights in CCNet's layout (H + W - 1, H, W): channels [0, W) the row, then the column without
//       the query itself.
//
// Columns: positions of a line are W elements apart, and a column alone would use one element of every cache line it
// touches. A tile of up to 16 adjacent columns reads whole lines, transposes square blocks in registers and gives
// every column an operand of its own.
#pragma once

#include "pack.h"

namespace segattn::cpu {

struct MapSizes {
  std::int64_t height, width;
  std::int64_t positions() const { return height * width; }
};

// Distance between the operands of neighbouring lines: an odd number of cache lines, so that the same place in all of
// them does not fall into one set of the cache.
template <class P>
constexpr std::int64_t line_stride(std::int64_t elements) {
  constexpr std::int64_t cache_line = 64 / static_cast<std::int64_t>(sizeof(P));
  return ((elements + cache_line - 1) / cache_line | 1) * cache_line;
}

template <class T>
class RowLine {
  using A = AccumulatorOf<T>;
  using P = PackedOf<T>;

 public:
  static constexpr std::int64_t kMostLines = 1;
  static constexpr bool kExcludesSelf = false;
  // A block of tile_gemm's k: the energy's sums stay in registers for as long.
  static constexpr std::int64_t kScoreChannels = kBlockSteps;
  // 64 channels of values (25 KB at 97) and of results (29 KB) go through the first-level cache.
  static constexpr std::int64_t kApplyChannels = 64;

  static std::int64_t length_of(MapSizes sizes) { return sizes.width; }
  static std::int64_t groups(MapSizes sizes, std::int64_t) { return sizes.height; }

  RowLine(MapSizes sizes, std::int64_t row, std::int64_t) : sizes_(sizes), row_(row) {}

  std::int64_t lines() const { return 1; }
  std::int64_t positions() const { return sizes_.positions(); }
  std::int64_t length() const { return sizes_.width; }
  std::int64_t offset(std::int64_t, std::int64_t position) const { return row_ * sizes_.width + position; }

  void pack_positions_a(P* target, std::int64_t, const T* map, std::int64_t first, std::int64_t count,
                        std::int64_t channels) const {
    pack_a_from_steps<P>(target, map + offset(0, first), sizes_.positions(), count, channels);
  }
  void pack_positions_b(P* target, std::int64_t, const T* map, std::int64_t first, std::int64_t count,
                        std::int64_t channels) const {
    pack_b_from_steps<P>(target, map + offset(0, first), sizes_.positions(), count, channels);
  }
  void pack_channels_a(P* target, std::int64_t, const T* map, std::int64_t first, std::int64_t count,
                       std::int64_t channels) const {
    pack_a_from_rows<P>(target, map + offset(0, first), sizes_.positions(), channels, count);
  }

  template <class Use>
  void for_each_vector(const A* panels, std::int64_t, std::int64_t channels, std::int64_t first, std::int64_t count,
                       const Use& use) const {
    const std::int64_t begin = offset(0, first);
    detail::for_each_panel_vector(panels, channels, count,
                                  [&](std::int64_t channel, std::int64_t column, Vec<A> vector, std::int64_t n) {
                                    use(channel, begin + column, vector, n);
                                  });
  }

  // weights: (H + W - 1, H, W) -> B(k = key, column = query) for all keys and queries [first, first + count)
  void pack_weights(P* target, std::int64_t, const T* weights, std::int64_t first, std::int64_t count) const {
    pack_b_from_steps<P>(target, weights + offset(0, first), sizes_.positions(), count, length());
  }
  // B(k = query, column = key)
  void pack_weights_transposed(P* target, std::int64_t, const T* weights, std::int64_t first, std::int64_t count) const {
    pack_b_from_columns<P>(target, weights + offset(0, first), sizes_.positions(), length(), count);
  }
  // panels: (keys x queries)
  void store_weights(T* weights, const A* panels, std::int64_t, std::int64_t first, std::int64_t count) const {
    store_panels(weights + offset(0, first), sizes_.positions(), panels, length(), count);
  }

 private:
  MapSizes sizes_;
  std::int64_t row_;
};

namespace detail {

// Operand element (r, k) of every line l is address(r, k)[l]; a null address is zero.
template <class P, bool is_b, class Address>
void gather_lines(P* target, std::int64_t stride, std::int64_t lines, std::int64_t extent, std::int64_t k,
                  const Address& address) {
  constexpr int n = pack_lanes<P, is_b>;
  constexpr std::int64_t per_step = kIsPair<P> ? 2 : 1;
  using V = VecN<LaneOf<P>, n>;
  const auto load_lines = [&](std::int64_t r, std::int64_t step, std::int64_t line, std::int64_t count) {
    const auto* source = address(r, step * per_step);
    if constexpr (kIsPair<P>) {
      const auto* next = step * 2 + 1 < k ? address(r, step * 2 + 1) : nullptr;
      if (source == nullptr) {
        return next == nullptr ? V{} : load_across<P, n>(next + line, decltype(next){}, count) << 16;
      }
      return load_across<P, n>(source + line, next == nullptr ? nullptr : next + line, count);
    } else {
      return source == nullptr ? V{} : load_across<P, n>(source + line, source, count);
    }
  };
  const std::int64_t steps = k_steps<P>(k);
  for (std::int64_t first = 0; first < extent; first += panel_extent<P, is_b>) {
    const std::int64_t width = width_of_panel<P, is_b>(extent, first);
    for (std::int64_t step = 0; step < steps; ++step) {
      for (std::int64_t i = 0; i < width; i += n) {
        const std::int64_t rows = std::min<std::int64_t>(n, extent - first - i);
        P* const panel = target + first * steps + step * width + i;
        for (std::int64_t line = 0; line < lines; line += n) {
          const std::int64_t count = std::min<std::int64_t>(n, lines - line);
          V lanes[n];
#pragma GCC unroll 16
          for (int r = 0; r < n; ++r) {
            lanes[r] = r < rows ? load_lines(first + i + r, step, line, count) : V{};
          }
          transpose(lanes);
          if (count == n && width - i >= n) {
#pragma GCC unroll 16
            for (int l = 0; l < n; ++l) {
              store(panel + (line + l) * stride, lanes[l]);
            }
          } else {
            P buffer[n][n];
#pragma GCC unroll 16
            for (int l = 0; l < n; ++l) {
              store(buffer[l], lanes[l]);
            }
            const auto bytes = static_cast<std::size_t>(std::min<std::int64_t>(n, width - i)) * sizeof(P);
            for (std::int64_t l = 0; l < count; ++l) {
              std::memcpy(static_cast<void*>(panel + (line + l) * stride), buffer[l], bytes);
            }
          }
        }
      }
    }
  }
}

// use(row, column, line, vector, n): `vector` holds C(row, column) of lines [line, line + n).
template <class A, class Use>
void scatter_lines(const A* panels, std::int64_t stride, std::int64_t lines, std::int64_t m, std::int64_t n_columns,
                   const Use& use) {
  constexpr int n = kLanes<A>;
  using V = Vec<A>;
  for (std::int64_t first = 0; first < n_columns; first += panel_columns<A>) {
    const std::int64_t width = panel_width<A>(n_columns, first);
    for (std::int64_t row = 0; row < m; ++row) {
      for (std::int64_t i = 0; i < width; i += n) {
        const std::int64_t columns = std::min<std::int64_t>(n, n_columns - first - i);
        for (std::int64_t line = 0; line < lines; line += n) {
          const std::int64_t count = std::min<std::int64_t>(n, lines - line);
          const A* const panel = panels + line * stride + first * m + row * width + i;
          V lanes[n];
#pragma GCC unroll 16
          for (int l = 0; l < n; ++l) {
            lanes[l] = l < count ? load<V>(panel + l * stride) : V{};
          }
          transpose(lanes);
#pragma GCC unroll 16
          for (int c = 0; c < n; ++c) {
            if (c < columns) {
              use(row, first + i + c, line, lanes[c], count);
            }
          }
        }
      }
    }
  }
}

}  // namespace detail

template <class T>
class ColumnLines {
  using A = AccumulatorOf<T>;
  using P = PackedOf<T>;

 public:
  static constexpr std::int64_t kMostLines = 16;
  static constexpr bool kExcludesSelf = true;
  // 16 lines of 97 positions: 198 KB packed for 32 channels, beside weights of 695 KB, in the second-level cache.
  static constexpr std::int64_t kScoreChannels = 32;
  static constexpr std::int64_t kApplyChannels = 16;

  static std::int64_t length_of(MapSizes sizes) { return sizes.height; }
  static std::int64_t groups(MapSizes sizes, std::int64_t lines) { return (sizes.width + lines - 1) / lines; }

  // Columns [group * lines, (group + 1) * lines), as far as there are any.
  ColumnLines(MapSizes sizes, std::int64_t group, std::int64_t lines)
      : sizes_(sizes), first_(group * lines), lines_(std::min(lines, sizes.width - first_)) {}

  std::int64_t lines() const { return lines_; }
  std::int64_t positions() const { return sizes_.positions(); }
  std::int64_t length() const { return sizes_.height; }
  std::int64_t offset(std::int64_t line, std::int64_t position) const {
    return position * sizes_.width + first_ + line;
  }

  void pack_positions_a(P* target, std::int64_t stride, const T* map, std::int64_t first, std::int64_t count,
                        std::int64_t channels) const {
    detail::gather_lines<P, false>(target, stride, lines_, count, channels, position_by_channel(map, first));
  }
  void pack_positions_b(P* target, std::int64_t stride, const T* map, std::int64_t first, std::int64_t count,
                        std::int64_t channels) const {
    detail::gather_lines<P, true>(target, stride, lines_, count, channels, position_by_channel(map, first));
  }
  void pack_channels_a(P* target, std::int64_t stride, const T* map, std::int64_t first, std::int64_t count,
                       std::int64_t channels) const {
    const auto address = position_by_channel(map, first);
    detail::gather_lines<P, false>(target, stride, lines_, channels, count,
                                   [&](std::int64_t channel, std::int64_t k) { return address(k, channel); });
  }

  template <class Use>
  void for_each_vector(const A* panels, std::int64_t stride, std::int64_t channels, std::int64_t first,
                       std::int64_t count, const Use& use) const {
    detail::scatter_lines(panels, stride, lines_, channels, count,
                          [&](std::int64_t channel, std::int64_t column, std::int64_t line, Vec<A> vector,
                              std::int64_t n) {
                            use(channel, offset(line, first + column), vector, n);
                          });
  }

  void pack_weights(P* target, std::int64_t stride, const T* weights, std::int64_t first, std::int64_t count) const {
    detail::gather_lines<P, true>(target, stride, lines_, count, length(), [&](std::int64_t query, std::int64_t key) {
      return weight(weights, key, first + query);
    });
  }
  void pack_weights_transposed(P* target, std::int64_t stride, const T* weights, std::int64_t first,
                               std::int64_t count) const {
    detail::gather_lines<P, true>(target, stride, lines_, length(), count, [&](std::int64_t key, std::int64_t query) {
      return weight(weights, key, first + query);
    });
  }
  void store_weights(T* weights, const A* panels, std::int64_t stride, std::int64_t first, std::int64_t count) const {
    constexpr int lanes = kLanes<A>;
    detail::scatter_lines(panels, stride, lines_, length(), count,
                          [&](std::int64_t key, std::int64_t column, std::int64_t line, Vec<A> vector, std::int64_t n) {
                            if (T* const target = weight(weights, key, first + column)) {
                              if (n == lanes) {
                                narrow<lanes>(target + line, vector);
                              } else {
                                narrow_partial<lanes>(target + line, vector, n);
                              }
                            }
                          });
  }

 private:
  auto position_by_channel(const T* map, std::int64_t first) const {
    return [begin = map + offset(0, first), positions = sizes_.positions(),
            width = sizes_.width](std::int64_t position, std::int64_t channel) {
      return begin + channel * positions + position * width;
    };
  }

  // The first line's weight of a key for a query, null for the query itself, which the row has.
  template <class Element>
  Element* weight(Element* weights, std::int64_t key, std::int64_t query) const {
    if (key == query) {
      return nullptr;
    }
    const std::int64_t channel = sizes_.width + key - (key > query ? 1 : 0);
    return weights + channel * sizes_.positions() + offset(0, query);
  }

  MapSizes sizes_;
  std::int64_t first_, lines_;
};

}  // namespace segattn::cpu
