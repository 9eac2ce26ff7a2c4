// A strip of adjacent columns of a feature map (channels, H, W), one column in each lane, and the products of criss-cross
// attention along them. Whatever is read of a map is copied as vectors, (channel, position), and multiplied by
// lane_product; nothing is transposed.
//
// A strip's weights are vectors too, [queries][keys], `stride(keys)` elements from query to query, for a block of queries.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/common/lane_gemm.h"
#include "cpu/common/map_sizes.h"
#include "cpu/common/parallel.h"

namespace segattn::cpu {

// Positions [first, first + count) of a column.
struct Stretch {
  std::int64_t first, count;
};

// Elements between the rows of a matrix of vectors: as an even number of cache lines they would fall into few sets.
constexpr std::int64_t lane_stride(std::int64_t length, int lanes) {
  return (length | 1) * lanes;
}

// A column's positions in blocks of about equal size: queries whose weights are made at once, at most 700 KB of them, all
// queries up to 105 rows of float. Each block reads the maps again; weights that do not fit the second-level cache beside
// what is staged are read as one stream from the third. Gradients are summed over blocks, so that the cut into the fewest
// depends on nothing but the height.
template <class A>
class QueryBlocks {
 public:
  explicit QueryBlocks(std::int64_t height, std::int64_t least_blocks = 1) : height_(height) {
    const auto query_bytes = lane_stride(height, kLanes<A>) * static_cast<std::int64_t>(sizeof(A));
    const std::int64_t most = std::max<std::int64_t>((700 << 10) / query_bytes, kLaneColumns);
    count_ = std::min(std::max((height + most - 1) / most, least_blocks), height);
  }

  std::int64_t count() const { return count_; }
  std::int64_t most_queries() const { return (height_ + count_ - 1) / count_; }
  Stretch operator[](std::int64_t block) const {
    const std::int64_t first = height_ * block / count_;
    return {first, height_ * (block + 1) / count_ - first};
  }

 private:
  std::int64_t height_, count_;
};

template <class A>
inline constexpr int kFewestLanes = std::min(kLanes<A>, 4);

// Calls work<lanes>() with the fewest lanes that hold so many columns: the last strip of 97 columns has one of them, and
// 4 lanes cost half of 16 on a Zen 4.
template <class A, int lanes = kFewestLanes<A>, class Work>
void with_lanes(std::int64_t columns, const Work& work) {
  if constexpr (lanes < kLanes<A>) {
    if (columns > lanes) {
      with_lanes<A, 2 * lanes>(columns, work);
      return;
    }
  }
  work.template operator()<lanes>();
}

// pass.work<lanes>(sample, column, scratch) for every strip of every sample, with pass.scratch<lanes>() bytes. Strips are
// narrower than they could be where threads would be idle; no result depends on it, lanes do not meet.
template <class A, class Pass>
void for_each_strip(MapSizes map, std::int64_t batch, const Pass& pass) {
  const auto threads = static_cast<std::int64_t>(torch::stable::get_num_threads());
  std::int64_t width = kLanes<A>;
  const auto strips = [&] { return (map.width + width - 1) / width; };
  while (width > kFewestLanes<A> && strips() * batch < threads) {
    width /= 2;
  }
  std::size_t scratch_size = 0;
  with_lanes<A>(width, [&]<int lanes>() { scratch_size = pass.template scratch<lanes>(); });
  parallel_units(batch * strips(), scratch_size, [&](std::int64_t unit, Scratch& scratch) {
    const std::int64_t column = unit % strips() * width;
    with_lanes<A>(std::min(width, map.width - column), [&]<int lanes>() {
      pass.template work<lanes>(unit / strips(), column, scratch);
    });
  });
}

template <class T, int lanes>
class ColumnStrip {
 public:
  using A = AccumulatorOf<T>;
  using V = VecN<A, lanes>;
  // Products over channels go through the cache in pieces of kScoreChannels, those with weights of kApplyChannels.
  static constexpr std::int64_t kScoreChannels = 32;
  static constexpr std::int64_t kApplyChannels = 2 * kLaneRows;

  static constexpr std::int64_t stride(std::int64_t length) { return lane_stride(length, lanes); }

  // Elements of scratch memory for the products below, with at most so many queries.
  static std::int64_t memory_size(std::int64_t height, std::int64_t queries) {
    return std::max(kScoreChannels, kApplyChannels) * (stride(height) + stride(queries));
  }

  // Columns [column, column + lanes), as far as there are any.
  ColumnStrip(MapSizes map, std::int64_t column, A* memory)
      : map_(map), column_(column), present_(std::min<std::int64_t>(lanes, map.width - column)), memory_(memory) {}

  std::int64_t height() const { return map_.height; }
  // Where a position of the strip begins in a map's channel.
  std::int64_t offset(std::int64_t position) const { return position * map_.width + column_; }

  template <class U>
  V read(const U* source) const {
    return present_ == lanes ? widen<lanes>(source) : widen_partial<lanes>(source, present_);
  }
  template <class U>
  void write(U* target, V vector) const {
    if (present_ == lanes) {
      narrow<lanes>(target, vector);
    } else {
      narrow_partial<lanes>(target, vector, present_);
    }
  }
  // A weight of a block of queries.
  A* element(A* weights, std::int64_t query, std::int64_t key) const {
    return weights + query * stride(height()) + key * lanes;
  }
  // Adds a sum of the products below to what is there.
  auto adder() const {
    return [this](T* target, std::int64_t, V sum) { write(target, read(target) + sum); };
  }
  // Calls use(lane) for the columns there are.
  template <class Use>
  void for_each_lane(const Use& use) const {
    for (std::int64_t lane = 0; lane < present_; ++lane) {
      use(lane);
    }
  }

  // weights [queries][keys] = dot products of the maps' channels. keys, queries: (channels, H, W).
  void score(const T* keys, const T* queries, std::int64_t channels, Stretch block, A* weights) const {
    const std::int64_t key_stride = stride(height());
    const std::int64_t query_stride = stride(block.count);
    const Stretch column{0, height()};
    for (std::int64_t channel = 0; channel < channels; channel += kScoreChannels) {
      const std::int64_t depth = std::min(kScoreChannels, channels - channel);
      const std::int64_t next = channel + depth;
      const std::int64_t next_depth = std::min(kScoreChannels, channels - next);
      Prefetch next_keys = prefetch(keys + next * map_.positions(), next_depth, column);
      Prefetch next_queries = prefetch(queries + next * map_.positions(), next_depth, block);
      A* const staged_keys = memory_;
      A* const staged_queries = memory_ + depth * key_stride;
      stage(staged_keys, key_stride, keys + channel * map_.positions(), depth, column);
      stage(staged_queries, query_stride, queries + channel * map_.positions(), depth, block);
      lane_product<V>(
          {staged_keys, lanes, key_stride}, height(), {staged_queries, lanes, query_stride}, block.count, depth,
          {weights, lanes, key_stride}, channel > 0, [&](std::int64_t parts) {
            next_keys(parts);
            next_queries(parts);
          });
    }
  }

  // store(target, query, sum) for every channel and query of the block, with sum = sum over keys of weights * map, and
  // `target` the address of the query in the map that is written. map, target: (channels, H, W).
  template <class Store>
  void sum_over_keys(
      const T* map, std::int64_t channels, const A* weights, Stretch block, T* target, const Store& store_sum) const {
    multiply(
        map, channels, {0, height()}, {weights, stride(height()), lanes}, target, block, nullptr, false, true,
        store_sum);
  }

  // The same for every channel and key: sums over the block's queries, added up over blocks, which must follow each
  // other. `target` gets a sum from each block, but where it would round them: there they are kept in `sums`, of
  // sums_size(height, channels) elements, and the last block hands them on.
  template <class Store>
  void sum_over_queries(
      const T* map, std::int64_t channels, const A* weights, Stretch block, T* target, A* sums,
      const Store& store_sum) const {
    const LaneOperand<A> operand{weights, lanes, stride(height())};
    if (keeps_sums(height())) {
      const bool last = block.first + block.count == height();
      multiply(map, channels, block, operand, target, {0, height()}, sums, block.first > 0, last, store_sum);
    } else {
      multiply(map, channels, block, operand, target, {0, height()}, nullptr, false, true, store_sum);
    }
  }
  static std::int64_t sums_size(std::int64_t height, std::int64_t channels) {
    return keeps_sums(height) ? channels * stride(height) : 0;
  }

 private:
  static bool keeps_sums(std::int64_t height) { return !std::is_same_v<T, A> && QueryBlocks<A>(height).count() > 1; }

  // target [channels][positions], `row` elements apart: the stretch of map (channels, H, W)
  void stage(A* target, std::int64_t row, const T* map, std::int64_t channels, Stretch stretch) const {
    for (std::int64_t c = 0; c < channels; ++c) {
      const T* source = map + c * map_.positions() + offset(stretch.first);
      for (std::int64_t p = 0; p < stretch.count; ++p, source += map_.width) {
        store(target + c * row + p * lanes, read(source));
      }
    }
  }

  // Of the stretch of map (channels, H, W).
  template <class Element>
  Prefetch<Element> prefetch(Element* map, std::int64_t channels, Stretch stretch) const {
    return {map + offset(stretch.first), channels, map_.positions(), stretch.count, map_.width, present_};
  }

  // store_sum(address in target, position, sum) for the sums over `steps` of map times weights, for every channel and
  // position of `results`. With `sums` those are kept there, and added to what is there if `add`. Where they are
  // not `final` none is handed on.
  template <class Store>
  void multiply(
      const T* map, std::int64_t channels, Stretch steps, const LaneOperand<A>& weights, T* target, Stretch results,
      A* sums, bool add, bool final, const Store& store_sum) const {
    const std::int64_t step_stride = stride(steps.count);
    const std::int64_t result_stride = stride(results.count);
    for (std::int64_t channel = 0; channel < channels; channel += kApplyChannels) {
      const std::int64_t depth = std::min(kApplyChannels, channels - channel);
      const std::int64_t next = channel + depth;
      const std::int64_t next_depth = std::min(kApplyChannels, channels - next);
      A* const products = sums == nullptr ? memory_ + depth * step_stride : sums + channel * result_stride;
      T* const chunk = target + channel * map_.positions();
      Prefetch next_steps = prefetch(map + next * map_.positions(), next_depth, steps);
      Prefetch next_results = prefetch(chunk, final ? depth : 0, results);
      stage(memory_, step_stride, map + channel * map_.positions(), depth, steps);
      lane_product<V>(
          {memory_, step_stride, lanes}, depth, weights, results.count, steps.count, {products, result_stride, lanes},
          add, [&](std::int64_t parts) {
            next_steps(parts);
            next_results(parts);
          });
      if (!final) {
        continue;
      }
      for (std::int64_t c = 0; c < depth; ++c) {
        T* const at = chunk + c * map_.positions() + offset(results.first);
        for (std::int64_t p = 0; p < results.count; ++p) {
          store_sum(at + p * map_.width, results.first + p, load<V>(products + c * result_stride + p * lanes));
        }
      }
    }
  }

  MapSizes map_;
  std::int64_t column_, present_;
  A* memory_;
};

}  // namespace segattn::cpu
