// Channel attention, backward. With the weights P, dP = grad_output value^T and dS = scale * P (dP - rowsum(P dP)):
//
//   three inputs   grad_query = dS key, grad_key = dS^T query, grad_value = P^T grad_output
//   one input      grad_input = P^T grad_output + (dS + dS^T) input, in one pass over positions
//   with gamma     the same with gamma P for P and gamma dP for dP, + grad_output; grad_gamma = rowsum(P dP)
//
// channel_apply takes the energies as a matrix, and stores dS as grad_energy; channel_energy starts from dS.
//
// A gradient that is not wanted takes no product, no matrix and no store.
//
// The weights are recomputed from whole rows of energies with their own maximum, as in the forward pass, not as
// exp(energy - logsumexp). DANet's energies are in the thousands, where the rounding of logsumexp alone is an error of
// 2.4e-4 of every weight in float32.
#pragma once

#include <array>

#include "cpu/channel/forward.h"

namespace segattn::cpu {

template <class T>
struct ChannelBackwardArguments {
  const T* grad_output;           // (B, C, T)
  ChannelEnergySource<T> energy;  // symmetric: one input, passed as key and value, T = S
  const AccumulatorOf<T>* given;  // (B, C, K): dS, with neither grad_output nor value; null: computed
  const T* value;                 // (B, K, T)
  AccumulatorOf<T>* grad_energy;  // (B, C, K), dS; null if not wanted
  T* grad_query;                  // (B, C, S); null for one input. This and the next two: null if not wanted
  T* grad_key;                    // (B, K, S); for one input: its gradient
  T* grad_value;                  // (B, K, T); null for one input
  const AccumulatorOf<T>* gamma;  // (B, C); null: no gamma
  AccumulatorOf<T>* grad_gamma;   // (B, C); null if not wanted
  ChannelSizes sizes;
  AccumulatorOf<T> scale;
};

template <class T>
class ChannelBackward {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;
  using Stored = StoredOf<P>;
  using Contraction = ChannelContraction<T>;
  static constexpr std::int64_t kPanel = panel_columns<P>;

 public:
  explicit ChannelBackward(const ChannelBackwardArguments<T>& arguments)
      : arguments_(arguments),
        sizes_(arguments.sizes),
        one_input_(arguments.energy.symmetric),
        energies_(arguments.energy, arguments.sizes),
        grad_plan_(sizes_.query_channels, sizes_.key_channels, sizes_.value_positions),
        ld_(energies_.leading_dimension()) {}

  void run() const {
    const std::int64_t matrix = sizes_.query_channels * ld_;
    const std::int64_t sample_size = energies_.plan().size() + grad_plan_.size() + matrix;
    if (sizes_.batch == 0) {
      return;
    }
    const std::int64_t samples = samples_together(sizes_.batch, sample_size);
    const Buffer<A> energy(arguments_.given == nullptr ? samples * energies_.size() : 0);
    const Buffer<A> grad(differentiates_energies() ? samples * grad_plan_.size() : 0);
    const Buffer<Stored> weights(applies_weights() ? samples * matrix : 0);
    const Buffer<P> packed(samples * sample_packed_size());
    for (std::int64_t first = 0; first < sizes_.batch; first += samples) {
      const std::int64_t count = std::min(samples, sizes_.batch - first);
      if (arguments_.given == nullptr) {
        contract(first, count, energy.data(), grad.data());
        differentiate(first, count, energy.data(), grad.data(), weights.data());
      } else {
        copy_given(first, count, grad.data());
      }
      if (sample_packed_size() > 0) {
        pack_matrices(count, grad.data(), weights.data(), packed.data());
        apply(first, count, packed.data());
      }
    }
  }

 private:
  // Whether a wanted gradient needs dP, and whether one is a product with P.
  bool differentiates_energies() const {
    return arguments_.grad_query != nullptr || arguments_.grad_key != nullptr || arguments_.grad_energy != nullptr ||
        arguments_.grad_gamma != nullptr;
  }
  bool applies_weights() const {
    return arguments_.given == nullptr && (one_input_ ? arguments_.grad_key : arguments_.grad_value) != nullptr;
  }

  // The packed matrices of a sample, of packed_size() elements each: P^T, then dS + dS^T (one input) or dS^T, then dS,
  // as far as wanted gradients need them.
  std::int64_t key_matrix() const { return applies_weights() ? packed_size() : 0; }
  std::int64_t query_matrix() const { return key_matrix() + (arguments_.grad_key != nullptr ? packed_size() : 0); }
  std::int64_t sample_packed_size() const {
    return query_matrix() + (arguments_.grad_query != nullptr ? packed_size() : 0);
  }
  std::int64_t packed_size() const {
    return std::max(
        packed_a_size<P>(sizes_.query_channels, sizes_.key_channels),
        packed_a_size<P>(sizes_.key_channels, sizes_.query_channels));
  }
  std::int64_t query_size() const { return sizes_.query_channels * sizes_.query_positions; }
  std::int64_t key_size() const { return sizes_.key_channels * sizes_.query_positions; }
  std::int64_t value_size() const { return sizes_.key_channels * sizes_.value_positions; }
  std::int64_t output_size() const { return sizes_.query_channels * sizes_.value_positions; }

  // energy, grad: [samples][splits][C][ld]
  void contract(std::int64_t first, std::int64_t samples, A* energy, A* grad) const {
    const std::size_t scratch_size = std::max(Contraction::scratch(energies_.plan()), Contraction::scratch(grad_plan_));
    const std::int64_t energy_units = arguments_.energy.matrix == nullptr ? energies_.plan().units() : 0;
    const std::int64_t units =
        one_input_ || !differentiates_energies() ? energy_units : energy_units + grad_plan_.units();
    parallel_units(samples * units, scratch_size, [&](std::int64_t unit, Scratch& scratch) {
      const std::int64_t sample = unit % samples;
      const T* const grad_output = arguments_.grad_output + (first + sample) * output_size();
      A* const sample_energy = energy + sample * energies_.size();
      A* const sample_grad = grad + sample * grad_plan_.size();
      using Left = typename Contraction::Left;
      unit /= samples;
      if (one_input_) {
        const T* const key = arguments_.energy.key + (first + sample) * key_size();
        const Left left[] = {{nullptr, sample_energy}, {grad_output, sample_grad}};
        Contraction(energies_.plan(), key, left).run_unit(unit, scratch);
      } else if (unit < energy_units) {
        const T* const key = arguments_.energy.key + (first + sample) * key_size();
        const Left left[] = {{arguments_.energy.query + (first + sample) * query_size(), sample_energy}};
        Contraction(energies_.plan(), key, left).run_unit(unit, scratch);
      } else {
        const Left left[] = {{grad_output, sample_grad}};
        Contraction(grad_plan_, arguments_.value + (first + sample) * value_size(), left)
            .run_unit(unit - energy_units, scratch);
      }
    });
  }

  // weights: [samples][C][ld] = P, or gamma P. The first split of grad becomes dS.
  void differentiate(std::int64_t first, std::int64_t samples, const A* energy, A* grad, Stored* weights) const {
    const std::int64_t row_blocks = ceil_div(sizes_.query_channels, kPanel);
    parallel_units(samples * row_blocks, 2 * scratch_bytes<A>(kPanel * ld_), [&](std::int64_t unit, Scratch& scratch) {
      const std::int64_t sample = unit / row_blocks;
      const std::int64_t row = unit % row_blocks * kPanel;
      const std::int64_t rows = std::min(kPanel, sizes_.query_channels - row);
      A* const row_weights = scratch.take<A>(kPanel * ld_);
      A* const row_grad = scratch.take<A>(kPanel * ld_);
      A* const grad_result = grad + sample * grad_plan_.size();
      energies_.load(first + sample, energy + sample * energies_.size(), row, rows, row_weights);
      if (differentiates_energies()) {
        load_rows(grad_plan_, grad_result, Storage::kFull, row, rows, row_grad);
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t at = (first + sample) * sizes_.query_channels + row + r;
        const A gamma = arguments_.gamma == nullptr ? A(1) : arguments_.gamma[at];
        softmax_row(row_weights + r * ld_, sizes_.key_channels, arguments_.scale);
        if (differentiates_energies()) {
          const A dot = softmax_row_backward(
              row_weights + r * ld_, row_grad + r * ld_, sizes_.key_channels, arguments_.scale * gamma);
          if (arguments_.grad_gamma != nullptr) {
            arguments_.grad_gamma[at] = dot;
          }
        }
        if (arguments_.gamma != nullptr) {
          multiply_row(row_weights + r * ld_, sizes_.key_channels, gamma);
        }
      }
      if (applies_weights()) {
        store_row(weights + (sample * sizes_.query_channels + row) * ld_, row_weights, rows * ld_);
      }
      if (arguments_.grad_query != nullptr || arguments_.grad_key != nullptr) {
        std::copy_n(row_grad, rows * ld_, grad_result + row * ld_);
      }
      if (arguments_.grad_energy != nullptr) {
        const std::int64_t keys = sizes_.key_channels;
        A* const target = arguments_.grad_energy + ((first + sample) * sizes_.query_channels + row) * keys;
        for (std::int64_t r = 0; r < rows; ++r) {
          std::copy_n(row_grad + r * ld_, keys, target + r * keys);
        }
      }
    });
  }

  // The first split of grad = dS, which is given.
  void copy_given(std::int64_t first, std::int64_t samples, A* grad) const {
    const std::int64_t keys = sizes_.key_channels;
    parallel_units(samples * sizes_.query_channels, 0, [&](std::int64_t unit, Scratch&) {
      const std::int64_t sample = unit / sizes_.query_channels, row = unit % sizes_.query_channels;
      const A* const source = arguments_.given + (first * sizes_.query_channels + unit) * keys;
      copy_padded(source, 1, keys, grad + sample * grad_plan_.size() + row * ld_, ld_);
    });
  }

  void pack_matrices(std::int64_t samples, const A* grad, const Stored* weights, P* packed) const {
    const std::int64_t rows_most = std::max(sizes_.query_channels, sizes_.key_channels);
    const std::int64_t blocks = ceil_div(rows_most, kPanel);
    const std::int64_t widest = round_up(rows_most, kPanel);
    parallel_units(
        samples * blocks, scratch_bytes<A>(kPanel * widest) + scratch_bytes<Stored>(kPanel * widest),
        [&](std::int64_t unit, Scratch& scratch) {
          const std::int64_t sample = unit / blocks;
          const std::int64_t row = unit % blocks * kPanel;
          pack_blocks(
              row, grad + sample * grad_plan_.size(), weights + sample * sizes_.query_channels * ld_,
              packed + sample * sample_packed_size(), scratch);
        });
  }

  // Rows [row, row + kPanel) of each packed matrix, where they exist.
  void pack_blocks(std::int64_t row, const A* grad, const Stored* weights, P* packed, Scratch& scratch) const {
    const std::int64_t channels = sizes_.query_channels;
    const std::int64_t keys = sizes_.key_channels;
    const std::int64_t query_rows = std::min(kPanel, channels - row);
    const std::int64_t key_rows = std::min(kPanel, keys - row);
    A* const block = scratch.take<A>(kPanel * round_up(std::max(channels, keys), kPanel));
    auto* const stored = scratch.take<Stored>(kPanel * round_up(std::max(channels, keys), kPanel));
    if (applies_weights() && key_rows > 0) {
      pack_a_from_steps<P>(packed + row * k_steps<P>(channels), weights + row, ld_, key_rows, channels);
    }
    if (arguments_.grad_key != nullptr && key_rows > 0) {
      P* const target = packed + key_matrix() + row * k_steps<P>(channels);
      if (one_input_) {
        transpose_2d(block, ld_, grad + row, ld_, channels, key_rows);
        for (std::int64_t r = 0; r < key_rows; ++r) {
          for (std::int64_t column = 0; column < channels; ++column) {
            block[r * ld_ + column] += grad[(row + r) * ld_ + column];
          }
        }
        pack_rows(target, block, stored, key_rows, channels);
      } else if constexpr (kIsPair<P>) {
        transpose_2d(block, padded_columns<P>(channels), grad + row, ld_, channels, key_rows);
        store_row(stored, block, key_rows * padded_columns<P>(channels));
        pack_a_from_rows<P>(target, stored, padded_columns<P>(channels), key_rows, channels);
      } else {
        pack_a_from_steps<P>(target, grad + row, ld_, key_rows, channels);
      }
    }
    if (arguments_.grad_query != nullptr && query_rows > 0) {
      pack_rows(packed + query_matrix() + row * k_steps<P>(keys), grad + row * ld_, stored, query_rows, keys);
    }
  }

  // source: [rows][ld]
  void pack_rows(P* target, const A* source, Stored* stored, std::int64_t rows, std::int64_t columns) const {
    if constexpr (kIsPair<P>) {
      store_row(stored, source, rows * ld_);
      pack_a_from_rows<P>(target, stored, ld_, rows, columns);
    } else {
      pack_a_from_rows<P>(target, source, ld_, rows, columns);
    }
  }

  void apply(std::int64_t first, std::int64_t samples, const P* packed) const {
    const std::int64_t channels = sizes_.query_channels;
    const std::int64_t keys = sizes_.key_channels;
    const auto sample_packed = [&](std::int64_t sample) { return packed + sample * sample_packed_size(); };
    const Residual residual = arguments_.gamma != nullptr ? Residual::kFirstSource : Residual::kNone;
    const auto one_input_term = [&](std::int64_t sample) {
      const T* const source = arguments_.energy.key + (first + sample) * key_size();
      return ApplyTerm<T>{sample_packed(sample) + key_matrix(), source, channels};
    };
    const auto one_input_result = [&](std::int64_t sample) {
      return arguments_.grad_key + (first + sample) * key_size();
    };
    if (one_input_ && arguments_.given != nullptr) {
      run_application<1>(samples, keys, sizes_.query_positions, [&](std::int64_t sample) {
        return std::pair{std::array<ApplyTerm<T>, 1>{one_input_term(sample)}, one_input_result(sample)};
      });
      return;
    }
    if (one_input_) {
      run_application<2>(
          samples, keys, sizes_.query_positions,
          [&](std::int64_t sample) {
            const T* const source = arguments_.grad_output + (first + sample) * output_size();
            return std::pair{
                std::array<ApplyTerm<T>, 2>{{{sample_packed(sample), source, channels}, one_input_term(sample)}},
                one_input_result(sample)};
          },
          residual);
      return;
    }
    if (arguments_.grad_value != nullptr) {
      run_application<1>(
          samples, keys, sizes_.value_positions,
          [&](std::int64_t sample) {
            const T* const source = arguments_.grad_output + (first + sample) * output_size();
            return std::pair{
                std::array<ApplyTerm<T>, 1>{{{sample_packed(sample), source, channels}}},
                arguments_.grad_value + (first + sample) * value_size()};
          },
          residual);
    }
    if (arguments_.grad_key != nullptr) {
      run_application<1>(samples, keys, sizes_.query_positions, [&](std::int64_t sample) {
        const T* const source = arguments_.energy.query + (first + sample) * query_size();
        return std::pair{
            std::array<ApplyTerm<T>, 1>{{{sample_packed(sample) + key_matrix(), source, channels}}},
            arguments_.grad_key + (first + sample) * key_size()};
      });
    }
    if (arguments_.grad_query != nullptr) {
      run_application<1>(samples, channels, sizes_.query_positions, [&](std::int64_t sample) {
        const T* const source = arguments_.energy.key + (first + sample) * key_size();
        return std::pair{
            std::array<ApplyTerm<T>, 1>{{{sample_packed(sample) + query_matrix(), source, keys}}},
            arguments_.grad_query + (first + sample) * query_size()};
      });
    }
  }

  // What is added to the output of an application.
  enum class Residual { kNone, kFirstSource };

  // job(sample) returns a sample's terms and its output.
  template <std::size_t terms, class Job>
  void run_application(
      std::int64_t samples, std::int64_t rows, std::int64_t positions, const Job& job,
      Residual residual = Residual::kNone) const {
    const ChannelApplication<T> application(rows, positions, samples);
    const std::int64_t most = std::max(sizes_.query_channels, sizes_.key_channels);
    parallel_units(samples * application.units(), application.scratch(most), [&](std::int64_t unit, Scratch& scratch) {
      const auto [sample_terms, output] = job(unit / application.units());
      application.run_unit(
          unit % application.units(), sample_terms,
          residual == Residual::kFirstSource ? sample_terms[0].source : nullptr, output, scratch);
    });
  }

  ChannelBackwardArguments<T> arguments_;
  ChannelSizes sizes_;
  bool one_input_;
  ChannelEnergies<T> energies_;
  ContractionPlan<P> grad_plan_;
  std::int64_t ld_;
};

}  // namespace segattn::cpu
