// Channel attention: matrices of channels applied to feature maps, one pass over the positions:
// output(m, p) = sum over the terms of sum_k matrix(m, k) source(k, p), and residual(m, p) where there is one.
#pragma once

#include <span>

#include "cpu/common/pack.h"
#include "cpu/common/parallel.h"

namespace segattn::cpu {

template <class T>
struct ApplyTerm {
  const PackedOf<T>* matrix;  // (rows, channels), a packed A operand
  const T* source;            // (channels, positions)
  std::int64_t channels;
};

template <class T>
class ChannelApplication {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;

 public:
  // output: (rows, positions). `samples` is how many such applications run at once.
  ChannelApplication(std::int64_t rows, std::int64_t positions, std::int64_t samples)
      : rows_(rows), positions_(positions) {
    // Two panels at once: output sums and packed source of 512 channels take 2 x 196 KB. Fewer if that would leave
    // threads idle. A position's result does not depend on the cut.
    const std::int64_t threads = static_cast<std::int64_t>(torch::stable::get_num_threads());
    const std::int64_t vectors = padded_columns<P>(positions) / kLanes<A>;
    const std::int64_t even = vectors * samples / (2 * threads);
    block_ = std::clamp<std::int64_t>(even, 1, 2 * kColumnVectors<P>) * kLanes<A>;
  }

  std::int64_t units() const { return (positions_ + block_ - 1) / block_; }

  std::size_t scratch(std::span<const std::int64_t> channels) const {
    std::int64_t most = 0;
    for (const std::int64_t count : channels) {
      most = std::max(most, count);
    }
    return scratch_bytes<P>(packed_b_size<P>(block_, most)) + scratch_bytes<A>(panels_size<P>(rows_, block_));
  }

  // residual: (rows, positions), added last, so that it rounds no partial sum; or null
  void run_unit(
      std::int64_t unit, std::span<const ApplyTerm<T>> terms, const T* residual, T* output, Scratch& scratch) const {
    const std::int64_t first = unit * block_;
    const std::int64_t count = std::min(block_, positions_ - first);
    A* const sums = scratch.take<A>(panels_size<P>(rows_, block_));
    std::int64_t most = 0;
    for (const ApplyTerm<T>& term : terms) {
      most = std::max(most, term.channels);
    }
    P* const packed = scratch.take<P>(packed_b_size<P>(block_, most));
    GemmMode mode = GemmMode::store;
    for (const ApplyTerm<T>& term : terms) {
      pack_b_from_steps<P>(packed, term.source + first, positions_, count, term.channels);
      tile_gemm<P>(
          AOperand<P>::packed(term.matrix), packed, COperand<A>::panels(sums), rows_, count, k_steps<P>(term.channels),
          mode);
      mode = GemmMode::add;
    }
    store_panels(output + first, positions_, sums, rows_, count, residual == nullptr ? nullptr : residual + first);
  }

 private:
  std::int64_t rows_, positions_, block_;
};

}  // namespace segattn::cpu
