// Channel attention: the energies query key^T of channels, which either are contracted over positions into splits, or
// are given as finished sums, perhaps over the positions of several calls. Their rows are the same either way.
#pragma once

#include <algorithm>

#include "checks/channel.h"
#include "cpu/channel/contraction.h"

namespace segattn::cpu {

// Where the energies come from: feature maps, or a matrix.
template <class T>
struct ChannelEnergySource {
  bool symmetric;                  // query is key
  const T* query;                  // (B, C, S); not read if symmetric
  const T* key;                    // (B, K, S)
  const AccumulatorOf<T>* matrix;  // (B, C, K): the energies themselves; null: query key^T
};

// How many samples are processed together, to bound the memory, if each needs `elements` elements of shared buffers.
inline std::int64_t samples_together(std::int64_t batch, std::int64_t elements) {
  constexpr std::int64_t kLimit = std::int64_t{1} << 22;
  return std::clamp<std::int64_t>(kLimit / std::max<std::int64_t>(1, elements), 1, batch);
}

// Copies rows of `columns` elements to rows of `ld`, with zeros behind.
template <class A>
void copy_padded(const A* source, std::int64_t rows, std::int64_t columns, A* target, std::int64_t ld) {
  for (std::int64_t r = 0; r < rows; ++r) {
    std::fill(std::copy_n(source + r * columns, columns, target + r * ld), target + (r + 1) * ld, A(0));
  }
}

template <class T>
class ChannelEnergies {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;
  static constexpr std::int64_t kPanel = panel_columns<P>;

 public:
  ChannelEnergies(const ChannelEnergySource<T>& source, const ChannelSizes& sizes)
      : source_(source), sizes_(sizes), plan_(sizes.query_channels, sizes.key_channels, sizes.query_positions) {}

  const ContractionPlan<P>& plan() const { return plan_; }
  // Of a row that `load` writes.
  std::int64_t leading_dimension() const { return plan_.leading_dimension(); }
  // Elements of a sample in the buffer.
  std::int64_t size() const { return source_.matrix == nullptr ? plan_.size() : 0; }
  std::int64_t samples_together() const { return cpu::samples_together(sizes_.batch, plan_.size()); }

  // buffer: [samples][splits][C][leading dimension]
  void contract(std::int64_t first, std::int64_t samples, A* buffer) const {
    if (source_.matrix != nullptr) {
      return;
    }
    const std::int64_t key_size = sizes_.key_channels * sizes_.query_positions;
    const std::int64_t query_size = sizes_.query_channels * sizes_.query_positions;
    parallel_units(
        samples * plan_.units(), ChannelContraction<T>::scratch(plan_), [&](std::int64_t unit, Scratch& scratch) {
          const std::int64_t sample = unit % samples;
          using Left = typename ChannelContraction<T>::Left;
          const T* const query = source_.symmetric ? nullptr : source_.query + (first + sample) * query_size;
          const Left left[] = {{query, buffer + sample * plan_.size()}};
          ChannelContraction<T>(plan_, source_.key + (first + sample) * key_size, left)
              .run_unit(unit / samples, scratch);
        });
  }

  // target [rows][leading dimension] = rows [row, row + rows) of a sample, at most a panel. buffer: the sample's.
  void load(std::int64_t sample, const A* buffer, std::int64_t row, std::int64_t rows, A* target) const {
    if (source_.matrix == nullptr) {
      load_rows(plan_, buffer, source_.symmetric ? Storage::kUpper : Storage::kFull, row, rows, target);
    } else {
      const std::int64_t first = sample * sizes_.query_channels + row;
      copy_padded(source_.matrix + first * sizes_.key_channels, rows, sizes_.key_channels, target, leading_dimension());
    }
  }

  // Contracts and writes the finished sums. energy: (B, C, K)
  void store(A* energy) const {
    if (sizes_.batch == 0) {
      return;
    }
    const std::int64_t together = samples_together(), ld = leading_dimension(), keys = sizes_.key_channels;
    const std::int64_t row_blocks = ceil_div(sizes_.query_channels, kPanel);
    const Buffer<A> buffer(together * size());
    for (std::int64_t first = 0; first < sizes_.batch; first += together) {
      const std::int64_t samples = std::min(together, sizes_.batch - first);
      contract(first, samples, buffer.data());
      parallel_units(samples * row_blocks, scratch_bytes<A>(kPanel * ld), [&](std::int64_t unit, Scratch& scratch) {
        const std::int64_t sample = unit / row_blocks, row = unit % row_blocks * kPanel;
        const std::int64_t rows = std::min(kPanel, sizes_.query_channels - row);
        A* const block = scratch.take<A>(kPanel * ld);
        load(first + sample, buffer.data() + sample * size(), row, rows, block);
        A* const target = energy + ((first + sample) * sizes_.query_channels + row) * keys;
        for (std::int64_t r = 0; r < rows; ++r) {
          std::copy_n(block + r * ld, keys, target + r * keys);
        }
      });
    }
  }

 private:
  ChannelEnergySource<T> source_;
  ChannelSizes sizes_;
  ContractionPlan<P> plan_;
};

}  // namespace segattn::cpu
