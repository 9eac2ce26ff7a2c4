// Channel attention, forward: energies (energies.h), softmax of their rows, weights applied to value.
//
// Memory: the energies of the splits and the packed weights, C x K each. No buffer has the size of a feature map.
#pragma once

#include "checks/channel.h"
#include "cpu/channel/apply.h"
#include "cpu/channel/energies.h"
#include "cpu/channel/softmax.h"

namespace segattn::cpu {

template <class T>
struct ChannelForwardArguments {
  ChannelEnergySource<T> energy;
  const T* value;                 // (B, K, T)
  T* output;                      // (B, C, T)
  AccumulatorOf<T>* logsumexp;    // (B, C)
  const AccumulatorOf<T>* gamma;  // (B, C): output = gamma * attention + value, C = K; null: no gamma
  ChannelSizes sizes;
  AccumulatorOf<T> scale;
};

template <class T>
class ChannelForward {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;
  static constexpr std::int64_t kPanel = panel_columns<P>;

 public:
  explicit ChannelForward(const ChannelForwardArguments<T>& arguments)
      : arguments_(arguments), sizes_(arguments.sizes), energies_(arguments.energy, arguments.sizes) {}

  void run() const {
    if (sizes_.batch == 0) {
      return;
    }
    const std::int64_t samples = energies_.samples_together();
    const Buffer<A> energy(samples * energies_.size());
    const Buffer<P> weights(samples * weights_size());
    for (std::int64_t first = 0; first < sizes_.batch; first += samples) {
      run_samples(first, std::min(samples, sizes_.batch - first), energy.data(), weights.data());
    }
  }

 private:
  std::int64_t weights_size() const { return packed_a_size<P>(sizes_.query_channels, sizes_.key_channels); }

  // energy: of the energies; weights: [samples], a packed A operand (C, K) each
  void run_samples(std::int64_t first, std::int64_t samples, A* energy, P* weights) const {
    energies_.contract(first, samples, energy);
    const std::int64_t ld = energies_.leading_dimension();
    const std::int64_t row_blocks = ceil_div(sizes_.query_channels, kPanel);
    parallel_units(
        samples * row_blocks,
        scratch_bytes<A>(kPanel * ld) + (kIsPair<P> ? scratch_bytes<StoredOf<P>>(kPanel * ld) : 0),
        [&](std::int64_t unit, Scratch& scratch) {
          const std::int64_t sample = unit / row_blocks;
          softmax_rows(
              first + sample, unit % row_blocks * kPanel, energy + sample * energies_.size(),
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
    const std::int64_t ld = energies_.leading_dimension();
    const std::int64_t rows = std::min(kPanel, sizes_.query_channels - row);
    A* const block = scratch.take<A>(kPanel * ld);
    energies_.load(sample, energy, row, rows, block);
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
  ChannelEnergies<T> energies_;
};

}  // namespace segattn::cpu
