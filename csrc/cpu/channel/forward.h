// Channel attention, forward: energies contracted over positions, softmax of their rows, weights applied to value.
//
// Memory: the energies of the splits and the packed weights, C x K each. No buffer has the size of a feature map.
#pragma once

#include "checks/channel.h"
#include "cpu/channel/apply.h"
#include "cpu/channel/contraction.h"
#include "cpu/channel/softmax.h"

namespace segattn::cpu {

template <class T>
struct ChannelForwardArguments {
  const T* query;                 // (B, C, S); null: key
  const T* key;                   // (B, K, S)
  const T* value;                 // (B, K, T)
  T* output;                      // (B, C, T)
  AccumulatorOf<T>* logsumexp;    // (B, C)
  const AccumulatorOf<T>* gamma;  // (B, C): output = gamma * attention + value, C = K; null: no gamma
  ChannelSizes sizes;
  AccumulatorOf<T> scale;
};

// How many samples are processed together, to bound the memory, if each needs `elements` elements of shared buffers.
inline std::int64_t samples_together(std::int64_t batch, std::int64_t elements) {
  constexpr std::int64_t kLimit = std::int64_t{1} << 22;
  return std::clamp<std::int64_t>(kLimit / std::max<std::int64_t>(1, elements), 1, batch);
}

template <class T>
class ChannelForward {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;
  static constexpr std::int64_t kPanel = panel_columns<P>;

 public:
  explicit ChannelForward(const ChannelForwardArguments<T>& arguments)
      : arguments_(arguments),
        sizes_(arguments.sizes),
        plan_(sizes_.query_channels, sizes_.key_channels, sizes_.query_positions) {}

  void run() const {
    if (sizes_.batch == 0) {
      return;
    }
    const std::int64_t samples = samples_together(sizes_.batch, plan_.size());
    const Buffer<A> energy(samples * plan_.size());
    const Buffer<P> weights(samples * weights_size());
    for (std::int64_t first = 0; first < sizes_.batch; first += samples) {
      run_samples(first, std::min(samples, sizes_.batch - first), energy.data(), weights.data());
    }
  }

 private:
  std::int64_t weights_size() const { return packed_a_size<P>(sizes_.query_channels, sizes_.key_channels); }

  // energy: [samples][splits][C][leading dimension]; weights: [samples], a packed A operand (C, K) each
  void run_samples(std::int64_t first, std::int64_t samples, A* energy, P* weights) const {
    const std::int64_t key_size = sizes_.key_channels * sizes_.query_positions;
    const std::int64_t query_size = sizes_.query_channels * sizes_.query_positions;
    parallel_units(
        samples * plan_.units(), ChannelContraction<T>::scratch(plan_), [&](std::int64_t unit, Scratch& scratch) {
          const std::int64_t sample = unit % samples;
          using Left = typename ChannelContraction<T>::Left;
          const T* const query =
              arguments_.query == nullptr ? nullptr : arguments_.query + (first + sample) * query_size;
          const Left left[] = {{query, energy + sample * plan_.size()}};
          ChannelContraction<T>(plan_, arguments_.key + (first + sample) * key_size, left)
              .run_unit(unit / samples, scratch);
        });

    const std::int64_t ld = plan_.leading_dimension();
    const std::int64_t row_blocks = ceil_div(sizes_.query_channels, kPanel);
    parallel_units(
        samples * row_blocks,
        scratch_bytes<A>(kPanel * ld) + (kIsPair<P> ? scratch_bytes<StoredOf<P>>(kPanel * ld) : 0),
        [&](std::int64_t unit, Scratch& scratch) {
          const std::int64_t sample = unit / row_blocks;
          softmax_rows(
              first + sample, unit % row_blocks * kPanel, energy + sample * plan_.size(),
              weights + sample * weights_size(), scratch);
        });

    const ChannelApplication<T> application(sizes_.query_channels, sizes_.value_positions, samples);
    parallel_units(
        samples * application.units(), application.scratch(sizes_.key_channels),
        [&](std::int64_t unit, Scratch& scratch) {
          const std::int64_t sample = unit / application.units();
          const std::int64_t value_size = sizes_.key_channels * sizes_.value_positions;
          const std::int64_t output_size = sizes_.query_channels * sizes_.value_positions;
          const ApplyTerm<T> terms[] = {
              {weights + sample * weights_size(), arguments_.value + (first + sample) * value_size,
               sizes_.key_channels}};
          application.run_unit(
              unit % application.units(), terms, arguments_.gamma == nullptr ? nullptr : terms[0].source,
              arguments_.output + (first + sample) * output_size, scratch);
        });
  }

  // The weights of rows [row, row + kPanel) of one sample.
  void softmax_rows(std::int64_t sample, std::int64_t row, const A* energy, P* weights, Scratch& scratch) const {
    const std::int64_t ld = plan_.leading_dimension();
    const std::int64_t rows = std::min(kPanel, sizes_.query_channels - row);
    A* const block = scratch.take<A>(kPanel * ld);
    load_rows(plan_, energy, arguments_.query == nullptr ? Storage::kUpper : Storage::kFull, row, rows, block);
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t at = sample * sizes_.query_channels + row + r;
      arguments_.logsumexp[at] = softmax_row(block + r * ld, sizes_.key_channels, arguments_.scale);
      if (arguments_.gamma != nullptr) {
        multiply_row(block + r * ld, sizes_.key_channels, arguments_.gamma[at]);
      }
    }
    P* const target = weights + row * k_steps<P>(sizes_.key_channels);
    if constexpr (kIsPair<P>) {
      auto* const stored = scratch.take<StoredOf<P>>(kPanel * ld);
      store_row(stored, block, rows * ld);
      pack_a_from_rows<P>(target, stored, ld, rows, sizes_.key_channels);
    } else {
      pack_a_from_rows<P>(target, block, ld, rows, sizes_.key_channels);
    }
  }

  ChannelForwardArguments<T> arguments_;
  ChannelSizes sizes_;
  ContractionPlan<P> plan_;
};

}  // namespace segattn::cpu
