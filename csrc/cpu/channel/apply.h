// Channel attention: matrices of channels applied to feature maps, in one pass over the positions:
// output(m, p) = sum over terms and k of matrix(m, k) source(k, p), + residual(m, p) if given.
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
  // output: (rows, positions). samples: how many applications run at the same time.
  ChannelApplication(std::int64_t rows, std::int64_t positions, std::int64_t samples)
      : rows_(rows), positions_(positions) {
    // Two panels of positions: output sums and packed source of 512 channels take 2 x 196 KB. Fewer where threads would
    // be idle. A position's result does not depend on the cut.
    const std::int64_t vectors = padded_columns<P>(positions) / kLanes<A>;
    const std::int64_t even = vectors * samples / (2 * thread_count());
    block_ = std::clamp<std::int64_t>(even, 1, 2 * kColumnVectors<P>) * kLanes<A>;
  }

  std::int64_t units() const { return ceil_div(positions_, block_); }

  // channels: the maximum number of channels of any term.
  std::size_t scratch(std::int64_t channels) const {
    return scratch_bytes<P>(packed_b_size<P>(block_, channels)) + scratch_bytes<A>(panels_size<P>(rows_, block_));
  }

  // residual: (rows, positions) or null; added last, so that it does not enter the rounding of partial sums.
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
    GemmMode mode = GemmMode::kStore;
    for (const ApplyTerm<T>& term : terms) {
      pack_b_from_steps<P>(packed, term.source + first, positions_, count, term.channels);
      tile_gemm<P>(
          AOperand<P>::packed(term.matrix), packed, COperand<A>::panels(sums), rows_, count, k_steps<P>(term.channels),
          mode);
      mode = GemmMode::kAdd;
    }
    store_panels(output + first, positions_, sums, rows_, count, residual == nullptr ? nullptr : residual + first);
  }

 private:
  std::int64_t rows_, positions_, block_;
};

}  // namespace segattn::cpu
