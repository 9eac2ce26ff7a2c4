// The products of criss-cross attention along a strip of adjacent columns of a feature map (channels, H, W), one column
// per lane. Operands are staged as vectors, (channel, position), and multiplied by lane_product; nothing is transposed.
//
// A strip's weights are vectors too, [queries][keys] for a block of queries, `stride(keys)` elements apart per query.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/common/lane_gemm.h"
#include "cpu/common/parallel.h"
#include "cpu/common/range.h"
#include "cpu/criss_cross/arguments.h"

namespace segattn::cpu {

// Row stride of a matrix of vectors: an odd number of vectors, because even strides map the rows to few cache sets.
constexpr std::int64_t lane_stride(std::int64_t length, int lanes) {
  return (length | 1) * lanes;
}

// Blocks of nearly equal size of a column's queries, whose weights are held at once: at most 700 KB, which is all
// queries of up to 105 rows of float. Every block reads the feature maps again; weights beyond L2 stream from L3.
// Gradients are summed over blocks, so with least_blocks = 1 the cut depends on the height alone.
template <class A>
class QueryBlocks {
 public:
  explicit QueryBlocks(std::int64_t height, std::int64_t least_blocks = 1) : height_(height) {
    const auto query_bytes = lane_stride(height, kLanes<A>) * static_cast<std::int64_t>(sizeof(A));
    const std::int64_t most = std::max<std::int64_t>((700 << 10) / query_bytes, kLaneColumns);
    count_ = std::min(std::max(ceil_div(height, most), least_blocks), height);
  }

  std::int64_t count() const { return count_; }
  std::int64_t most_queries() const { return ceil_div(height_, count_); }
  Range operator[](std::int64_t block) const { return part_of(height_, 1, block, count_); }

 private:
  std::int64_t height_, count_;
};

template <class A>
inline constexpr int kFewestLanes = std::min(kLanes<A>, 4);

// Calls work<lanes>() with the fewest lanes that hold `columns`: the last strip of 97 columns has one column, and 4
// lanes cost half of 16 on Zen 4.
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

// Calls pass.work<lanes>(sample, column, scratch) for every strip of every sample, with pass.scratch<lanes>() bytes.
// Strips are narrower than a vector where threads would be idle otherwise. Lanes are independent, so no result depends
// on the width.
template <class A, class Pass>
void for_each_strip(ImageSize image, std::int64_t batch, const Pass& pass) {
  const std::int64_t threads = thread_count();
  std::int64_t width = kLanes<A>;
  const auto strips = [&] { return ceil_div(image.width, width); };
  while (width > kFewestLanes<A> && strips() * batch < threads) {
    width /= 2;
  }
  std::size_t scratch_size = 0;
  with_lanes<A>(width, [&]<int lanes>() { scratch_size = pass.template scratch<lanes>(); });
  parallel_units(batch * strips(), scratch_size, [&](std::int64_t unit, Scratch& scratch) {
    const std::int64_t column = unit % strips() * width;
    with_lanes<A>(std::min(width, image.width - column), [&]<int lanes>() {
      pass.template work<lanes>(unit / strips(), column, scratch);
    });
  });
}

template <class T, int lanes>
class ColumnStrip {
 public:
  using A = AccumulatorOf<T>;
  using V = VecN<A, lanes>;
  // Channels that are staged at once, of dot products and of weighted sums.
  static constexpr std::int64_t kDotChannels = 32;
  static constexpr std::int64_t kSumChannels = 2 * kLaneRows;

  static constexpr std::int64_t stride(std::int64_t length) { return lane_stride(length, lanes); }

  // Elements of scratch memory for the products below, with blocks of up to `queries` queries.
  static std::int64_t memory_size(std::int64_t height, std::int64_t queries) {
    return std::max(kDotChannels, kSumChannels) * (stride(height) + stride(queries));
  }

  // Columns [column, column + lanes) of the image, of which the last may not exist.
  ColumnStrip(ImageSize image, std::int64_t column, A* memory)
      : image_(image),
        column_(column),
        present_(std::min<std::int64_t>(lanes, image.width - column)),
        memory_(memory) {}

  std::int64_t height() const { return image_.height; }
  // The offset of a position of the strip within a channel.
  std::int64_t offset(std::int64_t position) const { return position * image_.width + column_; }

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
  // The vector of a weight of a block; `query` counts from the start of the block.
  A* element(A* weights, std::int64_t query, std::int64_t key) const {
    return weights + query * stride(height()) + key * lanes;
  }
  // The store operation of the sums below that adds to the target.
  template <class R>
  auto adder() const {
    return [this](R* target, std::int64_t, V sum) { write(target, read(target) + sum); };
  }
  // The one that overwrites the target, unless it `adds`.
  template <class R>
  auto writer(bool adds = false) const {
    return [this, adds](R* target, std::int64_t, V sum) { write(target, adds ? read(target) + sum : sum); };
  }
  // Calls use(lane) for the columns that exist.
  template <class Use>
  void for_each_lane(const Use& use) const {
    for (std::int64_t lane = 0; lane < present_; ++lane) {
      use(lane);
    }
  }

  // products [queries][keys] = sum over channels of keys * queries, for a block of queries.
  // keys, queries: (channels, H, W).
  void dot_products(const T* keys, const T* queries, std::int64_t channels, Range block, A* products) const {
    const std::int64_t key_stride = stride(height());
    const std::int64_t query_stride = stride(block.size());
    const Range column{0, height()};
    for (std::int64_t channel = 0; channel < channels; channel += kDotChannels) {
      const std::int64_t depth = std::min(kDotChannels, channels - channel);
      const std::int64_t next = channel + depth;
      const std::int64_t next_depth = std::min(kDotChannels, channels - next);
      Prefetch next_keys = prefetch(keys + next * image_.positions(), next_depth, column);
      Prefetch next_queries = prefetch(queries + next * image_.positions(), next_depth, block);
      A* const staged_keys = memory_;
      A* const staged_queries = memory_ + depth * key_stride;
      stage(staged_keys, key_stride, keys + channel * image_.positions(), depth, column);
      stage(staged_queries, query_stride, queries + channel * image_.positions(), depth, block);
      lane_product<V>(
          {staged_keys, lanes, key_stride}, height(), {staged_queries, lanes, query_stride}, block.size(), depth,
          {products, lanes, key_stride}, channel > 0 ? Accumulate::kYes : Accumulate::kNo, [&](std::int64_t parts) {
            next_keys(parts);
            next_queries(parts);
          });
    }
  }

  // Calls store_sum(address of the query in target, query, sum) for every channel and query of the block, with sum =
  // sum over keys of weights * features. features, target: (channels, H, W).
  template <class R, class Store>
  void sum_over_keys(
      const T* features, std::int64_t channels, const A* weights, Range block, R* target,
      const Store& store_sum) const {
    multiply(
        features, channels, {0, height()}, {weights, stride(height()), lanes}, target, block, nullptr, Accumulate::kNo,
        Sums::kComplete, store_sum);
  }

  // The same for every channel and key: sums over the block's queries. Call it for every block in order. Each block
  // calls store_sum with its own part. Where R rounds and there are several blocks, the parts are added up in `sums`,
  // of sums_size<R>(height, channels) elements, instead, and only the last block calls store_sum.
  template <class R, class Store>
  void sum_over_queries(
      const T* features, std::int64_t channels, const A* weights, Range block, R* target, A* sums,
      const Store& store_sum) const {
    const LaneOperand<A> operand{weights, lanes, stride(height())};
    if (keeps_sums<R>(height())) {
      multiply(
          features, channels, block, operand, target, {0, height()}, sums,
          block.begin > 0 ? Accumulate::kYes : Accumulate::kNo,
          block.end == height() ? Sums::kComplete : Sums::kPartial, store_sum);
    } else {
      multiply(
          features, channels, block, operand, target, {0, height()}, nullptr, Accumulate::kNo, Sums::kComplete,
          store_sum);
    }
  }
  template <class R>
  static std::int64_t sums_size(std::int64_t height, std::int64_t channels) {
    return keeps_sums<R>(height) ? channels * stride(height) : 0;
  }

 private:
  // kComplete: passed to store_sum. kPartial: more blocks follow.
  enum class Sums { kPartial, kComplete };

  template <class R>
  static bool keeps_sums(std::int64_t height) {
    return !std::is_same_v<R, A> && QueryBlocks<A>(height).count() > 1;
  }

  // target [channels][positions], `row` elements apart per channel = `positions` of features (channels, H, W)
  void stage(A* target, std::int64_t row, const T* features, std::int64_t channels, Range positions) const {
    for (std::int64_t c = 0; c < channels; ++c) {
      const T* source = features + c * image_.positions() + offset(positions.begin);
      for (std::int64_t p = 0; p < positions.size(); ++p, source += image_.width) {
        store(target + c * row + p * lanes, read(source));
      }
    }
  }

  // Of `positions` of features (channels, H, W).
  template <class Element>
  Prefetch<Element> prefetch(Element* features, std::int64_t channels, Range positions) const {
    return {features + offset(positions.begin), channels, image_.positions(), positions.size(), image_.width, present_};
  }

  // The sums over `steps` of features times weights, for every channel and position of `results`. With `sums` they are
  // stored or accumulated there. Complete sums are passed to store_sum(address in target, position, sum).
  template <class R, class Store>
  void multiply(
      const T* features, std::int64_t channels, Range steps, const LaneOperand<A>& weights, R* target, Range results,
      A* sums, Accumulate accumulate, Sums state, const Store& store_sum) const {
    const std::int64_t step_stride = stride(steps.size());
    const std::int64_t result_stride = stride(results.size());
    for (std::int64_t channel = 0; channel < channels; channel += kSumChannels) {
      const std::int64_t depth = std::min(kSumChannels, channels - channel);
      const std::int64_t next = channel + depth;
      const std::int64_t next_depth = std::min(kSumChannels, channels - next);
      A* const products = sums == nullptr ? memory_ + depth * step_stride : sums + channel * result_stride;
      R* const chunk = target + channel * image_.positions();
      Prefetch next_steps = prefetch(features + next * image_.positions(), next_depth, steps);
      Prefetch next_results = prefetch(chunk, state == Sums::kComplete ? depth : 0, results);
      stage(memory_, step_stride, features + channel * image_.positions(), depth, steps);
      lane_product<V>(
          {memory_, step_stride, lanes}, depth, weights, results.size(), steps.size(), {products, result_stride, lanes},
          accumulate, [&](std::int64_t parts) {
            next_steps(parts);
            next_results(parts);
          });
      if (state == Sums::kPartial) {
        continue;
      }
      for (std::int64_t c = 0; c < depth; ++c) {
        R* const at = chunk + c * image_.positions() + offset(results.begin);
        for (std::int64_t p = 0; p < results.size(); ++p) {
          store_sum(at + p * image_.width, results.begin + p, load<V>(products + c * result_stride + p * lanes));
        }
      }
    }
  }

  ImageSize image_;
  std::int64_t column_, present_;
  A* memory_;
};

}  // namespace segattn::cpu
